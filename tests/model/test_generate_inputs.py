"""Inputs of `generate()`: padding, labels, lengths, embeddings, placeholders and NaN."""

import copy
import inspect

import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapConfig, ClipCapForConditionalGeneration, official_beam_search
from torch.nn import functional as F
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel


PREFIX, IMAGE = 4, 60


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    text_config = GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    text_config.initializer_range = 0.5
    return ClipCapForConditionalGeneration(
        ClipCapConfig(text_config=text_config, clip_embed_dim=16, prefix_length=PREFIX)
    ).eval()


@pytest.fixture(scope="module")
def embeds():
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(0)) * 3


def prompt(*tokens, rows=1, placeholder=IMAGE):
    return torch.tensor([[placeholder] * PREFIX + list(tokens)] * rows)


# -- batched = alone, for every padding and stop token


@pytest.mark.parametrize("pad_token_id", [0, 1, 13, 59])
@pytest.mark.parametrize("stops", [[13, 17, 21, 29, 33], [0], [0, 13, 17], [13, 17, 0], 13], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "repetition_penalty": 1.3},
        {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 3, "custom_generate": official_beam_search},
    ],
    ids=["greedy", "beams", "two of each", "processors", "scores", "official"],
)
def test_batched_is_alone_for_every_padding_and_stop_token(model, embeds, settings, stops, pad_token_id):
    settings = {**settings, "max_new_tokens": 10, "eos_token_id": stops, "pad_token_id": pad_token_id}

    def captions(clip_embeds):
        outputs = model.generate(clip_embeds=clip_embeds, **settings)
        return getattr(outputs, "sequences", outputs)[:, PREFIX:]

    together, copies = captions(embeds[:6]), settings.get("num_return_sequences", 1)
    assert len({tuple(row) for row in together.tolist()}) > 3
    stops = torch.tensor(stops).flatten()
    for row, embed in enumerate(embeds[:6]):
        alone = captions(embed[None])
        batched = together[row * copies : (row + 1) * copies]
        assert torch.equal(batched[:, : alone.shape[1]], alone)
        assert (batched[:, alone.shape[1] :] == pad_token_id).all()
    ends = torch.isin(together, stops).long()
    assert (together[ends.cumsum(1) - ends > 0] == pad_token_id).all()


# -- lengths


@pytest.mark.parametrize("num_beams", [1, 2])
def test_max_length_is_obeyed(model, embeds, num_beams):
    own = copy.deepcopy(model.generation_config)
    model.generation_config.max_new_tokens = 8  # as in captioners from pretrained parts
    settings = {"clip_embeds": embeds[:2], "eos_token_id": None, "num_beams": num_beams}
    try:
        assert model.generate(**settings).shape[1] == PREFIX + 8
        assert model.generate(**settings, max_length=PREFIX + 3).shape[1] == PREFIX + 3
        assert model.generate(**settings, max_length=PREFIX + 20).shape[1] == PREFIX + 20
        assert model.generate(**settings, max_length=PREFIX + 20, max_new_tokens=2).shape[1] == PREFIX + 2
        given = GenerationConfig(max_length=PREFIX + 5, num_beams=num_beams)
        assert model.generate(clip_embeds=embeds[:2], generation_config=given).shape[1] <= PREFIX + 5
        with pytest.raises(ValueError, match="`max_length` is 4, but prefix and prompt are 4 tokens long"):
            model.generate(**settings, max_length=PREFIX)
        with pytest.raises(ValueError, match="`max_new_tokens` is 96.*64 leaves room for 60"):
            model.generate(**settings, max_length=100)
    finally:
        model.generation_config = own


# -- training batches


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("cloned_labels", [False, True])
def test_a_training_batch_is_captioned_from_its_prompts(make_model, processor, captions, num_beams, cloned_labels):
    model = make_model(None).eval()
    torch.manual_seed(0)
    rows = [{"clip_embeds": torch.randn(16), "captions": text} for text in captions]
    batch = dict(CaptioningCollator(processor)(rows))
    if cloned_labels:  # placeholders in labels count as -100
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    settings = {"max_new_tokens": 6, "num_beams": num_beams}
    expected = model.generate(clip_embeds=batch["clip_embeds"], **settings)
    assert torch.equal(model.generate(**batch, **settings), expected)


