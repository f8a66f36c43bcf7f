import math
from types import SimpleNamespace

import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapForConditionalGeneration, ClipCapProcessor, ClipCapTrainer
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments


IGNORED = -100


def rows(captions, embeds=None):
    embeds = torch.randn(len(captions), 16) if embeds is None else embeds
    return [{"clip_embeds": e.tolist(), "captions": c} for e, c in zip(embeds, captions)]


def ids(processor, text):
    return processor.tokenizer(text)["input_ids"]


# -- the collator


@pytest.mark.parametrize("pad_token", [None, "!"], ids=["pad is eos", "pad is not eos"])
def test_labels_are_the_caption_and_its_end(make_tokenizer, pad_token):
    processor = ClipCapProcessor(
        None, make_tokenizer(**({"pad_token": pad_token} if pad_token else {})), prefix_length=4
    )
    pad = processor.tokenizer.pad_token_id
    assert (pad == processor.tokenizer.eos_token_id) == (pad_token is None)
    batch = CaptioningCollator(processor)(rows(["a red heart", "wow!"]))
    assert sorted(batch) == ["attention_mask", "clip_embeds", "input_ids", "labels"]
    for i, caption in enumerate(["a red heart", "wow!"]):
        tokens = [*ids(processor, caption), 0]  # 0 is the end
        padding = batch["input_ids"].shape[1] - 4 - len(tokens)
        assert batch["input_ids"][i].tolist() == [processor.image_token_id] * 4 + tokens + [pad] * padding
        assert batch["attention_mask"][i].tolist() == [1] * (4 + len(tokens)) + [0] * padding
        # By position: the "!" of the caption is learned though it pads, and so is the end.
        assert batch["labels"][i].tolist() == [IGNORED] * 4 + tokens + [IGNORED] * padding
    assert batch["labels"].dtype == torch.long
    assert processor.tokenizer.padding_side == "left"  # as before


def test_end_token_is_optional(embeds_processor, make_tokenizer):
    batch = CaptioningCollator(embeds_processor, append_eos=False)(rows(["a red heart"]))
    assert batch["labels"][0, 4:].tolist() == ids(embeds_processor, "a red heart")
    endless = ClipCapProcessor(None, make_tokenizer(eos_token=None, pad_token="!"))
    with pytest.raises(ValueError, match="no end token: set one, or pass `append_eos=False`"):
        CaptioningCollator(endless)
    CaptioningCollator(endless, append_eos=False)


