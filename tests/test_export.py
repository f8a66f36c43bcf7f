"""Exported captioners give the same captions as the originals."""

import clipcap_hf
import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.cli import main
from clipcap_hf.data import load_emoji
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture(scope="module")
def onnx_packages():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def emoji_mini():
    model = ClipCapForConditionalGeneration.from_pretrained(clipcap_hf.EMOJI_MINI)
    return model, ClipCapProcessor.from_pretrained(clipcap_hf.EMOJI_MINI)


@pytest.fixture(scope="module")
def drawings():
    return load_emoji("validation")[::8]["image"]


@pytest.fixture(scope="module")
def emoji_onnx(tmp_path_factory, onnx_packages):
    folder = tmp_path_factory.mktemp("onnx") / "emoji-mini"
    assert main(["export", "onnx", "emoji-mini", "--out", str(folder)]) == 0
    return folder


def captions_of(model, processor, images, prompt=None, **kwargs) -> list[str]:
    inputs = processor(images=images, text=prompt, return_tensors="pt")
    texts = processor.batch_decode(model.generate(**inputs, **kwargs), skip_special_tokens=True)
    return [text.strip() for text in texts]


def test_onnx_captions_are_those_of_generate(emoji_onnx, emoji_mini, drawings):
    from clipcap_hf.export import OnnxCaptioner

    captioner = OnnxCaptioner(emoji_onnx)
    expected = captions_of(*emoji_mini, drawings)
    assert len(set(expected)) > 10
    assert captioner(drawings, batch_size=7) == expected
    assert captioner(drawings[:1]) == expected[:1]
    assert captioner([]) == []
    prompted = captions_of(*emoji_mini, drawings, prompt="woman")
    assert all(caption.startswith("woman") for caption in prompted)
    assert captioner(drawings, prompt="woman") == prompted
    model, processor = emoji_mini
    template = "man <image> in"
    templated = ClipCapProcessor(
        processor.image_processor, processor.tokenizer, prefix_length=4, prompt_template=template
    )
    captioner.processor = templated
    assert captioner(drawings) == captions_of(model, templated, drawings) != expected
    captioner.processor = processor
    assert captioner(drawings, max_new_tokens=2) == captions_of(*emoji_mini, drawings, max_new_tokens=2)
    with pytest.raises(ValueError, match="context of 64 leaves room for 60"):
        captioner(drawings[:1], max_new_tokens=61)
    with pytest.raises(ValueError, match="takes images"):
        captioner(clip_embeds=torch.zeros(1, 384).numpy())


@pytest.mark.slow
def test_onnx_of_llama_with_transformer_mapping_and_no_tower(tmp_path, onnx_packages, make_model, embeds_processor):
    from clipcap_hf.export import OnnxCaptioner, export_onnx

    text_config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = make_model(None, text_config=text_config, mapping_type="transformer").train()
    model.generation_config.eos_token_id = None
    export_onnx(model, embeds_processor, tmp_path / "onnx")
    assert model.training
    model.eval()
    captioner = OnnxCaptioner(tmp_path / "onnx")
    clip_embeds = torch.randn(5, 16)
    prefix = model.get_image_features(clip_embeds=clip_embeds).pooler_output
    (onnx_prefix,) = captioner.encoder.run(None, {"clip_embeds": clip_embeds.numpy()})
    torch.testing.assert_close(torch.from_numpy(onnx_prefix), prefix, atol=1e-5, rtol=1e-4)
    expected = model.generate(clip_embeds=clip_embeds)[:, 4:]
    assert len(expected.unique(dim=0)) > 1
    assert captioner.generate(onnx_prefix, torch.zeros(5, 0, dtype=torch.long).numpy()).tolist() == expected.tolist()


@pytest.mark.slow
def test_int8_is_smaller_and_nearly_as_good(tmp_path, emoji_onnx, emoji_mini, drawings):
    from clipcap_hf.export import OnnxCaptioner, export_onnx

    export_onnx(*emoji_mini, tmp_path / "int8", int8=True)
    sizes = [
        sum(file.stat().st_size for file in folder.glob("decoder*")) for folder in (tmp_path / "int8", emoji_onnx)
    ]
    assert sizes[0] < 0.6 * sizes[1]
    got = OnnxCaptioner(tmp_path / "int8")(drawings)
    same = sum(a == b for a, b in zip(got, captions_of(*emoji_mini, drawings)))
    assert same >= 0.9 * len(drawings)


def test_refuses_what_it_cannot_export(tmp_path, onnx_packages, make_model, processor, capsys):
    from clipcap_hf.export import OnnxCaptioner, export_onnx

    model = make_model()
    with pytest.raises(ValueError, match="exists already"):
        export_onnx(model, processor, tmp_path)
    with pytest.raises(ValueError, match="float32"):
        export_onnx(model.half(), processor, tmp_path / "half")
    with pytest.raises(ValueError, match="no encoder.onnx and no decoder.onnx"):
        OnnxCaptioner(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prompt_embeddings_caption_with_the_language_model_alone(tmp_path, emoji_mini, drawings):
    """An engine that takes prompt embeddings gets the prefix, and the language model as a stock checkpoint."""
    model, processor = emoji_mini
    model.language_model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock).__module__ == "transformers.models.gpt2.modeling_gpt2"
    pixel_values = processor(images=drawings, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        prefix = model.get_image_features(pixel_values).pooler_output
    mask = torch.ones(prefix.shape[:2], dtype=torch.long)
    ids = stock.generate(inputs_embeds=prefix, attention_mask=mask, max_new_tokens=40, do_sample=False)
    captions = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert captions == captions_of(model, processor, drawings)
