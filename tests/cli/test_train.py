"""`clipcap train`: recipes from files and flags, the files of a run, and errors for bad input."""

import io
import json
import math
import re
import sys
import tarfile

import clipcap_hf
import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds
from clipcap_hf.cli import main
from clipcap_hf.cli.train import parse
from clipcap_hf.data import load_emoji
from clipcap_hf.metrics import tokenization
from clipcap_hf.training.captioner import load_captioner
from clipcap_hf.training.loading import load_data
from clipcap_hf.training.rows import caption_lengths, one_row_per_caption
from clipcap_hf.training.run import run_training
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import GPT2LMHeadModel


@pytest.fixture
def gpt2_folder(tmp_path, text_config, tokenizer):
    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def data_folder(tmp_path, captions):
    embeds = torch.randn(8, 16)
    rows = Dataset.from_dict(
        {"clip_embeds": embeds.tolist(), "captions": [[caption, f"{caption}!"] for caption in captions]}
    )
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def flags(tmp_path, gpt2_folder, data_folder, **settings) -> list[str]:
    settings = {
        "text": gpt2_folder,
        "clip_embed_dim": 16,
        "prefix_length": 4,
        "data": data_folder,
        "output_dir": tmp_path / "out",
        "references": "first",
        "max_steps": 60,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "warmup_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "save_strategy": "steps",
        "save_steps": 20,
        "logging_steps": 10,
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    return ["train", *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]


# -- arguments


def test_the_papers_recipe(gpt2_folder):
    command = ["--recipe", "paper", "--text", str(gpt2_folder), "--clip_embed_dim", "16", "--output_dir", "out"]
    model_args, data_args, args = parse(command)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.learning_rate) == (10, 40, 2e-5)
    assert (args.warmup_steps, args.lr_scheduler_type, args.weight_decay, args.max_grad_norm) == (5000, "linear", 0, 0)
    assert (args.adam_epsilon, args.bf16, args.fp16) == (1e-6, False, False)
    assert data_args.references == "all"
    model, processor = load_captioner(model_args, data_args)
    assert (model.config.mapping_type, model.config.prefix_length, processor.prefix_length) == ("mlp", 10, 10)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model_args.mapping_type = "transformer"
    model_args.config_overrides = {"mapping_num_heads": 4}
    model, _ = load_captioner(model_args, data_args)
    assert (model.config.prefix_length, model.config.clip_length) == (40, 40)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"mapping_network"}


def test_switches_need_no_value():
    switches = ["--freeze_language_model", "--normalize_clip_embeds", "--load_best_model_at_end"]
    model_args, _, args = parse([*switches, "--gradient_checkpointing", "--text", "gpt2", "--output_dir", "out"])
    assert model_args.freeze_language_model and model_args.normalize_clip_embeds and args.load_best_model_at_end
    model_args, _, args = parse(["--freeze_language_model", "False", "--text", "gpt2", "--output_dir", "out"])
    assert model_args.freeze_language_model is False and model_args.normalize_clip_embeds is None


def test_warm_start(tmp_path, gpt2_folder, data_folder, caplog):
    settings = {"warm_start": 30, "freeze_language_model": True, "max_steps": 1, "eval_split": "none"}
    with caplog.at_level("INFO", logger="clipcap_hf"):
        assert main(flags(tmp_path, gpt2_folder, data_folder, **settings, eval_strategy="no")) == 0
    first, last = re.search(r"Warm start of 30 steps: loss (\S+) to (\S+)", caplog.text).groups()
    assert float(last) < 0.8 * float(first)