def test_tokenizer_with_a_begin_token_of_its_own(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    processor = ClipCapProcessor(None, tokenizer, prefix_length=4)
    batch = CaptioningCollator(processor)(rows(["a red"]))
    caption = tokenizer("a red", add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0].tolist() == [processor.image_token_id] * 4 + caption + [0]
    assert batch["labels"][0].tolist() == [IGNORED] * 4 + caption + [0]


def test_one_of_several_captions(embeds_processor):
    def drawn(collator):
        batch = collator(rows([["a red heart", "a blue dog", "woman running"]] * 30))
        texts = embeds_processor.batch_decode(batch["labels"].masked_fill(batch["labels"] == IGNORED, 0))
        return [text.removesuffix("<|endoftext|>").strip("<|endoftext|>") for text in texts]

    torch.manual_seed(1)
    first = drawn(CaptioningCollator(embeds_processor))
    assert len(set(first)) == 3
    torch.manual_seed(1)
    assert drawn(CaptioningCollator(embeds_processor)) == first
    torch.manual_seed(2)
    assert drawn(CaptioningCollator(embeds_processor)) != first
    assert len(set(drawn(CaptioningCollator(embeds_processor, sample_captions=False)))) == 1


def test_captions_are_cut(embeds_processor):
    collator = CaptioningCollator(embeds_processor, max_caption_length=3)
    batch = collator(rows(["a purple rain in a white hat", "a"]))
    assert batch["labels"].shape[1] == 4 + 3
    # A caption that was cut does not learn to end there; a whole one does.
    assert batch["labels"][0, 4:].tolist() == ids(embeds_processor, "a purple rain in a white hat")[:3]
    assert batch["labels"][1, 4:].tolist() == [*ids(embeds_processor, "a"), 0, IGNORED]
    exact = ids(embeds_processor, "a red")
    batch = CaptioningCollator(embeds_processor, max_caption_length=len(exact) + 1)(rows(["a red"]))
    assert batch["labels"][0, 4:].tolist() == [*exact, 0]


def test_images_and_other_columns(processor, images):
    features = [{"picture": image, "text": "a dog", "id": 7} for image in images[:2]]
    collator = CaptioningCollator(processor, image_column="picture", caption_column="text")
    batch = collator(features)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "pixel_values"]
    expected = processor(images=images[:2], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


def test_embeddings_are_preferred_to_images(processor, images):
    embeds = torch.randn(1, 16)
    batch = CaptioningCollator(processor)([{"image": images[0], "clip_embeds": embeds[0], "captions": "a"}])
    assert torch.equal(batch["clip_embeds"], embeds) and "pixel_values" not in batch


def test_embeddings_of_half_precision_become_single(embeds_processor):
    batch = CaptioningCollator(embeds_processor)(
        [{"clip_embeds": torch.ones(16, dtype=torch.float16), "captions": "a"}]
    )
    assert batch["clip_embeds"].dtype == torch.float32


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("", "non-empty string, got ''"),
        ("  \n", "non-empty string"),
        ([], "has no caption"),
        (None, "has no caption"),
        ([None], "non-empty string, got None"),
        ([7], "non-empty string, got 7"),
        ("a <image> of a dog", "<image>, which is reserved"),
    ],
    ids=repr,
)
def test_bad_captions(embeds_processor, captions, message):
    with pytest.raises(ValueError, match=message):
        CaptioningCollator(embeds_processor)(rows(["a", captions]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_numbers(embeds_processor, value):
    embeds = torch.randn(2, 16)
    embeds[1, 3] = value
    with pytest.raises(ValueError, match="'clip_embeds' holds NaN or infinity: embed those images again"):
        CaptioningCollator(embeds_processor)(rows(["a", "b"], embeds))


def test_missing_columns(embeds_processor):
    collator = CaptioningCollator(embeds_processor)
    with pytest.raises(ValueError, match="no column 'captions'; it has clip_embeds, text.*`caption_column=`"):
        collator([{"clip_embeds": [0.0] * 16, "text": "a"}])
    with pytest.raises(
        ValueError, match="neither a column 'image' nor 'video' nor 'clip_embeds'; it has captions.*`image_column=`"
    ):
        collator([{"captions": "a"}])
    with pytest.raises(ValueError, match="'clip_embeds' is empty in some rows"):
        collator([{"clip_embeds": [0.0] * 16, "captions": "a"}, {"clip_embeds": None, "captions": "a"}])


# -- training


def training_arguments(tmp_path, cls=TrainingArguments, **kwargs):
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return cls(**{**settings, **kwargs})


def captions_of(model, processor, **inputs):
    ids = model.eval().generate(**inputs, max_new_tokens=20)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


@pytest.fixture
def data(images, captions):
    return Dataset.from_dict({"image": images, "captions": [[caption] for caption in captions]})


@pytest.mark.parametrize("trainer_class", [Trainer, ClipCapTrainer])
def test_images_are_learned_by_heart(tmp_path, make_model, processor, data, images, captions, trainer_class):
    model = make_model("clip", freeze_vision=True)
    args_class = Seq2SeqTrainingArguments if trainer_class is ClipCapTrainer else TrainingArguments
    trainer = trainer_class(
        model=model,
        args=training_arguments(tmp_path, args_class, max_steps=100, learning_rate=5e-3),
        train_dataset=data,
        data_collator=CaptioningCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 1 and losses[-1] < 0.1
    assert captions_of(model, processor, **processor(images=images, return_tensors="pt")) == captions
    trainer.save_model(tmp_path / "saved")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "saved")
    processor = ClipCapProcessor.from_pretrained(tmp_path / "saved")
    assert captions_of(again, processor, **processor(images=images, return_tensors="pt")) == captions


@pytest.mark.parametrize(
    ("mapping_type", "settings"),
    [("mlp", {}), ("linear", {"freeze_language_model": True}), ("transformer", {"normalize_clip_embeds": True})],
)
def test_embeddings_are_learned_by_heart(tmp_path, make_model, embeds_processor, captions, mapping_type, settings):
    model = make_model(None, mapping_type=mapping_type, **settings)
    embeds = torch.randn(8, 16)
    steps = 100 if settings.get("freeze_language_model") else 80
    trainer = ClipCapTrainer(
        model=model,
        args=training_arguments(tmp_path, Seq2SeqTrainingArguments, max_steps=steps, learning_rate=5e-3),
        train_dataset=Dataset.from_list(rows(captions, embeds)),
        data_collator=CaptioningCollator(embeds_processor),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if settings.get("freeze_language_model"):  # a random language model can be steered only so far
        assert losses[-1] < 0.8 * losses[0]
    else:
        assert losses[-1] < 0.1
        assert captions_of(model, embeds_processor, clip_embeds=embeds) == captions


def test_runs_with_a_seed_repeat(tmp_path, make_model, embeds_processor, captions):
    embeds = torch.randn(8, 16)
    several = [[caption, caption[::-1]] for caption in captions]

    def run(seed):
        model = make_model(None)
        trainer = ClipCapTrainer(
            model=model,
            args=training_arguments(
                tmp_path, Seq2SeqTrainingArguments, max_steps=4, seed=seed, per_device_train_batch_size=3
            ),
            train_dataset=Dataset.from_list(rows(several, embeds)),
            data_collator=CaptioningCollator(embeds_processor),
        )
        trainer.train()
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_both_trainers_have_the_same_loss(tmp_path, make_model, embeds_processor, captions):
    model = make_model(None)
    batch = CaptioningCollator(embeds_processor)(rows(captions))
    expected = model(**batch).loss
    seen = []
    model.language_model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
    for trainer_class, cls in ((Trainer, TrainingArguments), (ClipCapTrainer, Seq2SeqTrainingArguments)):
        trainer = trainer_class(model=model, args=training_arguments(tmp_path, cls))
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
        number = torch.tensor(200)
        torch.testing.assert_close(
            trainer.compute_loss(model, dict(batch), num_items_in_batch=number),
            expected * (batch["labels"] != IGNORED).sum() / 200,
        )
    length = batch["labels"].shape[1]
    labelled = int((batch["labels"] != IGNORED).sum())
    assert seen == [length, length, labelled, labelled]  # no logits for what predicts the prefix or padding


@pytest.mark.parametrize("num_items", [None, 100])
def test_label_smoothing_goes_to_the_right_tokens(tmp_path, make_model, embeds_processor, captions, num_items):
    model = make_model(None)
    batch = CaptioningCollator(embeds_processor)(rows(captions))
    args = training_arguments(tmp_path, Seq2SeqTrainingArguments, label_smoothing_factor=0.2)
    trainer = ClipCapTrainer(model=model, args=args)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], clip_embeds=batch["clip_embeds"]
    ).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2, reduction="sum"
    ) / (num_items or (batch["labels"] != IGNORED).sum())
    kwargs = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    torch.testing.assert_close(trainer.compute_loss(model, batch, **kwargs), expected)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True, **kwargs)
    torch.testing.assert_close(loss, expected)
    assert outputs["logits"].shape[1] == batch["labels"].shape[1]
    assert "labels" in batch  # which the caller may still need


