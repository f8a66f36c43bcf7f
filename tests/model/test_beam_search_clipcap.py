"""The captioners' beam search finds the same captions as transformers' own."""

import pytest
import torch
from clipcap_hf import EMOJI_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import embed_images
from clipcap_hf.data import load_emoji
from clipcap_hf.model import beam_search_clipcap


@pytest.fixture
def searched(monkeypatch):
    """Record the calls of our own beam search."""
    calls = []
    fast = beam_search_clipcap.fast_beam_search

    def count(*args, **kwargs):
        found = fast(*args, **kwargs)
        calls.append(1)
        return found

    monkeypatch.setattr("clipcap_hf.model.generation_clipcap.fast_beam_search", count)
    return calls


def both(model, monkeypatch, **kwargs):
    fast = model.generate(**kwargs)
    with monkeypatch.context() as patch:
        patch.setattr("clipcap_hf.model.generation_clipcap.may_search_fast", lambda *_: False)
        stock = model.generate(**kwargs)
    return fast, stock


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.5, 2.0])
def test_equals_transformers(make_model, monkeypatch, searched, early_stopping, length_penalty):
    model = make_model()
    ends = list(range(100, 130))  # many, so that captions differ in length
    for number, beams in enumerate((2, 5)):
        fast, stock = both(
            model,
            monkeypatch,
            pixel_values=torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(number)),
            num_beams=beams,
            num_return_sequences=beams,
            eos_token_id=ends[: 30 // beams],
            pad_token_id=7,
            max_new_tokens=12,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
        )
        assert torch.equal(fast, stock)
    assert len(searched) == 2


def test_prompts_and_other_caches_of_ends(make_model, processor, monkeypatch, searched):
    model = make_model("vit", mapping_type="transformer")
    inputs = processor(text=["a red", "two", "a small white"], images=torch.rand(3, 3, 40, 40), return_tensors="pt")
    fast, stock = both(model, monkeypatch, **inputs, num_beams=3, max_new_tokens=9)
    assert torch.equal(fast, stock)
    fast, stock = both(model, monkeypatch, **inputs, num_beams=3, max_new_tokens=9, eos_token_id=None)
    assert torch.equal(fast, stock) and len(searched) == 2


def test_captions_of_emoji(monkeypatch, searched):
    model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI).eval()
    processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    embeds = embed_images(
        model, processor, load_emoji("new_caption").select(range(0, 900, 15))["image"], progress=False
    )
    fast, stock = both(model, monkeypatch, clip_embeds=embeds, num_beams=5, num_return_sequences=2)
    assert torch.equal(fast, stock) and len(searched) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"do_sample": True},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
        {"cache_implementation": "static"},
        {"eos_token_id": list(range(1, 150))},
    ],
)
def test_leaves_the_rest_to_transformers(make_model, monkeypatch, searched, settings):
    model = make_model()
    kwargs = {"num_beams": 2, "max_new_tokens": 3, "pad_token_id": 0, **settings}
    torch.manual_seed(1)  # some strategies sample
    found = model.generate(pixel_values=torch.randn(2, 3, 32, 32), **kwargs)
    assert not searched
    monkeypatch.setattr("clipcap_hf.model.generation_clipcap.may_search_fast", lambda *_: False)
    torch.manual_seed(1)
    stock = model.generate(pixel_values=torch.randn(2, 3, 32, 32), **kwargs)
    assert torch.equal(getattr(found, "sequences", found), getattr(stock, "sequences", stock))


def test_official_beam_search_from_pixels(make_model):
    model = make_model()
    pixels = torch.randn(3, 3, 32, 32)
    settings = {"custom_generate": beam_search_clipcap.official_beam_search, "num_beams": 3, "max_new_tokens": 6}
    from_embeds = model.generate(clip_embeds=model.get_clip_embeds(pixels), **settings)
    assert torch.equal(model.generate(pixel_values=pixels, **settings), from_embeds)