def test_lora_without_the_frozen_parts(tmp_path, gpt2_folder, data_folder, caplog):
    pytest.importorskip("peft")
    settings = {"lora_r": 2, "save_frozen": False, "max_steps": 2, "eval_split": "none", "eval_strategy": "no"}
    with caplog.at_level("INFO", logger="clipcap_hf"):
        assert main(flags(tmp_path, gpt2_folder, data_folder, **settings)) == 0
    assert "language_model 512 of" in caplog.text
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        saved = set(weights.keys())
    assert saved and all(key.startswith("mapping_network.") or ".lora_" in key for key in saved)
    model = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.generate(clip_embeds=torch.randn(1, 16), max_new_tokens=2, pad_token_id=0).shape[0] == 1


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_flags_win_over_the_file(tmp_path, suffix):
    recipe = {"text": "gpt2", "data": "emoji", "output_dir": "out", "learning_rate": 1e-4, "append_eos": False}
    text = json.dumps(recipe) if suffix == "json" else "\n".join(f"{key}: {value}" for key, value in recipe.items())
    (tmp_path / f"recipe.{suffix}").write_text(text)
    path = str(tmp_path / f"recipe.{suffix}")
    model_args, data_args, args = parse([path, "--learning-rate", "3e-4", "--references", "random"])
    assert (model_args.text, args.learning_rate) == ("gpt2", 3e-4)
    assert (data_args.data, data_args.append_eos, data_args.references) == ("emoji", False, "random")
    assert parse([path])[2].learning_rate == 1e-4
    (tmp_path / "recipe.yaml").write_text("output_dir: out\neval_strategy: no\nsave_strategy: no\n")
    assert parse([str(tmp_path / "recipe.yaml")])[2].eval_strategy == "no"