def test_accumulated_gradients_weigh_every_token_alike(tmp_path, make_model, embeds_processor):
    data = Dataset.from_list(rows(["a", "a red heart and a blue dog", "b", "woman running in purple rain"]))

    def gradient(**kwargs):
        model = make_model(None)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        args = training_arguments(
            tmp_path, Seq2SeqTrainingArguments, max_steps=1, learning_rate=0.1, max_grad_norm=0, optim="sgd", **kwargs
        )
        trainer = ClipCapTrainer(
            model=model, args=args, train_dataset=data, data_collator=CaptioningCollator(embeds_processor)
        )
        trainer.train()
        return model.mapping_network.fc2.weight.detach().clone()

    whole = gradient(per_device_train_batch_size=4)
    torch.testing.assert_close(gradient(per_device_train_batch_size=1, gradient_accumulation_steps=4), whole)


@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
@pytest.mark.parametrize("source", ["image", "clip_embeds"])
def test_predict_with_generate_does_not_show_the_caption(
    tmp_path, make_model, processor, images, captions, source, label_smoothing_factor
):
    model = make_model()
    embeds = model.get_clip_embeds(processor(images=images, return_tensors="pt")["pixel_values"]).detach()
    column = {"image": images, "clip_embeds": embeds.tolist()}[source]
    args = training_arguments(
        tmp_path,
        Seq2SeqTrainingArguments,
        predict_with_generate=True,
        label_smoothing_factor=label_smoothing_factor,
    )
    trainer = ClipCapTrainer(
        model=model, args=args, data_collator=CaptioningCollator(processor, sample_captions=False)
    )

    def predict(texts, **kwargs):
        return trainer.predict(Dataset.from_dict({source: column, "captions": texts}), **kwargs)

    encoded = []
    model.vision_tower.register_forward_hook(lambda tower, args, kwargs, outputs: encoded.append(1), with_kwargs=True)
    prediction = predict(captions)
    batches = -(-len(captions) // args.eval_batch_size)
    assert len(encoded) == (batches if source == "image" else 0)  # once for loss and caption
    sequences = torch.as_tensor(prediction.predictions)
    expected = model.generate(clip_embeds=embeds)[:, 4:]
    found = sequences.masked_fill(sequences == IGNORED, 0)
    assert torch.equal(found[:, : expected.shape[1]], expected)
    # Other captions change the loss and nothing else.
    other = predict(captions[::-1])
    assert (other.predictions == prediction.predictions).all()
    assert other.metrics["test_loss"] != prediction.metrics["test_loss"]
    for i, caption in enumerate(captions):
        labels = prediction.label_ids[i]
        assert labels[labels != IGNORED].tolist() == [*ids(processor, caption), 0]
    assert predict(captions, max_new_tokens=2).predictions.shape[1] == 2
    assert predict(captions, max_length=3).predictions.shape[1] <= 3
    args.generation_max_length = 2
    assert predict(captions).predictions.shape[1] == 2
    assert predict(captions, num_beams=3, max_new_tokens=3).predictions.shape[1] <= 3


def test_evaluation_reports_the_loss_and_the_logits_in_place(tmp_path, make_model, embeds_processor, captions):
    model = make_model(None)
    data = Dataset.from_list(rows(captions))
    collator = CaptioningCollator(embeds_processor, sample_captions=False)
    found = {}

    def accuracy(prediction):
        logits, labels = prediction.predictions, prediction.label_ids
        found["shapes"] = logits.shape[:2], labels.shape
        return {}

    trainer = ClipCapTrainer(
        model=model,
        args=training_arguments(tmp_path, Seq2SeqTrainingArguments, per_device_eval_batch_size=8),
        data_collator=collator,
        eval_dataset=data,
        compute_metrics=accuracy,
    )
    loss = trainer.evaluate()["eval_loss"]
    batch = next(iter(DataLoader(data, batch_size=8, collate_fn=collator)))
    assert loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert found["shapes"][0] == found["shapes"][1]


@pytest.mark.parametrize("steps", [2, 4], ids=["first checkpoint", "second checkpoint"])
def test_a_full_disk_is_named(tmp_path, make_model, embeds_processor, captions, monkeypatch, steps):
    save = torch.save

    def fail(thing, path, *args, **kwargs):
        if f"checkpoint-{steps}" in str(path):
            monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
            raise RuntimeError("basic_ios::clear: iostream error")
        save(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fail)
    args = training_arguments(tmp_path, Seq2SeqTrainingArguments, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = ClipCapTrainer(
        model=make_model(None),
        args=args,
        train_dataset=rows(captions, torch.randn(8, 16)),
        data_collator=CaptioningCollator(embeds_processor),
    )
    kept = "no whole checkpoint yet" if steps == 2 else r"the last whole checkpoint is .*checkpoint-2\."
    with pytest.raises(OSError, match=f"is full; .*{kept}.* with `resume`"):
        trainer.train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == steps // 2
