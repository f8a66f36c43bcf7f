"""Prepacked weights give the outputs of ordinary ones, also after the weights change."""

import copy
import platform

import pytest
import torch
from clipcap_hf import EMOJI_MINI, ClipCapForConditionalGeneration, ClipCapProcessor, prepack_weights, prepacking
from clipcap_hf.captioning import embed_images
from clipcap_hf.data import load_emoji
from torch import nn
from transformers.pytorch_utils import Conv1D


pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="packs for x86 only")


def packed_layers(model: nn.Module) -> int:
    return sum(getattr(layer.forward, "packed", None) is not None for layer in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(48, 70), lambda: nn.Linear(48, 33, bias=False), lambda: Conv1D(70, 48)]
)
@torch.no_grad()
def test_outputs(make, dtype):
    layer = make().to(dtype)
    inputs = torch.randn(3, 5, 48, dtype=dtype)
    expected = layer(inputs)
    # Not every processor has instructions for bfloat16; torch says so itself.
    packs = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert prepack_weights(layer) == packs
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(layer(inputs), expected, atol=tolerance, rtol=tolerance)
    assert packed_layers(layer) == packs
    assert layer(inputs[:, :0]).shape == (3, 0, expected.shape[-1])


@torch.no_grad()
def test_a_processor_without_bfloat16(monkeypatch):
    """With AVX2 alone, oneDNN refuses it; this is imitated where there is more."""
    original = prepacking._pack

    def pack(rows, batch):
        if rows.dtype == torch.bfloat16:
            raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq")
        return original(rows, batch)

    monkeypatch.setattr(prepacking, "_pack", pack)
    assert prepack_weights(nn.Linear(16, 16, dtype=torch.bfloat16)) == 0
    layer = nn.Linear(16, 16)
    assert prepack_weights(layer) == 1
    layer(torch.randn(4, 16))
    layer.to(torch.bfloat16)
    inputs = torch.randn(4, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))


@torch.no_grad()
def test_changed_weights_are_laid_out_again():
    layer = nn.Linear(16, 16)
    prepack_weights(layer)
    inputs = torch.randn(4, 16)
    layer(inputs)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(inputs), inputs @ layer.weight.t() + layer.bias)
    layer.weight = nn.Parameter(torch.randn(16, 16))
    torch.testing.assert_close(layer(inputs), inputs @ layer.weight.t() + layer.bias)
    layer.load_state_dict({"weight": torch.ones(16, 16), "bias": torch.zeros(16)})
    torch.testing.assert_close(layer(inputs), inputs.sum(1, keepdim=True).expand(4, 16))


def test_training_is_as_before():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), Conv1D(4, 16))
    packed = copy.deepcopy(plain)
    prepack_weights(packed)
    inputs = torch.randn(6, 16)
    for model in (plain, packed):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            with torch.no_grad():
                model(inputs)  # lays the weights out
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in packed.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name]), name


@torch.no_grad()
def test_autocast_and_copies():
    layer = nn.Linear(16, 16)
    inputs = torch.randn(4, 16)
    prepack_weights(layer)
    expected = layer(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    copied = copy.deepcopy(layer)
    assert packed_layers(copied) == 0
    copied.weight.zero_()
    assert not torch.equal(copied(inputs), expected) and torch.equal(layer(inputs), expected)


def test_captions_are_the_same():
    model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI).eval()
    processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    images = load_emoji("new_caption").select(range(0, 900, 15))["image"]
    embeds = embed_images(model, processor, images, progress=False)
    expected = [model.generate(clip_embeds=embeds, num_beams=beams) for beams in (1, 3)]
    assert prepack_weights(model) > 10
    for beams, captions in zip((1, 3), expected):
        assert torch.equal(model.generate(clip_embeds=embeds, num_beams=beams), captions)
    assert packed_layers(model.language_model) > 10


def test_saved_as_before(tmp_path):
    model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI).eval()
    names = list(model.state_dict())
    prepack_weights(model)
    model.generate(clip_embeds=torch.randn(1, model.config.clip_embed_dim), max_new_tokens=2)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
