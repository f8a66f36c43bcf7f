"""`generate()` with all decoding strategies."""

import pytest
import torch
import transformers
from packaging import version
from tiny_inputs import left_padded, pixels, prompt_ids


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda settings: "-".join(settings) or "greedy",
)
def test_generate_from_pixels_equals_generate_from_embeddings(make_model, settings):
    model = make_model()
    images = pixels(model)
    captions = []
    for kwargs in ({"pixel_values": images}, {"clip_embeds": model.get_clip_embeds(images)}):
        torch.manual_seed(3)
        captions.append(model.generate(**kwargs, **settings))
    assert torch.equal(*captions)
    assert len(captions[0]) == 2 * settings.get("num_return_sequences", 1)
    assert (captions[0][:, :4] == model.config.image_token_id).all()
    assert (captions[0][:, 4:] < model.config.text_config.vocab_size).all()
    assert captions[0].shape[1] <= 4 + 8
    assert not torch.equal(captions[0][0], captions[0][-1])


def test_greedy_takes_the_likeliest_token(make_model):
    model = make_model()
    images = pixels(model, 1)
    input_ids = prompt_ids(model)
    for _ in range(8):
        token = model(input_ids=input_ids, pixel_values=images).logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
    assert torch.equal(model.generate(pixel_values=images, eos_token_id=None), input_ids)


def test_ways_of_decoding_that_must_not_change_greedy(make_model):
    model = make_model()
    images = pixels(model)
    expected = model.generate(pixel_values=images)
    for settings in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(pixel_values=images, **settings), expected), settings


@pytest.mark.parametrize("source", ["pixel_values", "clip_embeds"])
def test_chunked_prefill_keeps_the_image_or_says_so(make_model, source):
    model = make_model()
    images = pixels(model)
    if source == "clip_embeds":
        images = model.get_clip_embeds(images)
    if version.parse(transformers.__version__) < version.parse("5.23.0"):
        with pytest.raises(ValueError, match="`prefill_chunk_size` needs transformers 5.23"):
            model.generate(**{source: images}, prefill_chunk_size=3)
    else:
        expected = model.generate(**{source: images})
        assert torch.equal(model.generate(**{source: images}, prefill_chunk_size=3), expected)
        assert not torch.equal(expected[0], expected[1])


def test_beam_search_finds_likelier_captions(make_model):
    model = make_model()
    images = pixels(model, 4)

    def mean_logprobs(sequences):
        logprobs = model(input_ids=sequences, pixel_values=images).logits[:, 3:-1].log_softmax(-1)
        return logprobs.gather(-1, sequences[:, 4:, None]).squeeze(-1).mean(-1)

    settings = {"pixel_values": images, "eos_token_id": None, "max_new_tokens": 5}
    beams = mean_logprobs(model.generate(**settings, num_beams=8))
    greedy = mean_logprobs(model.generate(**settings))
    assert (beams >= greedy - 1e-5).all() and (beams > greedy + 1e-3).any()
    several = model.generate(**settings, num_beams=4, num_return_sequences=3)
    assert len(several) == 12
    assert all(len({tuple(row) for row in several[i : i + 3].tolist()}) == 3 for i in range(0, 12, 3))


def test_sampling_follows_the_seed(make_model):
    model = make_model()
    images = pixels(model)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(pixel_values=images, do_sample=True, num_return_sequences=4, eos_token_id=None)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert len({tuple(row) for row in sample(1)[:4].tolist()}) > 1


def test_prompt_is_continued(make_model):
    model = make_model()
    images = pixels(model, 1)
    free = model.generate(pixel_values=images, eos_token_id=None)
    forced = model.generate(prompt_ids(model, 11, 12), pixel_values=images, eos_token_id=None)
    assert forced[0, 4:6].tolist() == [11, 12] and forced.shape[1] == 4 + 2 + 8
    # Continuing the model's own words gives the same caption.
    continued = model.generate(free[:, :7], pixel_values=images, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(continued, free)


@pytest.mark.parametrize("source", ["pixel_values", "clip_embeds"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_of_unequal_prompts_equals_one_by_one(make_model, source, num_beams):
    model = make_model()
    images = pixels(model, 3)
    if source == "clip_embeds":
        images = model.get_clip_embeds(images)
    prompts = [(5, 6, 7, 8), (), (9,)]
    settings = {"num_beams": num_beams, "eos_token_id": None}
    together = model.generate(**left_padded(model, *prompts), **{source: images}, **settings)
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt_ids(model, *prompt), **{source: images[i : i + 1]}, **settings)
        assert torch.equal(together[i, 4 - len(prompt) :], alone[0])


def test_rows_end_at_the_end_token(make_model):
    model = make_model()
    images = pixels(model, 4)
    free = model.generate(pixel_values=images, eos_token_id=None)
    end = int(free[0, 6])
    stopped = model.generate(pixel_values=images, eos_token_id=end, pad_token_id=1)
    place = free[0].tolist().index(end)
    assert torch.equal(stopped[0, : place + 1], free[0, : place + 1])
    assert (stopped[0, place + 1 :] == 1).all()


def test_labels_of_a_training_batch_are_ignored(make_model):
    model = make_model()
    images = pixels(model)
    expected = model.generate(pixel_values=images)
    assert torch.equal(model.generate(pixel_values=images, labels=torch.zeros(2, 9, dtype=torch.long)), expected)


def test_assisted_decoding_changes_nothing(make_model):
    model = make_model()
    images = pixels(model, 1)
    assistant = make_model()
    expected = model.generate(pixel_values=images, eos_token_id=None)
    assert torch.equal(model.generate(pixel_values=images, assistant_model=assistant, eos_token_id=None), expected)


def test_guidance_scale(make_model):
    model = make_model()
    images = pixels(model, 1)
    # Against no image (just the last token of the prompt): a strong scale changes the caption, 1 does not.
    plain = model.generate(prompt_ids(model, 5), pixel_values=images, eos_token_id=None)
    guided = model.generate(prompt_ids(model, 5), pixel_values=images, eos_token_id=None, guidance_scale=5.0)
    neutral = model.generate(prompt_ids(model, 5), pixel_values=images, eos_token_id=None, guidance_scale=1.0)
    assert torch.equal(plain, neutral)
    assert not torch.equal(plain, guided)


def test_generate_without_a_tower(make_model):
    model = make_model(None)
    assert model.generate(clip_embeds=torch.randn(3, 16)).shape[0] == 3
    with pytest.raises(ValueError, match="no vision tower.*pass `clip_embeds`"):
        model.generate(pixel_values=torch.randn(1, 3, 32, 32))


def test_generate_in_bfloat16_takes_embeddings_of_any_type(make_model):
    model = make_model().to(torch.bfloat16)
    images = pixels(model)
    assert model.generate(pixel_values=images).shape[0] == 2
    embeds = model.get_clip_embeds(images)
    assert torch.equal(model.generate(clip_embeds=embeds.float()), model.generate(clip_embeds=embeds))


@pytest.mark.parametrize(
    "setting", [{"prompt_lookup_num_tokens": 3}, {"token_healing": True}, {"encoder_repetition_penalty": 1.2}]
)
def test_generation_that_looks_prompts_up_in_the_vocabulary(make_model, setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` looks the prompt's tokens up"):
        make_model().generate(clip_embeds=torch.randn(1, 16), **setting)
