"""The captioners' greedy search finds the same captions as transformers' own, and lets ended captions leave."""

import pytest
import torch
from clipcap_hf import EMOJI_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import embed_images
from clipcap_hf.data import load_emoji
from tiny_inputs import tiny_language_model
from transformers import StoppingCriteria


def rows_of_each_step(model, **kwargs) -> tuple[torch.Tensor, list[int]]:
    """Caption, and count the rows that the language model reads at each step."""
    rows = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(len(inputs["inputs_embeds"])), with_kwargs=True
    )
    found = model.generate(**kwargs)
    hook.remove()
    return found, rows


def stock(model, monkeypatch, **kwargs) -> tuple[torch.Tensor, list[int]]:
    with monkeypatch.context() as patch:
        patch.setattr("clipcap_hf.model.generation_clipcap.may_search_fast", lambda *_: False)
        return rows_of_each_step(model, **kwargs)


@pytest.mark.parametrize("text", ["gpt2", "llama", "mistral", "opt"])
@pytest.mark.parametrize("pad_token_id", [0, 7, 120])
def test_equals_transformers(make_model, monkeypatch, text, pad_token_id):
    model = make_model(None, text_config=tiny_language_model(text))
    embeds = 30 * torch.randn(24, 16, generator=torch.Generator().manual_seed(4))
    settings = {"pad_token_id": pad_token_id, "max_new_tokens": 20}
    endless = model.generate(clip_embeds=embeds, eos_token_id=None, **settings)[:, model.config.prefix_length :]
    settings["eos_token_id"] = endless[torch.arange(0, 24, 4), torch.arange(0, 18, 3)].tolist()  # of a few captions
    found, rows = rows_of_each_step(model, clip_embeds=embeds, **settings)
    expected, stock_rows = stock(model, monkeypatch, clip_embeds=embeds, **settings)
    assert torch.equal(found, expected)
    assert len(rows) == len(stock_rows) and set(stock_rows) == {24}
    assert sorted(rows, reverse=True) == rows and rows[-1] < 24


def test_captions_that_never_end_and_prompts(make_model, processor, monkeypatch):
    model = make_model("vit", mapping_type="transformer")
    inputs = processor(text=["a red", "two", "a small white"], images=torch.rand(3, 3, 40, 40), return_tensors="pt")
    for eos_token_id in (None, list(range(100, 200))):
        settings = {**inputs, "max_new_tokens": 30, "eos_token_id": eos_token_id, "pad_token_id": 3}
        assert torch.equal(model.generate(**settings), stock(model, monkeypatch, **settings)[0])


def test_captions_of_emoji(monkeypatch):
    model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI).eval()
    processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    images = load_emoji("new_caption").select(range(0, 900, 15))["image"]
    embeds = embed_images(model, processor, images, progress=False)
    found, rows = rows_of_each_step(model, clip_embeds=embeds)
    expected, stock_rows = stock(model, monkeypatch, clip_embeds=embeds)
    assert torch.equal(found, expected)
    assert sum(rows) < 0.8 * sum(stock_rows)


class EveryThirdStep(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == 5  # it relies on the rows of the batch
        return torch.arange(5) < input_ids.shape[1] - 6


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"use_cache": False},
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"stopping_criteria": [EveryThirdStep()]},
    ],
)
def test_leaves_the_rest_to_transformers(make_model, monkeypatch, settings):
    model = make_model(None)
    settings = {"clip_embeds": torch.randn(5, 16), "max_new_tokens": 9, "eos_token_id": [*range(100, 130)], **settings}
    found, rows = rows_of_each_step(model, **settings, pad_token_id=0)
    expected, _ = stock(model, monkeypatch, **settings, pad_token_id=0)
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))
    assert set(rows) == {5}
