"""Captions of held-out images in TensorBoard, W&B and trackio, read back from what these wrote."""

import json

import pytest
import torch
from clipcap_hf.cli.train import parse
from clipcap_hf.training.run import run_training
from datasets import Dataset, DatasetDict
from transformers import GPT2LMHeadModel


@pytest.fixture
def train(tmp_path, captions, images, text_config, tokenizer, monkeypatch):
    """Return `train(tracker)`, which trains for two evaluations and returns the run's folder."""
    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = Dataset.from_dict(
        {"image": images, "clip_embeds": torch.randn(8, 16).tolist(), "captions": [[caption] for caption in captions]}
    )
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    def run(tracker: str):
        options = {"text": "gpt2", "clip_embed_dim": 16, "prefix_length": 4, "data": "data", "out": "out"}
        options |= {"epochs": 2, "report_to": tracker, "num_samples": 0, "use_cpu": True, "generation_max_length": 6}
        run_training(*parse([word for name, value in options.items() for word in (f"--{name}", str(value))]))
        return tmp_path / "out"

    return run


def test_tensorboard(train, captions):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    (events,) = train("tensorboard").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    steps = [event.step for event in read.Scalars("eval/loss")]
    assert len(steps) == 2
    (tag,) = [tag for tag in read.Tags()["tensors"] if tag.startswith("held-out captions")]
    texts = read.Tensors(tag)
    assert [event.step for event in texts] == steps
    (table,) = tensor_util.make_ndarray(texts[-1].tensor_proto).reshape(-1)
    lines = table.decode().split("\n")
    assert lines[0] == "|before|now|reference|" and len(lines) == 2 + 6
    assert [line.split("|")[-2] for line in lines[2:]] == captions[:6]
    pictures = [tag for tag in read.Tags()["images"] if tag.startswith("held-out captions/")]
    assert len(pictures) == 6 and [event.step for event in read.Images(pictures[0])] == steps
    assert read.Images(pictures[0])[0].width == 48


def test_wandb(train, captions, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = train("wandb")
    wandb.finish()
    tables = sorted(out.parent.glob("wandb/offline-run-*/files/media/table/*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["before", "now", "reference"]
    assert [row[-1] for row in table["data"]] == captions[:6]
    assert len(list(out.parent.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 2 * 6


def test_trackio(train, tmp_path, captions, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("trackio")
    train("trackio")
    written = [path for path in (tmp_path / "trackio").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".png" for path in written) >= 6, written
    assert any(captions[0].encode() in path.read_bytes() for path in written if path.suffix != ".png")
