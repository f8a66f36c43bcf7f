"""Loading: columns of any name, held-out images, and unusable captions and images, which are named, never fatal."""

import json

import numpy as np
import pytest
import torch
from clipcap_hf.cli import main
from clipcap_hf.cli.train import parse
from clipcap_hf.training.arguments import DataArguments
from clipcap_hf.training.loading import cut_to_context, hold_out, load_data
from clipcap_hf.training.rows import EpochRows
from datasets import Dataset, DatasetDict


def test_columns_have_our_names(tmp_path, captions):
    rows = {"e": torch.randn(8, 4).tolist(), "text": captions, "captions": ["other"] * 8, "key": list(range(8))}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    named = {"caption_column": "text", "embeds_column": "e", "eval_split": "none"}
    train, _ = load_data(DataArguments(data=str(tmp_path / "data"), **named))
    assert sorted(train.column_names) == ["captions", "clip_embeds", "key"]
    assert list(train["captions"]) == [[caption] for caption in captions]


def test_a_tenth_of_the_images_is_held_out(caplog):
    ids = [row // 3 for row in range(120)]  # three rows per image
    data = Dataset.from_dict({"captions": [["a"]] * 120, "image_id": ids, "clip_embeds": [[0.0]] * 120})
    with caplog.at_level("INFO", logger="clipcap_hf"):
        train, held_out = hold_out(data, 0.1, seed=0)
    assert "4 of the 40 images are held out" in caplog.text
    assert not set(train["image_id"]) & set(held_out["image_id"])
    assert len(held_out) == 12 and len(train) == 108
    assert hold_out(data, 0.1, seed=0)[1]["image_id"][:] == held_out["image_id"][:]
    assert hold_out(data, 0.1, seed=1)[1]["image_id"][:] != held_out["image_id"][:]
    assert hold_out(data, 0, seed=0)[1] is None


def test_rows_of_the_same_embedding_are_one_image():
    embeds = np.repeat(np.random.default_rng(0).normal(size=(30, 4)), 2, axis=0)
    train, held_out = hold_out(Dataset.from_dict({"captions": [["a"]] * 60, "clip_embeds": embeds.tolist()}), 0.1, 0)
    assert not {tuple(row) for row in train["clip_embeds"]} & {tuple(row) for row in held_out["clip_embeds"]}


def test_few_images_are_all_trained_on(caplog):
    data = Dataset.from_dict({"captions": [["a"]] * 5, "clip_embeds": [[float(i)] for i in range(5)]})
    train, held_out = hold_out(data, 0.1, 0)
    assert len(train) == 5 and held_out is None and "Only 5 images: none is held out" in caplog.text


def test_equal_captions_are_noticed(tmp_path, caplog):
    Dataset.from_dict({"captions": ["a dog"] * 4, "clip_embeds": [[0.0]] * 4}).save_to_disk(tmp_path / "data")
    load_data(DataArguments(data=str(tmp_path / "data"), eval_split="none"))
    assert "All captions of the training data are the same, 'a dog'" in caplog.text


@pytest.fixture
def folder(tmp_path, images):
    """Make eight images with captions: a truncated image, a caption with the placeholder, one that is too long."""
    texts = ["a red heart", "a <image> dog", "x y " * 60, *(f"picture {i}" for i in range(3, 8))]
    (tmp_path / "images").mkdir()
    with open(tmp_path / "images" / "metadata.jsonl", "w") as file:
        for number, (image, text) in enumerate(zip(images, texts)):
            image.save(tmp_path / "images" / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "text": text}) + "\n")
    broken = tmp_path / "images" / "5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return tmp_path


@pytest.mark.parametrize("embed_once", [True, False])
@pytest.mark.parametrize("epochs", [1, 2])
def test_what_cannot_be_used_is_named_and_the_run_goes_on(folder, model_folder, caplog, embed_once, epochs):
    command = [
        "train",
        "--model",
        str(model_folder),
        "--data",
        str(folder / "images"),
        "--num_train_epochs",
        str(epochs),
    ]
    command += ["--output_dir", str(folder / "out"), "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"]
    assert main([*command, "--embed_once", str(embed_once), "--validation_share", "0"]) == 0
    assert "1 captions hold <image>, which is reserved, and were left out: row 1" in caplog.text
    assert "1 captions of the training data are longer than" in caplog.text
    failed = "".join(path.read_text() for path in folder.glob("out/_embeddings/*/failed.jsonl"))
    assert "5.png" in (failed if embed_once else caplog.text)
    assert (folder / "out" / "model.safetensors").is_file()


def test_unreadable_images_of_the_evaluation_are_left_out(folder, model_folder, caplog):
    command = ["train", "--model", str(model_folder), "--data", str(folder / "images"), "--max_steps", "1"]
    command += ["--eval_data", str(folder / "images"), "--eval_split", "train", "--embed_once", "False"]
    assert main([*command, "--output_dir", str(folder / "out"), "--use_cpu", "--disable_tqdm", "True"]) == 0
    assert (
        "1 images of the evaluation data cannot be read and are left out: " in caplog.text and "5.png" in caplog.text
    )


def test_a_row_that_cannot_be_read_is_replaced_and_named_once(caplog):
    class Rows(list):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("image file is truncated")
            return {"captions": str(index)}

    rows = EpochRows(Rows(range(4)), name=lambda row: f"{row}.png")
    for _ in range(2):
        assert [row["captions"] for row in rows.__getitems__([0, 2])] == ["0", "3"]
    assert caplog.text.count("2.png cannot be read and is left out (image file is truncated)") == 1


def test_captions_longer_than_the_context_are_cut_and_counted(tokenizer, captions, caplog):
    data = Dataset.from_dict({"captions": [[captions[0]], ["x y " * 60]]})
    assert cut_to_context(data, tokenizer, 30, None, "training") == 30
    assert "1 captions of the training data are longer than the 30 tokens" in caplog.text and "row 1" in caplog.text
    caplog.clear()
    assert cut_to_context(data, tokenizer, 30, 20, "training") == 20 and not caplog.text


def test_embedded_captioners_go_by_their_short_names():
    from clipcap_hf.training.captioner import load_captioner

    model_args, data_args, _ = parse(["--output_dir", "out"])
    model, _ = load_captioner(model_args, data_args)
    assert model.config.clip_embed_dim == 384
    model_args, data_args, _ = parse(["--model", "photo-mini", "--output_dir", "out"])
    model, _ = load_captioner(model_args, data_args)
    assert model.config.vision_config.model_type == "detector_vision_model"


def test_a_finished_run_is_not_overwritten(tmp_path, model_folder, captions, capsys):
    rows = Dataset.from_dict({"clip_embeds": torch.randn(8, 16).tolist(), "captions": captions})
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    command = ["train", "--model", str(model_folder), "--data", str(tmp_path / "data"), "--max_steps", "1"]
    command += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--save_strategy", "no", "--disable_tqdm", "True"]
    assert main(command) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert main(command) == 1
    assert "already holds config.json" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_leftovers_of_dead_runs_are_removed(tmp_path):
    from clipcap_hf.training.checkpoints import remove_leftovers

    (tmp_path / ".saving-abc").mkdir()
    (tmp_path / ".scores.json.x.tmp").write_text("{")
    (tmp_path / "checkpoint-3").mkdir()
    for kept in ("scores.json", ".gitignore"):
        (tmp_path / kept).write_text("")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "checkpoint-2", "scores.json"]
