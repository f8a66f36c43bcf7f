"""Text-only training: caption embeddings in place of image embeddings."""

import json

import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds
from clipcap_hf.cli import main
from clipcap_hf.clip import load_text_tower
from clipcap_hf.data import load_emoji
from clipcap_hf.training.rows import EpochRows
from clipcap_hf.training.text_only import embed_captions, text_only_rows
from datasets import Dataset, DatasetDict
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig


@pytest.fixture
def clip_folder(tmp_path, clip_config, tokenizer):
    """Save a complete CLIP whose projection width differs from that of its text configuration."""
    torch.manual_seed(0)
    text_config = CLIPTextConfig(
        vocab_size=290,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=40,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    config = CLIPConfig(text_config=text_config.to_dict(), vision_config=clip_config.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_embeddings_are_those_of_the_clip(clip_folder, captions):
    embed = load_text_tower(str(clip_folder))
    embeds = embed_captions(embed, [*captions, captions[0]], batch_size=3, progress=False)
    clip = CLIPModel.from_pretrained(clip_folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    for caption, found in zip(captions, embeds):
        inputs = tokenizer([caption], return_tensors="pt")
        text = clip.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        torch.testing.assert_close(found, F.normalize(clip.text_projection(text), dim=-1)[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(embeds[0], embeds[-1])


def test_open_clip_text_tower(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    text_cfg = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision_cfg = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text_cfg}, "preprocess_cfg": {}}
    model = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision_cfg, text_cfg=text_cfg).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    texts = ["a red heart", "a dog"]
    found = load_text_tower(str(tmp_path))(texts)
    torch.testing.assert_close(found, model.encode_text(open_clip.tokenize(texts)))


def test_another_model_is_no_text_tower(model_folder):
    with pytest.raises(ValueError, match="is a `clipcap`; the text tower must be a CLIP's"):
        load_text_tower(str(model_folder))


def test_rows_are_captions(captions):
    vectors = {caption: torch.randn(6) for caption in captions}
    rows = text_only_rows(
        [captions[:2], captions[2:3]], lambda texts: torch.stack([vectors[t] for t in texts]), progress=False
    )
    assert rows["captions"] == captions[:3]
    expected = F.normalize(torch.stack([vectors[caption] for caption in captions[:3]]), dim=-1)
    torch.testing.assert_close(torch.tensor(rows["clip_embeds"]), expected)
    assert len(EpochRows(rows)) == 3


def flags(folder, **settings):
    settings = {
        "model": folder / "captioner",
        "data": folder / "data",
        "text_only": True,
        "text_tower": folder / "clip",
        "output_dir": folder / "out",
        "eval_strategy": "no",
        "save_strategy": "no",
        "max_steps": 120,
        "learning_rate": 5e-3,
        "warmup_steps": 5,
        "embeds_noise": 0.02,
        "num_samples": 0,
        "per_device_train_batch_size": 16,
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    return ["train", *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]


@pytest.fixture
def run_folder(tmp_path, clip_folder, make_model, processor):
    """Names of emoji, without a picture, and a captioner."""
    make_model("clip", normalize_clip_embeds=True).save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    names = load_emoji("validation").select(range(0, 190, 12))["captions"]
    DatasetDict({"train": Dataset.from_dict({"captions": names})}).save_to_disk(tmp_path / "data")
    return tmp_path


def test_captions_come_out_of_their_own_embeddings(run_folder):
    """The captioner learns to reproduce the caption whose noisy embedding it receives."""
    assert main(flags(run_folder, references="first")) == 0
    losses = [
        entry["loss"] if "loss" in entry else entry["train_loss"]
        for entry in json.loads((run_folder / "out" / "trainer_state.json").read_text())["log_history"]
    ]
    assert losses
    model = ClipCapForConditionalGeneration.from_pretrained(run_folder / "out").eval()
    processor = ClipCapProcessor.from_pretrained(run_folder / "out")
    names = [captions[0] for captions in load_emoji("validation").select(range(0, 190, 12))["captions"]]
    embeds = embed_captions(load_text_tower(str(run_folder / "clip")), names, progress=False)
    captions = caption_embeds(model, processor, embeds, progress=False, max_new_tokens=40)
    untrained = ClipCapForConditionalGeneration.from_pretrained(run_folder / "captioner").eval()
    before = caption_embeds(untrained, processor, embeds, progress=False, max_new_tokens=40)
    assert sum(found == name for found, name in zip(before, names)) == 0
    assert sum(found == name for found, name in zip(captions, names)) >= len(names) / 2


def test_bad_settings(run_folder, capsys, make_model, processor):
    assert main(flags(run_folder, text_tower=run_folder / "captioner")) == 1
    assert "the text tower must be a CLIP's" in capsys.readouterr().err
    make_model("clip", normalize_clip_embeds=False).save_pretrained(run_folder / "captioner")
    assert main(flags(run_folder)) == 1
    assert "`text_only` needs a captioner with `normalize_clip_embeds`" in capsys.readouterr().err
