"""Inputs that the model refuses, with clear errors."""

import copy

import pytest
import torch
from tiny_inputs import pixels, prompt_ids


def test_embeddings_of_the_wrong_shape(make_model):
    model = make_model()
    for call in (model.generate, lambda **kwargs: model(input_ids=prompt_ids(model), **kwargs)):
        with pytest.raises(
            ValueError, match=r"`clip_embeds` must have the shape \(batch, 16\).*\(1, 24\).*another CLIP"
        ):
            call(clip_embeds=torch.randn(1, 24))
        with pytest.raises(ValueError, match=r"`clip_embeds` must have the shape \(batch, 16\).*got \(16,\)"):
            call(clip_embeds=torch.randn(16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_numbers(make_model, value):
    model = make_model()
    embeds = torch.randn(3, 16)
    embeds[1, 2] = value
    with pytest.raises(
        ValueError, match=r"`clip_embeds` hold NaN or infinity in rows \[1\].*embed those images again"
    ):
        model.generate(clip_embeds=embeds)


def test_pixels_and_embeddings_at_once(make_model):
    model = make_model()
    for call in (model.generate, model.get_image_features, lambda **kw: model(input_ids=prompt_ids(model), **kw)):
        with pytest.raises(ValueError, match="exactly one of `pixel_values` and `clip_embeds`"):
            call(clip_embeds=torch.randn(1, 16), pixel_values=pixels(model, 1))


def test_prompt_longer_than_the_context(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="70 tokens long.*context is 64.*shorten the prompt"):
        model.generate(prompt_ids(model, *[5] * 66), pixel_values=pixels(model, 1))


def test_max_new_tokens_beyond_the_context(make_model):
    model = make_model()
    images = pixels(model, 1)
    with pytest.raises(ValueError, match="`max_new_tokens` is 61, but after 4 tokens.*64 leaves room for 60"):
        model.generate(pixel_values=images, max_new_tokens=61)
    generation_config = copy.deepcopy(model.generation_config)
    generation_config.max_new_tokens = 61
    with pytest.raises(ValueError, match="`max_new_tokens` is 61"):
        model.generate(pixel_values=images, generation_config=generation_config)
    assert model.generate(pixel_values=images, max_new_tokens=60, eos_token_id=None).shape == (1, 64)


def test_placeholders_must_match_the_images(make_model):
    model = make_model()
    with pytest.raises(ValueError, match=r"hold 5 image placeholders \(id 290\).*need 4.*`prefix_length` \(4\)"):
        model(input_ids=prompt_ids(model, 290), pixel_values=pixels(model, 1))
    with pytest.raises(ValueError, match="hold 4 image placeholders.*2 images.*need 8"):
        model.generate(prompt_ids(model), pixel_values=pixels(model, 2))
    with pytest.raises(ValueError, match=r"hold 0 image placeholders.*`image_token_id` \(290\)"):
        model(input_ids=prompt_ids(model).fill_(291), pixel_values=pixels(model, 1))
    with pytest.raises(ValueError, match="no image: pass `pixel_values` or `clip_embeds`"):
        model.generate(prompt_ids(model, 5))
    with pytest.raises(ValueError, match="need `input_ids`"):
        model(inputs_embeds=torch.randn(1, 4, 32), pixel_values=pixels(model, 1))
