"""All captions of an image in one row: the same losses and gradients as one row per caption, with less work."""

from collections import Counter

import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapTrainer
from clipcap_hf.training.packing import IGNORED, ImageWithCaptions, can_pack, pack
from clipcap_hf.training.rows import EpochRows
from tiny_inputs import tiny_language_model
from transformers import BloomConfig, Seq2SeqTrainingArguments


PLACEHOLDER, PREFIX_LENGTH = 290, 4
PROMPTS = {
    "image alone": [PLACEHOLDER] * PREFIX_LENGTH,
    "text around it": [7, 8, *[PLACEHOLDER] * PREFIX_LENGTH, 9, 10, 11],
}
NUMBERS_OF_CAPTIONS = (5, 1, 3, 7)


def make_images(prompt: list[int]) -> list[ImageWithCaptions]:
    torch.manual_seed(1)
    return [
        ImageWithCaptions(
            prompt, [torch.randint(1, 290, (int(length),)).tolist() for length in torch.randint(1, 9, (n,))]
        )
        for n in NUMBERS_OF_CAPTIONS
    ]


def one_row_per_caption(images: list[ImageWithCaptions]) -> dict[str, torch.Tensor]:
    """Make an ordinary batch: prompt and caption in each row, padded on the right."""
    rows = [(image.prompt, caption) for image in images for caption in image.captions]
    length = max(len(prompt) + len(caption) for prompt, caption in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), IGNORED),
    }
    for row, (prompt, caption) in enumerate(rows):
        end = len(prompt) + len(caption)
        batch["input_ids"][row, :end] = torch.tensor(prompt + caption)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, len(prompt) : end] = torch.tensor(caption)
    return batch