def test_bad_recipes(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("output_dir: out\nlearning_rat: 1\n")
    assert main(["train", str(tmp_path / "a.yaml")]) == 1
    assert "unknown options: learning_rat. See clipcap train --help" in capsys.readouterr().err
    (tmp_path / "b.json").write_text("{")
    assert main(["train", str(tmp_path / "b.json")]) == 1
    assert "neither YAML nor JSON" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("output_dir: out\nreferences: rnd\n")
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    assert "c.yaml: `references` must be one of random, all, first, together, but is 'rnd'" in capsys.readouterr().err
    (tmp_path / "d.yaml").write_text("data: emoji\n")
    assert main(["train", str(tmp_path / "d.yaml")]) == 1
    assert "Pass `output_dir`" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train"])
    assert "the following arguments are required: --data, --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--early-stopping-patience" in capsys.readouterr().out


# -- runs


def test_a_run_leaves_a_captioner_with_scores_curve_and_samples(tmp_path, gpt2_folder, data_folder, captions, caplog):
    settings = {"early_stopping_patience": 3, "metric_for_best_model": "cider"}
    with caplog.at_level("INFO", logger="clipcap_hf"):
        assert main(flags(tmp_path, gpt2_folder, data_folder, **settings)) == 0
    out = tmp_path / "out"
    files = re.search(r"The captioner is in \S+, with (.*)\.", caplog.text)[1].split(", ")
    assert {"scores.json", "samples.json"} <= set(files) and all((out / name).is_file() for name in files)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["eval_cider"] > 100 and scores["train_loss"] < 5
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    ciders = [entry["eval_cider"] for entry in history if "eval_cider" in entry]
    assert len(ciders) >= 3 and scores["eval_cider"] == max(ciders)  # the best checkpoint is the one that is saved
    pytest.importorskip("matplotlib")
    assert Image.open(out / "curve.png").width > 500
    samples = json.loads((out / "samples.json").read_text())
    assert [sample["references"][0] for sample in samples] == captions

    model = ClipCapForConditionalGeneration.from_pretrained(out).eval()
    processor = ClipCapProcessor.from_pretrained(out)
    assert getattr(model.config, "use_cache", True)
    data = DatasetDict.load_from_disk(data_folder)["validation"]
    found = caption_embeds(model, processor, torch.tensor(data["clip_embeds"]), progress=False)
    assert found == [sample["caption"] for sample in samples]
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


def test_the_first_step_is_shown_and_the_table_shows_mean_losses(tmp_path, gpt2_folder, data_folder, caplog):
    with caplog.at_level("INFO", logger="clipcap_hf"):
        assert main(flags(tmp_path, gpt2_folder, data_folder, max_steps=20, predict_with_generate=False)) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert list(losses) == [1, 10, 20]
    assert f"step 1 of 20: loss {losses[1]:.3f}" in caplog.text
    mean = (losses[1] + 9 * losses[10] + 10 * losses[20]) / 20
    shown = re.search(r"\n +\S+ +20 +(\S+) ", "\n".join(caplog.messages))[1]
    assert abs(float(shown) - mean) < 2e-3


def test_images_of_the_embedded_set(tmp_path, gpt2_folder):
    """Train with the tower of a captioner: images are encoded once, and sample captions are drawn at the end."""
    command = flags(tmp_path, gpt2_folder, "emoji", vision="emoji-mini", clip_embed_dim=384, max_steps=3)
    command += ["--embed_once", "--max_train_samples", "16", "--max_eval_samples", "4", "--eval_strategy", "no"]
    assert main([*command, "--save_strategy", "no"]) == 0
    out = tmp_path / "out"
    assert Image.open(out / "samples.png").width > 1000
    trained = ClipCapForConditionalGeneration.from_pretrained(out)
    shipped = ClipCapForConditionalGeneration.from_pretrained(clipcap_hf.EMOJI_MINI)
    for name, value in shipped.vision_tower.state_dict().items():
        assert torch.equal(trained.vision_tower.state_dict()[name], value), name
    captioner = clipcap_hf.ImageCaptioningPipeline(model=trained, processor=ClipCapProcessor.from_pretrained(out))
    assert isinstance(captioner(load_emoji("validation")[0]["image"])[0]["generated_text"], str)


def test_missing_images_and_ids(tmp_path, gpt2_folder, images, capsys):
    names = ["a.png", "b.png", "a.png"]
    rows = {"image": [str(tmp_path / name) for name in names], "text": ["one", "two", "three"], "key": [7, 8, 7]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    images[0].save(tmp_path / "a.png")
    settings = {"data_format": "hub", "caption_column": "text", "id_column": "key", "vision": "emoji-mini"}
    command = flags(tmp_path, gpt2_folder, tmp_path / "rows", **settings, clip_embed_dim=384, eval_split="none")
    assert main(command) == 1
    assert "1 of the 2 images" in (said := capsys.readouterr().err) and "--missing skip" in said
    train, _ = load_data(parse([*command[1:], "--missing", "skip"])[1])
    assert [row["captions"] for row in train] == [["one", "three"]]
    assert main([*command, "--data_format", "coco"]) == 1
    assert "it takes no 'id_column'" in capsys.readouterr().err


@pytest.mark.parametrize("eval_strategy", ["steps", "no"])
def test_evaluation_without_captions(tmp_path, gpt2_folder, data_folder, eval_strategy):
    settings = {"predict_with_generate": False, "max_steps": 40, "eval_strategy": eval_strategy}
    assert main(flags(tmp_path, gpt2_folder, data_folder, **settings)) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert "eval_loss" in scores and "eval_cider" not in scores
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert scores["eval_loss"] == min(losses)
    assert not (tmp_path / "out" / "samples.json").exists()


@pytest.mark.parametrize(
    ("data_format", "column"), [("imagefolder", "text"), ("imagefolder", "text,more"), ("webdataset", "json.caption")]
)
def test_named_columns_of_readers(tmp_path, gpt2_folder, images, data_format, column):
    folder = tmp_path / "images"
    rows = [{"file_name": f"{i}.png", "text": f"one {i}", "more": f"two {i}", "caption": f"one {i}"} for i in range(4)]
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        for row, image in zip(rows, images):
            image.save(folder / split / row["file_name"])
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"vision": "emoji-mini", "max_steps": 1, "image_column": "image", "save_strategy": "no"}
    if data_format == "webdataset":
        with tarfile.open(folder / "0.tar", "w") as tar:
            for i, row in enumerate(rows):
                (folder / f"{i}.json").write_text(json.dumps(row))
                tar.add(folder / "train" / f"{i}.png", f"{i}.png")
                tar.add(folder / f"{i}.json", f"{i}.json")
        settings |= {"streaming": True, "image_column": "png", "eval_split": "train", "max_eval_samples": 2}
    settings |= {"data_format": data_format, "caption_column": column, "clip_embed_dim": 384}
    assert main(flags(tmp_path, gpt2_folder, folder, **settings)) == 0
    samples = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert samples[1]["references"] == (["one 1", "two 1"] if "," in column else ["one 1"])
    assert (tmp_path / "out" / "samples.png").is_file()


def test_images_are_encoded_once(tmp_path, gpt2_folder, monkeypatch):
    """Images are embedded once by default if training shows them several times, and never again in the same folder."""
    data = load_emoji("validation").select(range(12))
    pixels = io.BytesIO()
    data[0]["image"].save(pixels, "PNG")
    (tmp_path / "whole.png").write_bytes(pixels.getvalue())
    (tmp_path / "broken.png").write_bytes(pixels.getvalue()[:100])
    images = [*data["image"][:9], *(str(tmp_path / f"{name}.png") for name in ("broken", "whole", "whole"))]
    columns = {"image": images, "captions": [["one", f"two {i}"] for i in range(12)], "image_id": list(range(12))}
    features = {"image": ImageFeature(), "captions": List(Value("string")), "image_id": Value("int64")}
    rows = Dataset.from_dict(columns, features=Features(features))
    DatasetDict({"train": rows, "validation": rows.select(range(4))}).save_to_disk(tmp_path / "images")

    from clipcap_hf.model.modeling_open_clip import OpenClipVisionModel

    encoded = []
    forward = OpenClipVisionModel.forward

    def counting(self, pixel_values, *args, **kwargs):
        encoded.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(OpenClipVisionModel, "forward", counting)
    settings = {"vision": "emoji-mini", "clip_embed_dim": 384, "references": "all", "num_train_epochs": 2}
    settings |= {"max_steps": -1, "eval_strategy": "epoch", "save_strategy": "epoch", "num_samples": 2}
    command = flags(tmp_path, gpt2_folder, tmp_path / "images", **settings)
    assert main(command) == 0
    # The broken image and the blank one that tells the shape of embeddings apart.
    assert sum(encoded) == 11 + 4 + 2
    steps = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["max_steps"]
    assert steps == 2 * math.ceil(2 * 11 / 8)
    assert Image.open(tmp_path / "out" / "samples.png").width > 500
    failed = (path.read_text() for path in (tmp_path / "out" / "_embeddings").glob("train-*/failed.jsonl"))
    assert '"image_id": 9' in next(failed)
    encoded.clear()
    assert main([*command, "--resume", "--num_train_epochs", "3"]) == 0
    assert sum(encoded) == 2  # the blanks
    with pytest.raises(ValueError, match="needs a frozen tower"):
        run_training(*parse([*command[1:], "--resume", "--embed_once", "--freeze_vision", "False"]))


def test_streams_are_not_read_ahead(tmp_path, gpt2_folder, captions, monkeypatch):
    from clipcap_hf.training import loading
    from datasets import IterableDataset

    read = []

    def endless():
        for number in range(10**9):
            read.append(number)
            yield {"clip_embeds": [float(number % 7)] * 16, "captions": [captions[number % 8], "b"]}

    monkeypatch.setattr(loading, "_load_split", lambda *_: IterableDataset.from_generator(endless))
    command = flags(tmp_path, gpt2_folder, "web", max_steps=3, references="random", streaming=True, eval_split="none")
    assert main(command) == 0
    assert 24 <= len(read) <= 60
    with pytest.raises(ValueError, match="streamed and has no length: pass `max_steps`"):
        run_training(*parse(command[1:] + ["--max_steps", "-1", "--output_dir", str(tmp_path / "other")]))


def test_every_reference_a_row(captions):
    data = Dataset.from_dict({"clip_embeds": [[1.0], [2.0]], "captions": [captions[:2], captions[2:5]]})
    rows = one_row_per_caption(data)
    assert rows["captions"] == captions[:5]
    assert list(rows["clip_embeds"]) == [[1.0]] * 2 + [[2.0]] * 3
    assert len(rows) == 5
    assert rows[3] == rows.__getitems__([0, 3])[1] == {"clip_embeds": [2.0], "captions": captions[3]}
    streamed = one_row_per_caption(data.to_iterable_dataset())
    assert [row["captions"] for row in streamed] == captions[:5]


def test_lengths_are_of_the_longest_reference(tokenizer, captions):
    lengths = caption_lengths([captions[:3], captions[3]], tokenizer, batch_size=1)
    assert lengths == [
        max(len(tokenizer(caption)["input_ids"]) for caption in captions[:3]),
        len(tokenizer(captions[3])["input_ids"]),
    ]


# -- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_column": "text"}, "no column 'text'; it has clip_embeds, captions. Pass `caption_column`"),
        ({"embeds_column": "e"}, "neither a column 'image' nor 'e'; it has clip_embeds, captions"),
        ({"train_split": "trian"}, "no split 'trian'; it has train, validation"),
        ({"eval_split": "test"}, "no split 'test'; it has train, validation"),
        ({"clip_embed_dim": 12}, "12"),
        ({"data_format": "cocoa"}, "`data_format` must be one of auto, emoji, saved, karpathy"),
        ({"embeds_noise": 0.1}, "`embeds_noise` needs a captioner with `normalize_clip_embeds`"),
        ({"text_only": True}, "`text_only` needs `text_tower`"),
        ({"model": "emoji-mini"}, "Pass either `model`"),
        ({"streaming": True, "data_format": "coco"}, "`streaming` works with imagefolder"),
        ({"eval_split": "none", "early_stopping_patience": 2}, "needs an evaluation set"),
        ({"eval_strategy": "no", "early_stopping_patience": 2}, "needs evaluations and checkpoints"),
        ({"predict_with_generate": False, "metric_for_best_model": "cider"}, "needs `predict_with_generate`"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must be False"),
        ({"resume_from_checkpoint": "nowhere"}, "there is no folder nowhere"),
        ({"resume_from_checkpoint": "."}, "holds no readable trainer_state.json of a run"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(tmp_path, gpt2_folder, data_folder, capsys, settings, message):
    assert main(flags(tmp_path, gpt2_folder, data_folder, **settings)) == 1
    assert message in capsys.readouterr().err


def test_what_the_scores_need_is_checked_before_training(tmp_path, gpt2_folder, data_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fugashi", None)  # as if it were not installed
    tokenization._japanese_tagger.cache_clear()
    assert main(flags(tmp_path, gpt2_folder, data_folder, eval_tokenizer="ja")) == 1
    assert 'tokenizer="ja" needs fugashi and ipadic: pip install' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_and_evaluation_data_of_different_columns(tmp_path, gpt2_folder, data_folder, captions, capsys):
    other = Dataset.from_dict({"clip_embeds": torch.randn(8, 16).tolist(), "text": captions})
    DatasetDict({"validation": other}).save_to_disk(tmp_path / "other")
    assert main(flags(tmp_path, gpt2_folder, data_folder, eval_data=tmp_path / "other")) == 1
    assert (
        "The evaluation data (`eval_data`) has no column 'captions'; it has clip_embeds, text"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("bad", [None, [None], [], ["ok", " "], "strings"], ids=str)
def test_saved_rows_without_captions(tmp_path, gpt2_folder, captions, capsys, caplog, bad):
    def save(texts):
        data = Dataset.from_dict({"clip_embeds": torch.randn(len(texts), 16).tolist(), "captions": texts})
        DatasetDict({"train": data}).save_to_disk(tmp_path / "rows")
        return flags(tmp_path, gpt2_folder, tmp_path / "rows", eval_split="none", references="random", max_steps=3)

    command = save(["", *captions[1:], None] if bad == "strings" else [bad, *([caption] for caption in captions[1:])])
    assert main(command) == 0
    train, _ = load_data(parse(command[1:])[1])
    if bad == ["ok", " "]:
        assert "1 captions are empty" in caplog.text and train[0]["captions"] == ["ok"] and len(train) == 8
    else:
        assert "rows without a caption were left out, first row 0" in caplog.text and len(train) == 7
        assert (
            main([*save([bad, bad] if bad != "strings" else ["", " "]), "--output_dir", str(tmp_path / "other")]) == 1
        )
        assert "has no captions in the column 'captions'" in capsys.readouterr().err


def test_images_without_captions(tmp_path, gpt2_folder, images, capsys):
    images[0].save(tmp_path / "a.png")
    (tmp_path / "train.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}]}))
    settings = {"data_format": "coco", "eval_split": "none"}
    assert main(flags(tmp_path, gpt2_folder, tmp_path / "train.json", **settings)) == 1
    assert "The training data (`data`) has no captions" in capsys.readouterr().err


def test_a_warm_up_for_larger_data_is_noticed(tmp_path, gpt2_folder, data_folder, caplog):
    assert main(flags(tmp_path, gpt2_folder, data_folder, max_steps=2, warmup_steps=5000, num_samples=0)) == 0
    assert "The warm-up of 5000 steps" in caplog.text
