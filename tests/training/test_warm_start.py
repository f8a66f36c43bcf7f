"""A warm start puts the prefix near word embeddings, so training gets further in the same number of steps."""

import pytest
import torch
from clipcap_hf import EMOJI_MINI, ClipCapForConditionalGeneration, ClipCapProcessor, warm_start_mapper
from clipcap_hf.training.warm_start import _targets


CAPTIONS = ["a red apple", "a green pear", "a blue whale", "a black cat", "a white dog", "a yellow bee"]


@pytest.fixture(scope="module")
def processor():
    return ClipCapProcessor.from_pretrained(EMOJI_MINI)


def new_captioner(mapping_type="mlp", **kwargs):
    """Return the trained language model of emoji-mini, frozen behind a new mapping network."""
    language_model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI).language_model
    torch.manual_seed(0)
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        None,
        language_model,
        clip_embed_dim=16,
        prefix_length=2,
        mapping_type=mapping_type,
        mapping_num_layers=2,
        image_token_id=language_model.config.vocab_size,
        freeze_language_model=True,
        normalize_clip_embeds=True,
        **kwargs,
    )
    return model.eval()


@pytest.fixture(scope="module")
def embeds():
    return torch.randn(len(CAPTIONS), 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mapping_type", ["mlp", "linear", "transformer"])
def test_prefix_reads_as_the_caption(processor, embeds, mapping_type):
    model = new_captioner(mapping_type)
    before = {name: value.clone() for name, value in model.language_model.state_dict().items()}
    losses = warm_start_mapper(model, processor, embeds, CAPTIONS, steps=300, batch_size=8, common=0.5)
    assert losses[-1] < 0.2 < losses[0]
    expected, _ = _targets(processor.tokenizer, CAPTIONS, 2, 0.5)
    found = model.interpret_prefix(clip_embeds=embeds, k=1).token_ids.squeeze(-1)
    assert (found == expected).float().mean() > 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.language_model.state_dict().items())


def test_tokens_of_all_captions_say_nothing(processor):
    token_ids, weights = _targets(processor.tokenizer, CAPTIONS, 2, 0.5)
    article = processor.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    assert article not in token_ids
    assert (weights > 1).all()
    only, _ = _targets(processor.tokenizer, ["a", "a"], 3, 0.1)
    assert only.tolist() == [[article] * 3] * 2


def train_steps(model, processor, embeds, steps):
    tokens = processor(clip_embeds=embeds, text=CAPTIONS, return_tensors="pt", padding=True, padding_side="right")
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    labels[:, : model.config.prefix_length] = -100
    optimizer = torch.optim.AdamW(model.mapping_network.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = model(**tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_training_goes_further_from_a_warm_start(embeds):
    processor = ClipCapProcessor(tokenizer=ClipCapProcessor.from_pretrained(EMOJI_MINI).tokenizer, prefix_length=2)
    cold, warm = new_captioner(), new_captioner()
    warm_start_mapper(warm, processor, embeds, CAPTIONS, steps=300, batch_size=8, common=0.5)
    assert train_steps(warm, processor, embeds, 30) < train_steps(cold, processor, embeds, 30)


def test_captions_and_embeddings_must_match(processor, embeds):
    with pytest.raises(ValueError, match="needs one caption"):
        warm_start_mapper(new_captioner(), processor, embeds, CAPTIONS[:2])
    with pytest.raises(ValueError, match="Caption 1 is empty"):
        warm_start_mapper(new_captioner(), processor, embeds[:2], ["a cat", ""])