def test_prompts_of_a_training_batch_are_kept(model, embeds):
    input_ids = torch.tensor([[IMAGE] * PREFIX + [5, 6, 7, 8, 9], [IMAGE] * PREFIX + [5, 11, 12, 0, 0]])
    labels = torch.tensor([[-100] * (PREFIX + 2) + [7, 8, 9], [-100] * (PREFIX + 1) + [11, 12, -100, -100]])
    mask = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "clip_embeds": embeds[:2]}
    settings = {"max_new_tokens": 5, "eos_token_id": None}
    together = model.generate(**batch, **settings)
    assert together.shape[1] == PREFIX + 2 + 5
    for row, words in enumerate(([5, 6], [5])):
        alone = model.generate(prompt(*words), clip_embeds=embeds[row : row + 1], **settings)
        assert torch.equal(together[row, 2 - len(words) :], alone[0])
    with pytest.raises(ValueError, match="packs several captions into a row"):
        model.generate(**{**batch, "attention_mask": torch.ones(2, 1, 9, 9)})


# -- labels of the loss


def test_placeholders_in_labels_count_for_nothing(model, embeds):
    input_ids = prompt(7, 8, 9, rows=2)
    outputs = model(input_ids=input_ids, clip_embeds=embeds[:2], labels=input_ids.clone())
    by_hand = F.cross_entropy(outputs.logits[:, PREFIX - 1 : -1].flatten(0, 1), input_ids[:, PREFIX:].flatten())
    torch.testing.assert_close(outputs.loss, by_hand)
    masked = input_ids.masked_fill(input_ids == IMAGE, -100)
    assert torch.equal(model(input_ids=input_ids, clip_embeds=embeds[:2], labels=masked).loss, outputs.loss)


# -- embeddings of the prompt


@pytest.fixture(scope="module")
def embedded_placeholder(model):
    """Copy the captioner, with a placeholder that has an embedding."""
    other = copy.deepcopy(model)
    other.config.image_token_id = 58
    return other


@torch.no_grad()
def test_inputs_embeds_where_the_placeholder_has_an_embedding(embedded_placeholder, embeds):
    model = embedded_placeholder
    input_ids = prompt(7, 8, rows=2, placeholder=58)
    expected = model(input_ids=input_ids, clip_embeds=embeds[:2])
    inputs_embeds = model.get_input_embeddings()(input_ids)
    outputs = model(inputs_embeds=inputs_embeds, clip_embeds=embeds[:2])
    assert torch.equal(outputs.logits, expected.logits)
    captions = model.generate(input_ids, clip_embeds=embeds[:2], eos_token_id=None, max_new_tokens=6)
    embedded = model.generate(inputs_embeds=inputs_embeds, clip_embeds=embeds[:2], eos_token_id=None, max_new_tokens=6)
    assert torch.equal(embedded, captions[:, PREFIX + 2 :])
    with pytest.raises(ValueError, match="hold 0 image placeholders"):
        model(inputs_embeds=torch.randn(2, 6, 32), clip_embeds=embeds[:2])


@pytest.mark.parametrize("num_beams", [1, 3])
@torch.no_grad()
def test_generate_from_ids_and_their_embeddings(model, embeds, num_beams):
    input_ids = prompt(7, 8, rows=2)
    settings = {"eos_token_id": None, "max_new_tokens": 6, "num_beams": num_beams}
    expected = model.generate(input_ids, clip_embeds=embeds[:2], **settings)
    inputs_embeds = model.get_input_embeddings()(input_ids.masked_fill(input_ids == IMAGE, 0))
    both = model.generate(input_ids=input_ids, inputs_embeds=inputs_embeds, clip_embeds=embeds[:2], **settings)
    assert torch.equal(both, expected)
    with pytest.raises(ValueError, match="has no embedding.*For `generate`, pass both"):
        model(inputs_embeds=inputs_embeds, clip_embeds=embeds[:2])


# -- placeholders never leak


