"""`Seq2SeqTrainer` of transformers and `SFTTrainer` of TRL train captioners, as the training guide shows."""

import json
import re
from pathlib import Path

import pytest
import torch
from clipcap_hf import EMOJI_MINI, CaptioningCollator, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.data import load_emoji
from datasets import Dataset
from transformers import LlamaConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, pipeline


ROOT = Path(__file__).parents[2]


def code_with(page: Path, name: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = [block for block in blocks if name in block]
    return block


@pytest.fixture
def readme_names(tmp_path, monkeypatch, clip_config, text_config, tokenizer, image_processor, images, captions):
    """Run the README's script up to its trainer, with tiny models and images; return its names."""
    from transformers import CLIPVisionModelWithProjection, GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    CLIPVisionModelWithProjection(clip_config).save_pretrained("clip")
    image_processor.save_pretrained("clip")
    GPT2LMHeadModel(text_config).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    Path("my-images").mkdir()
    with open("my-images/metadata.jsonl", "w") as metadata:
        for place, (image, caption) in enumerate(zip(images, captions)):
            image.save(f"my-images/{place}.png")
            metadata.write(json.dumps({"file_name": f"{place}.png", "text": caption}) + "\n")
    code = code_with(ROOT / "README.md", "Trainer(").split("trainer = Trainer(")[0]
    code = code.replace("openai/clip-vit-base-patch32", "clip").replace("openai-community/gpt2", "gpt2")
    names = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("trainer_class", ["Seq2SeqTrainer", "SFTTrainer"])
def test_block_of_the_guide(readme_names, trainer_class):
    if trainer_class == "SFTTrainer":
        pytest.importorskip("trl")
    code = code_with(ROOT / "examples" / "guides" / "training.md", f" {trainer_class}(")
    quick = "num_train_epochs=1, use_cpu=True, bf16=False, logging_steps=1, report_to='none'"
    code = code.replace("num_train_epochs=10", quick)
    before = {name: weight.clone() for name, weight in readme_names["model"].named_parameters()}
    exec(compile(code, "training.md", "exec"), readme_names)
    log = readme_names["trainer"].state.log_history
    assert log[0]["loss"] > 0
    if trainer_class == "Seq2SeqTrainer":
        assert 0 <= next(entry["eval_exact"] for entry in log if "eval_exact" in entry) <= 1
    changed = {
        name.split(".")[0]
        for name, weight in ClipCapForConditionalGeneration.from_pretrained("my-captioner").named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert changed == {"mapping_network", "language_model"}
    captions = pipeline("image-captioning", model="my-captioner")("my-images/0.png")
    assert isinstance(captions[0]["generated_text"], str)


@pytest.mark.parametrize("settings", [{}, {"generation_num_beams": 3}])
def test_seq2seq_trainer_predicts_what_generate_writes(tmp_path, settings):
    """Real captions of emoji end early, at different lengths, so that the trainer has to pad them."""
    model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI)
    processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    rows = load_emoji("validation").select(range(7))
    found = {}

    def compute_metrics(prediction):
        found["lengths"] = {int((ids != processor.pad_token_id).sum()) for ids in prediction.predictions}
        for name in ("predictions", "label_ids"):
            found[name] = processor.batch_decode(getattr(prediction, name), skip_special_tokens=True)
        return {}

    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=3,
        remove_unused_columns=False,
        predict_with_generate=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    Seq2SeqTrainer(
        model=model,
        args=arguments,
        eval_dataset=rows,
        data_collator=CaptioningCollator(processor, sample_captions=False),
        processing_class=processor,
        compute_metrics=compute_metrics,
    ).evaluate()
    assert len(found["lengths"]) > 1
    assert found["label_ids"] == [captions[0] for captions in rows["captions"]]
    num_beams = settings.get("generation_num_beams", 1)
    inputs = [processor(images=image, return_tensors="pt") for image in rows["image"]]
    generated = [model.generate(**one, num_beams=num_beams) for one in inputs]
    assert found["predictions"] == [processor.batch_decode(ids, skip_special_tokens=True)[0] for ids in generated]


# -- TRL


@pytest.fixture
def sft_trainer(tmp_path, processor, images, captions):
    """Return `sft_trainer(model, form, **settings)`: TRL's trainer on the images as prompts or as messages."""
    trl = pytest.importorskip("trl")

    def make(model, form, **settings):
        def example(image, caption):
            caption += processor.tokenizer.eos_token
            if form == "prompts":
                return {"image": image, "prompt": "", "completion": caption}
            messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": caption}]
            return {"images": [image], "messages": messages}

        rows = Dataset.from_list([example(image, caption) for image, caption in zip(images, captions)])
        arguments = trl.SFTConfig(
            str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=len(rows),
            per_device_eval_batch_size=len(rows),
            learning_rate=1e-2,
            logging_steps=1,
            max_length=None,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            assistant_only_loss=form == "messages",
        )
        return trl.SFTTrainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=processor, **settings
        )

    return make


@pytest.mark.parametrize("form", ["prompts", "messages"])
@pytest.mark.parametrize("language_model", ["gpt2", "llama"])
def test_trl_has_the_loss_of_trainer_and_learns(
    make_model, processor, images, captions, sft_trainer, form, language_model
):
    config = {"mapping_type": "transformer"}
    if language_model == "llama":
        sizes = {"vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config["text_config"] = LlamaConfig(**sizes, intermediate_size=48)
    model = make_model(**config)
    batch = CaptioningCollator(processor)([{"image": i, "captions": c} for i, c in zip(images, captions)])
    with torch.no_grad():
        expected = model(**batch).loss
    trainer = sft_trainer(model, form)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_trl_trains_lora_adapters(make_model, sft_trainer):
    peft = pytest.importorskip("peft")
    model = make_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    adapters = peft.LoraConfig(r=2, target_modules=["c_attn"])
    trainer = sft_trainer(model, "prompts", peft_config=adapters)
    trainer.train()
    trained = trainer.model.get_base_model()
    assert trained is model
    for name, weight in trained.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")]), name
    assert any(weight.any() for name, weight in trained.named_parameters() if ".lora_B" in name)
