"""What `generate` returns, of which shape, and how it goes on from there: as for transformers' own models."""

import pytest
import torch
from clipcap_hf.model.versions_clipcap import CACHE
from tiny_inputs import tiny_language_model
from transformers import pipeline


BATCH, PREFIX, WORDS, NEW = 2, 4, 2, 3
LLAMA = tiny_language_model("llama", eos_token_id=None, bos_token_id=0, pad_token_id=0)


@pytest.fixture(params=["gpt2-mlp", "llama-transformer"])
def model(request, make_model):
    language_model, mapping_type = request.param.split("-")
    model = make_model(mapping_type=mapping_type, **({"text_config": LLAMA} if language_model == "llama" else {}))
    model.generation_config.eos_token_id = None  # captions of full length have known shapes
    model.set_attn_implementation("eager")  # the only one that returns attentions
    return model


@pytest.fixture
def inputs(model):
    torch.manual_seed(0)
    image = torch.full((BATCH, PREFIX), model.config.image_token_id)
    input_ids = torch.cat([image, torch.randint(1, 50, (BATCH, WORDS))], dim=1)
    pixel_values = torch.randn(BATCH, 3, 32, 32)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}


WAYS = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "beam": {"num_beams": 3},
    "beam-two": {"num_beams": 3, "num_return_sequences": 2},
    "beam-sample": {"num_beams": 2, "do_sample": True},
}
EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_shapes_of_all_outputs(model, inputs, way, use_cache):
    settings = WAYS[way]
    outputs = model.generate(**inputs, **settings, **EVERYTHING, max_new_tokens=NEW, use_cache=use_cache)
    text = model.config.text_config
    returned = BATCH * settings.get("num_return_sequences", 1)
    rows = BATCH * settings.get("num_beams", settings.get("num_return_sequences", 1))
    prompt = PREFIX + WORDS
    assert outputs.sequences.shape == (returned, prompt + NEW)
    assert torch.equal(outputs.sequences[:: returned // BATCH, :prompt], inputs["input_ids"])
    for steps in (outputs.scores, outputs.logits):
        assert [step.shape for step in steps] == [(rows, text.vocab_size)] * NEW
    if "num_beams" in settings:
        assert outputs.sequences_scores.shape == (returned,)
        assert outputs.beam_indices.shape == (returned, NEW)
    assert len(outputs.attentions) == len(outputs.hidden_states) == NEW
    for step, (attentions, hidden_states) in enumerate(zip(outputs.attentions, outputs.hidden_states)):
        source = prompt + step
        target = 1 if use_cache and step else source
        assert [layer.shape for layer in attentions] == [(rows, text.num_attention_heads, target, source)] * 2
        assert [layer.shape for layer in hidden_states] == [(rows, target, text.hidden_size)] * 3
    if use_cache:
        assert outputs[CACHE].get_seq_length() == prompt + NEW - 1
    else:
        assert outputs.get(CACHE) is None


@pytest.mark.parametrize("way", ["greedy", "beam", "beam-two"])
@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_every_cache_gives_the_same(model, inputs, way, cache):
    outputs = [
        model.generate(**inputs, **WAYS[way], **settings, **EVERYTHING, max_new_tokens=8) for settings in ({}, cache)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_stop_strings(make_model, processor, images, settings):
    model = make_model()
    model.generation_config.eos_token_id = None
    decode = processor.tokenizer.decode
    # Parts of characters are no text to stop at.
    model.generation_config.suppress_tokens = [token for token in range(290) if not decode(token).isascii()]
    inputs = processor(images=images[:1], return_tensors="pt")
    torch.manual_seed(0)
    stop = decode(model.generate(**inputs, **settings, max_new_tokens=8)[0, PREFIX + 2])
    torch.manual_seed(0)
    arguments = {"stop_strings": [stop], "tokenizer": processor.tokenizer}
    stopped = model.generate(**inputs, **settings, **arguments, max_new_tokens=8)[0, PREFIX:]
    assert len(stopped) < 8 and decode(stopped).endswith(stop)
    captioner = pipeline("image-captioning", model=model, processor=processor)
    torch.manual_seed(0)
    (record,) = captioner(images[0], stop_strings=stop, max_new_tokens=8, **settings)
    assert record["generated_text"] == decode(stopped).strip()


def test_continuing_from_a_cache(model, inputs):
    settings = {"return_dict_in_generate": True, "output_scores": True}
    whole = model.generate(**inputs, **settings, max_new_tokens=5)
    start = model.generate(**inputs, **settings, max_new_tokens=2)
    # The mask grows with the words; the image is in the cache.
    mask = torch.ones_like(start.sequences)
    rest = model.generate(
        input_ids=start.sequences,
        attention_mask=mask,
        **{CACHE: start[CACHE]},
        **settings,
        max_new_tokens=3,
    )
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(rest.scores, whole.scores[2:], rtol=1e-4, atol=1e-5)
    assert rest[CACHE].get_seq_length() == whole[CACHE].get_seq_length()


@pytest.mark.parametrize("source", ["pixel_values", "clip_embeds"])
def test_continuing_from_a_cache_with_the_image_given_again(model, inputs, source):
    if source == "clip_embeds":
        inputs["clip_embeds"] = model.get_clip_embeds(inputs.pop("pixel_values"))
    settings = {"return_dict_in_generate": True}
    whole = model.generate(**inputs, **settings, max_new_tokens=5)
    start = model.generate(**inputs, **settings, max_new_tokens=2)
    again = {**inputs, "input_ids": start.sequences, "attention_mask": torch.ones_like(start.sequences)}
    rest = model.generate(**again, **{CACHE: start[CACHE]}, **settings, max_new_tokens=3)
    assert torch.equal(rest.sequences, whole.sequences)


def test_a_second_image_after_a_cache(model, inputs):
    """A chat that goes on with another image: the cache holds the first, the second is read."""
    second = torch.randn(BATCH, 3, 32, 32)
    image, word = inputs["input_ids"][:, :PREFIX], inputs["input_ids"][:, -1:]
    both = torch.cat([inputs["input_ids"], image, word], dim=1)
    mask = torch.ones_like(both)
    pixels = torch.stack([inputs["pixel_values"], second], dim=1).flatten(0, 1)  # in the order of the placeholders
    whole = model.generate(input_ids=both, attention_mask=mask, pixel_values=pixels, max_new_tokens=4)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
    found = model.generate(
        input_ids=both, attention_mask=mask, pixel_values=second, **{CACHE: cache}, max_new_tokens=4
    )
    assert torch.equal(found, whole)


def test_left_padding_changes_nothing(model, inputs):
    alone = model.generate(**inputs, max_new_tokens=5)
    padding = torch.full((BATCH, 3), 7)
    padded = {
        **inputs,
        "input_ids": torch.cat([padding, inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.zeros_like(padding), inputs["attention_mask"]], dim=1),
    }
    assert torch.equal(model.generate(**padded, max_new_tokens=5)[:, 3:], alone)
    positions = [given["attention_mask"].cumsum(-1).sub(1).clamp(min=0) for given in (inputs, padded)]
    with torch.no_grad():
        logits = [model(**given, position_ids=its).logits[:, -1] for given, its in zip((inputs, padded), positions)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_only_the_logits_that_are_asked_for(model, inputs):
    whole = model(**inputs).logits
    assert whole.shape == (BATCH, PREFIX + WORDS, model.config.text_config.vocab_size)
    for kept in (1, 3):
        torch.testing.assert_close(model(**inputs, logits_to_keep=kept).logits, whole[:, -kept:])
    places = torch.tensor([0, 5])
    torch.testing.assert_close(model(**inputs, logits_to_keep=places).logits, whole[:, places])


def test_continuing_from_embeddings_with_the_image_given_again(make_model, inputs):
    model = make_model(image_token_id=55)  # a placeholder with an embedding
    model.generation_config.eos_token_id = None
    input_ids = inputs["input_ids"].clone()
    input_ids[:, :PREFIX] = 55
    embed = model.get_input_embeddings()
    given = {"inputs_embeds": embed(input_ids), "pixel_values": inputs["pixel_values"]}
    settings = {"return_dict_in_generate": True, "bad_words_ids": [[55]]}
    whole = model.generate(**given, **settings, max_new_tokens=5)
    start = model.generate(**given, **settings, max_new_tokens=2)
    given["inputs_embeds"] = torch.cat([given["inputs_embeds"], embed(start.sequences)], dim=1)
    rest = model.generate(**given, **{CACHE: start[CACHE]}, **settings, max_new_tokens=3)
    assert torch.equal(rest.sequences, whole.sequences[:, 2:])
