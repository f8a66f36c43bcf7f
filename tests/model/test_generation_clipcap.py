import pytest
import torch
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration
from clipcap_hf.model.beam_search_clipcap import official_beam_search
from transformers import GPT2Config, LogitsProcessor, LogitsProcessorList


PREFIX, VOCAB, STOP, PAD = 4, 200, 13, 199
SETTINGS = dict(
    custom_generate=official_beam_search,
    num_beams=4,
    num_return_sequences=4,
    max_new_tokens=12,
    eos_token_id=list(range(STOP, 30)),
    pad_token_id=PAD,
    return_dict_in_generate=True,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)  # a seed with captions of many lengths
    text_config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=PAD, eos_token_id=PAD
    )
    config = ClipCapConfig(text_config=text_config, clip_embed_dim=16, prefix_length=PREFIX)
    model = ClipCapForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model


@pytest.fixture(scope="module")
def embeds():
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture(scope="module")
def prompts(model):
    """Build prefix placeholders and prompts of 0 to 5 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(2)
    rows = [
        [model.config.image_token_id] * PREFIX + torch.randint(20, VOCAB - 1, (n,), generator=generator).tolist()
        for n in (3, 0, 5, 1, 2, 5)
    ]
    longest = max(map(len, rows))
    input_ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return input_ids, mask


def caption_lengths(captions: torch.Tensor) -> list[int]:
    """Cut after the first stop token."""
    stops = torch.isin(captions, torch.tensor(SETTINGS["eos_token_id"]))
    return [int(row.nonzero()[0]) + 1 if row.any() else len(row) for row in stops]


@pytest.fixture(scope="module")
def batched(model, embeds, prompts):
    input_ids, mask = prompts
    return model.generate(input_ids=input_ids, attention_mask=mask, clip_embeds=embeds, **SETTINGS)


def test_the_data_tests_something(batched, prompts):
    lengths = caption_lengths(batched.sequences[:, prompts[0].shape[1] :])
    assert len(set(lengths)) > 3 and max(lengths) == SETTINGS["max_new_tokens"]


def test_left_padded_batch_equals_one_by_one(model, embeds, prompts, batched):
    width = prompts[0].shape[1]
    for row, (input_ids, mask) in enumerate(zip(*prompts)):
        alone = model.generate(input_ids=input_ids[mask == 1][None], clip_embeds=embeds[row : row + 1], **SETTINGS)
        rows = slice(4 * row, 4 * row + 4)
        captions, expected = batched.sequences[rows, width:], alone.sequences[:, int(mask.sum()) :]
        assert torch.equal(captions[:, : expected.shape[1]], expected)
        assert (captions[:, expected.shape[1] :] == PAD).all()
        torch.testing.assert_close(batched.sequences_scores[rows], alone.sequences_scores, atol=1e-5, rtol=0)


def test_scores_are_mean_log_probabilities(model, embeds, prompts, batched):
    input_ids, mask = (tensor.repeat_interleave(4, dim=0) for tensor in prompts)
    captions = batched.sequences[:, input_ids.shape[1] :]
    mask = torch.cat([mask, torch.ones_like(captions)], dim=1)
    with torch.no_grad():
        logits = model(
            input_ids=batched.sequences,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            clip_embeds=embeds.repeat_interleave(4, dim=0),
        ).logits[:, input_ids.shape[1] - 1 : -1]
    log_probs = logits.log_softmax(-1).gather(-1, captions.unsqueeze(-1)).squeeze(-1)
    scores = [row[:length].mean() for row, length in zip(log_probs, caption_lengths(captions))]
    torch.testing.assert_close(batched.sequences_scores, torch.stack(scores), atol=1e-5, rtol=0)
    by_image = batched.sequences_scores.view(-1, 4)
    assert (by_image[:, :-1] >= by_image[:, 1:]).all()


def test_num_return_sequences(model, embeds):
    best_first = model.generate(clip_embeds=embeds, **SETTINGS)
    for count in (1, 2):
        fewer = model.generate(clip_embeds=embeds, **{**SETTINGS, "num_return_sequences": count})
        assert torch.equal(fewer.sequences.view(6, count, -1), best_first.sequences.view(6, 4, -1)[:, :count])
        assert torch.equal(fewer.sequences_scores.view(6, count), best_first.sequences_scores.view(6, 4)[:, :count])


def test_returns_ids_without_return_dict(model, embeds):
    settings = {**SETTINGS, "return_dict_in_generate": False}
    sequences = model.generate(clip_embeds=embeds, **settings)
    assert torch.equal(sequences, model.generate(clip_embeds=embeds, **SETTINGS).sequences)


def test_one_beam_is_greedy(model, embeds):
    settings = {**SETTINGS, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
    greedy = {key: value for key, value in settings.items() if key != "custom_generate"}
    assert torch.equal(model.generate(clip_embeds=embeds, **settings), model.generate(clip_embeds=embeds, **greedy))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches(model, embeds, cache):
    outputs = model.generate(clip_embeds=embeds, cache_implementation=cache, **SETTINGS)
    assert torch.equal(outputs.sequences, model.generate(clip_embeds=embeds, **SETTINGS).sequences)


def test_each_prompt_is_read_once_and_stopped_captions_never(model, embeds, monkeypatch):
    rows = []
    forward = model.language_model.forward

    def counting(*args, inputs_embeds, **kwargs):
        rows.append(len(inputs_embeds))
        return forward(*args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(model.language_model, "forward", counting)
    model.generate(clip_embeds=embeds, **SETTINGS)
    assert rows[0] == len(embeds)
    # A live caption can displace a finished one, so the number of live ones may rise again, up to all of them.
    assert max(rows) <= 4 * len(embeds) and sum(rows[1:]) < 0.9 * 4 * len(embeds) * len(rows[1:])


def test_two_images_in_a_prompt(model, embeds):
    image = model.config.image_token_id
    input_ids = torch.tensor([[image] * PREFIX + [50, 60] + [image] * PREFIX] * 3)
    together = model.generate(input_ids=input_ids, clip_embeds=embeds, **SETTINGS)
    for row, pair in enumerate(embeds.split(2)):
        alone = model.generate(input_ids=input_ids[:1], clip_embeds=pair, **SETTINGS).sequences
        assert torch.equal(together.sequences[4 * row : 4 * row + 4, : alone.shape[1]], alone)
    input_ids[0, :PREFIX] = 70
    with pytest.raises(ValueError, match="the same number of images in each prompt"):
        model.generate(input_ids=input_ids, clip_embeds=embeds[:5], **SETTINGS)


class BanEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == 24  # all beams of all images
        scores[:, ::2] = -torch.inf
        return scores


def test_logits_processors_are_obeyed(model, embeds):
    processors = LogitsProcessorList([BanEven()])
    outputs = model.generate(clip_embeds=embeds, logits_processor=processors, **SETTINGS)
    captions = outputs.sequences[:, PREFIX:]
    for caption, length in zip(captions, caption_lengths(captions)):
        assert (caption[:length] % 2 == 1).all()
    allowed = model.generate(
        clip_embeds=embeds,
        prefix_allowed_tokens_fn=lambda image, ids: [20 + image, 40 + image, 60 + image, 13],
        **SETTINGS,
    )
    for image, captions in enumerate(allowed.sequences[:, PREFIX:].view(6, 4, -1)):
        assert set(captions.flatten().tolist()) <= {20 + image, 40 + image, 60 + image, 13, PAD}


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"do_sample": True}, "does not sample"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"use_cache": False}, "cache"),
    ],
)
def test_settings_against_the_rule(model, embeds, setting, message):
    with pytest.raises(ValueError, match=message):
        model.generate(clip_embeds=embeds, **{**SETTINGS, **setting})