def _labels(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["labels"][batch["labels"] != IGNORED].tolist()


def loss_and_gradients(model, **batch):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=(batch["labels"] != IGNORED).sum()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", list(PROMPTS))
@pytest.mark.parametrize("mapping", ["mlp", "transformer", "linear"])
@pytest.mark.parametrize("text", ["gpt2", "llama", "qwen3", "opt"])
def test_losses_and_gradients_are_those_of_a_row_per_caption(make_model, text, mapping, prompt, attention):
    model = make_model(None, text_config=tiny_language_model(text), mapping_type=mapping)
    model.set_attn_implementation(attention)
    images = make_images(PROMPTS[prompt])
    embeds = torch.randn(len(images), 16)
    repeated = embeds.repeat_interleave(torch.tensor(NUMBERS_OF_CAPTIONS), 0)
    expected, gradients = loss_and_gradients(model, **one_row_per_caption(images), clip_embeds=repeated)
    for images_per_row in (1, 2, 4):
        batch = pack(images, PLACEHOLDER, 0, images_per_row)
        assert len(batch["input_ids"]) == len(images) // images_per_row
        loss, found = loss_and_gradients(model, **batch, clip_embeds=embeds)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")


def test_captions_do_not_see_each_other(make_model):
    """Changing a caption changes no logit of another caption or image."""
    model = make_model(None)
    images = make_images(PROMPTS["image alone"])
    embeds = torch.randn(len(images), 16)
    batch = pack(images, PLACEHOLDER, 0, images_per_row=4)
    logits = model(**batch, clip_embeds=embeds).logits
    place = PREFIX_LENGTH  # the first token of the longest image's first caption
    longest = max(images, key=len)
    end = place + len(longest.captions[0]) - 1
    batch["input_ids"][0, place] = 289 - batch["input_ids"][0, place]
    changed = (model(**batch, clip_embeds=embeds).logits - logits).abs().amax(-1)[0] > 1e-6
    assert changed[place:end].all()
    assert not changed[:place].any() and not changed[end:].any()


def test_padding_is_rare():
    torch.manual_seed(0)
    lengths = (
        torch.randn(40, 5).mul(3.5).add(13).round().clamp(5, 40).long()
    )  # words and ends of captions of photographs
    images = [ImageWithCaptions([PLACEHOLDER] * 10, [[1] * int(n) for n in row]) for row in lengths]
    batches = [pack(images[start : start + 8], PLACEHOLDER, 0) for start in range(0, 40, 8)]
    padding = sum(int((batch["input_ids"] == 0).sum()) for batch in batches)
    assert padding < 0.05 * sum(batch["input_ids"].numel() for batch in batches)


def test_tokens_are_few():
    """Five captions of ten tokens after a prefix of forty take half the positions of five rows, and lose none."""
    image = ImageWithCaptions([PLACEHOLDER] * 40, [[1 + n] * 10 for n in range(5)])
    batch = pack([image], PLACEHOLDER, 0)
    assert batch["input_ids"].numel() == 40 + 5 * 9
    labelled = batch["labels"] != IGNORED
    assert labelled.sum() == 50 and not labelled[0]
    assert batch["predictor_index"][labelled].unique(return_counts=True)[1].tolist() == [5] + [1] * 45
    assert batch["position_ids"].max() == 48


ROWS = [
    {"clip_embeds": torch.ones(16).mul(number).tolist(), "captions": captions}
    for number, captions in enumerate((["a red heart", "a heart"], ["a blue dog"], ["man in a black hat"] * 3))
]


@pytest.mark.parametrize("template", ["<image>", "Say: <image> caption:"])
@pytest.mark.parametrize("max_caption_length", [None, 3])
def test_collator(make_model, embeds_processor, template, max_caption_length):
    """The collator's packed batch has the same loss as its batch with one row per caption."""
    model = make_model(None)
    embeds_processor.prompt_template = template
    settings = {"max_caption_length": max_caption_length}
    single = [{**row, "captions": caption} for row in ROWS for caption in row["captions"]]
    apart = CaptioningCollator(embeds_processor, **settings)(single)
    together = CaptioningCollator(embeds_processor, captions_together=True, **settings)(ROWS)
    assert (together["labels"] != IGNORED).sum() == (apart["labels"] != IGNORED).sum()
    torch.testing.assert_close(model(**together).loss, model(**apart).loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", ["<image>", "Say: <image> caption:"])
def test_collator_packs_instead_of_padding(make_model, embeds_processor, template):
    """With a caption a row, drawn by seed and epoch, packing changes the shape of the batch and not the loss."""
    model = make_model(None, mapping_type="transformer")
    embeds_processor.prompt_template = template
    rows = EpochRows(ROWS, seed=3).__getitems__([0, 1, 2, 0])
    padded, packed = (CaptioningCollator(embeds_processor, packed=packed)(rows) for packed in (False, True))
    assert (len(padded["input_ids"]), len(packed["input_ids"])) == (4, 2)
    assert torch.equal(padded["clip_embeds"], packed["clip_embeds"])
    assert Counter(_labels(padded)) == Counter(_labels(packed))
    loss, gradients = loss_and_gradients(model, **padded)
    found_loss, found = loss_and_gradients(model, **packed)
    torch.testing.assert_close(found_loss, loss, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")


def test_a_step_of_the_trainer_is_the_same(make_model, embeds_processor, tmp_path):
    """Gradient accumulation gives the same losses and weights as with one row per caption."""
    weights, losses = {}, {}
    for together in (False, True):
        model = make_model(None, freeze_language_model=True, mapping_type="transformer")
        rows = ROWS if together else [{**row, "captions": text} for row in ROWS for text in row["captions"]]
        args = Seq2SeqTrainingArguments(
            tmp_path / str(together),
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(rows),
            learning_rate=1e-3,
            adam_epsilon=1e-4,  # or the steps of the smallest gradients would be those of their rounding
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
        )
        collator = CaptioningCollator(embeds_processor, captions_together=together)
        trainer = ClipCapTrainer(model, args, train_dataset=rows, data_collator=collator)
        losses[together] = trainer.train().training_loss
        weights[together] = model.mapping_network.state_dict()
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    start = make_model(None, freeze_language_model=True, mapping_type="transformer").mapping_network.state_dict()
    for name, weight in weights[True].items():
        torch.testing.assert_close(weight, weights[False][name], atol=2e-6, rtol=0)
    assert any(not torch.equal(weight, start[name]) for name, weight in weights[True].items())


def test_language_models_that_cannot(make_model):
    bloom = BloomConfig(vocab_size=290, hidden_size=32, n_layer=2, n_head=4)  # its positions come from a 2-D mask
    assert can_pack(make_model(None))
    assert not can_pack(make_model(None, text_config=bloom))