@pytest.mark.parametrize(
    "setting", [{"encoder_no_repeat_ngram_size": 2}, {"token_healing": True}, {"encoder_repetition_penalty": 1.2}]
)
@pytest.mark.parametrize("in_config", [False, True])
def test_settings_that_look_prompts_up(model, embeds, setting, in_config):
    kwargs = {"generation_config": GenerationConfig(**setting)} if in_config else setting
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` looks the prompt's tokens up"):
        model.generate(prompt(5), clip_embeds=embeds[:1], **kwargs)


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.5},
        {"bad_words_ids": [[5], [6, 7]]},
        {"min_new_tokens": 4},
        {"num_beams": 2, "no_repeat_ngram_size": 2},
        {"num_beams": 4, "num_beam_groups": 1, "length_penalty": 0.5},
        {"do_sample": True, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
        {"exponential_decay_length_penalty": (2, 1.2)},
        {"renormalize_logits": True, "num_beams": 2},
        {"guidance_scale": 2.0, "num_beams": 2},
        {"guidance_scale": 2.0, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("words", [(), (5, 6, 5)])
def test_no_placeholder_is_written(model, embeds, settings, words):
    captions = model.generate(prompt(*words, rows=2), clip_embeds=embeds[:2], max_new_tokens=6, **settings)
    assert captions.shape[1] > PREFIX + len(words)
    assert (captions[:, PREFIX:] < 60).all()


def test_prompt_lookup_where_the_image_comes_first(model, embeds):
    settings = {"clip_embeds": embeds[:1], "eos_token_id": None, "max_new_tokens": 20}
    input_ids = prompt(5, 6, 5, 6, 5)
    expected = model.generate(input_ids, **settings)
    assert torch.equal(model.generate(input_ids, **settings, prompt_lookup_num_tokens=3), expected)
    for refused in (torch.cat([torch.tensor([[5, 6]]), prompt(5)], dim=1), prompt(), None):
        with pytest.raises(ValueError, match="`prompt_lookup_num_tokens`.*put the image first and a text after it"):
            model.generate(refused, **settings, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("bos_token_id", [0, 7])
def test_guidance_starts_without_the_image_from_the_first_token_of_texts(model, embeds, bos_token_id):
    scale, settings = 3.0, {"eos_token_id": None, "max_new_tokens": 6, "bos_token_id": bos_token_id}
    guided = model.generate(clip_embeds=embeds[:2], guidance_scale=scale, **settings)
    sequences, words = prompt(rows=2), torch.full((2, 1), bos_token_id)
    with torch.no_grad():
        for _ in range(6):
            with_image = model(input_ids=sequences, clip_embeds=embeds[:2]).logits[:, -1].log_softmax(-1)
            without = model.language_model(words).logits[:, -1].log_softmax(-1)
            token = (scale * (with_image - without) + without).argmax(-1, keepdim=True)
            sequences, words = torch.cat([sequences, token], 1), torch.cat([words, token], 1)
    assert torch.equal(guided, sequences)


def test_guidance_without_a_first_token_of_texts(model, embeds):
    settings = GenerationConfig(guidance_scale=2.0, max_new_tokens=3)
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with pytest.raises(ValueError, match="no token to begin one with: pass `negative_prompt_ids`"):
            model.generate(clip_embeds=embeds[:1], generation_config=settings)
        given = model.generate(
            clip_embeds=embeds[:1], generation_config=settings, negative_prompt_ids=torch.tensor([[3]])
        )
        assert given.shape == (1, PREFIX + 3)
    finally:
        model.generation_config = own


def test_assistants(model, embeds):
    settings = {"clip_embeds": embeds[:1], "eos_token_id": None, "max_new_tokens": 8}
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, assistant_model=copy.deepcopy(model)), expected)
    bare = GPT2LMHeadModel(model.language_model.config)
    with pytest.raises(ValueError, match="`assistant_model` is a `gpt2`, which cannot read the placeholders"):
        model.generate(**settings, assistant_model=bare)
    narrow = GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    other = ClipCapForConditionalGeneration(ClipCapConfig(text_config=narrow, clip_embed_dim=16, prefix_length=PREFIX))
    with pytest.raises(ValueError, match="its `hidden_size` is 16 and not 32"):
        model.generate(**settings, assistant_model=other)


# -- NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_numbers(make_model, value):
    model = make_model()
    pixels = torch.randn(3, 3, 32, 32)
    pixels[2, 1, 5, 5] = value
    for settings in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match=r"`pixel_values` hold NaN or infinity in rows \[2\].*load those images"):
            model.generate(pixel_values=pixels, **settings)


def test_both_names_of_the_same_input(model, embeds):
    with pytest.raises(ValueError, match="`inputs` and `input_ids` are the same"):
        model.generate(prompt(5), input_ids=prompt(5), clip_embeds=embeds[:1])
    assert "inputs" in inspect.signature(model.generate).parameters
