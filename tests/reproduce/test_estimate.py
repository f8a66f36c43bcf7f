"""The cost told in advance: it covers every stage, grows with the work, and reads no split of a claim."""

import json
import os
from pathlib import Path

import pytest
from clipcap_hf.assets import EMOJI_MINI
from clipcap_hf.benchmark.captioners import write_jpegs
from clipcap_hf.reproduce import Settings
from clipcap_hf.reproduce.estimate import SIZES, TrainingCost, estimate, estimate_text
from clipcap_hf.reproduce.rehearsal import build_models


def settings(tmp_path, *tables, **values):
    values = {"variants": ("mlp",), "data": "nowhere", "tokenizer": "python", **values}
    return Settings(tables, out=str(tmp_path), device="cpu", **values)


def test_every_stage_has_hours_and_disk(tmp_path):
    device, costs = estimate(settings(tmp_path, "coco", "nocaps"), shape="tiny", seconds=0.1, images=24)
    assert device["type"] == "cpu" and set(device["models"].values()) == {"random weights"}
    assert device["images"] == {"coco": "made up, of COCO's size"}
    assert [cost.stage for cost in costs] == [
        "embed coco",
        "train mlp on coco",
        "evaluate mlp on coco",
        "evaluate mlp on nocaps",
    ]
    assert all(cost.hours > 0 and cost.disk > 0 for cost in costs)
    text = estimate_text((device, costs))
    assert all(cost.stage in text for cost in costs) and text.splitlines()[-1].startswith("all")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_existing_captioners_are_not_trained(tmp_path):
    chosen = settings(tmp_path, "nocaps", source="checkpoint", path=str(EMOJI_MINI))
    costs = estimate(chosen, shape="tiny", seconds=0.1, images=24)[1]
    assert [cost.stage for cost in costs] == ["evaluate mlp on nocaps"]


def test_models_and_images_that_are_there_are_measured(tmp_path):
    build_models(tmp_path)
    publish_flickr8k(tmp_path / "data", 24)
    parts = {"clip": str(tmp_path / "clip"), "language-model": str(tmp_path / "gpt2")}
    chosen = settings(tmp_path / "out", "flickr8k", chosen=parts, data=str(tmp_path / "data"), seeds=3)
    device, costs = estimate(chosen, seconds=0.1, images=24)
    assert device["models"] == parts and device["images"] == {"flickr8k": "24 training images of flickr8k"}
    assert [cost.stage for cost in costs] == ["embed flickr8k", "train mlp on flickr8k", "evaluate mlp on flickr8k"]
    # Embeddings in float32 with their captions; three captioners, each with a checkpoint that has AdamW's two moments.
    assert 7000 * 4 * 384 < costs[0].disk < 7000 * (4 * 384 + 1500)
    assert costs[1].disk > 3 * 4 * os.path.getsize(tmp_path / "gpt2/model.safetensors")


def publish_flickr8k(root: Path, number: int):
    """Write training images as Flickr8k's publishers do, and none of its other splits."""
    (root / "Flicker8k_Dataset").mkdir(parents=True)
    rows = []
    for path in write_jpegs(root / "Flicker8k_Dataset", number):
        sentences = [{"raw": f"A dog runs {number} times ."} for number in range(5)]
        rows.append({"filename": Path(path).name, "imgid": len(rows), "split": "train", "sentences": sentences})
    (root / "dataset_flickr8k.json").write_text(json.dumps({"images": rows, "dataset": "flickr8k"}))


def test_a_training_costs_its_steps_evaluations_and_checkpoints():
    cost = TrainingCost(start=10, step=0.5, evaluated=0.01, checkpoint=3, disk=0)
    # Of Flickr8k: 30,000 captions ten times in batches of 40, the loss on 1,000 images eleven times, 7 checkpoints.
    assert cost.hours(SIZES["flickr8k"], 1000) * 3600 == pytest.approx(10 + 7500 * 0.5 + 11_000 * 0.01 + 7 * 3)


def test_the_sizes_are_those_of_the_paper():
    assert SIZES["coco"].train_images == 113_287 and 566_000 <= SIZES["coco"].captions < 567_000
