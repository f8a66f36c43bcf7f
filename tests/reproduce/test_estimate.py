"""The cost told in advance: it covers every stage, grows with the work, and reads no data."""

from clipcap_hf.reproduce import Settings
from clipcap_hf.reproduce.estimate import SIZES, estimate, estimate_text


def settings(tmp_path, *tables, **values):
    return Settings(tables, ("all",), out=str(tmp_path), data="nowhere", device="cpu", **values)


def test_every_stage_has_hours_and_disk(tmp_path):
    device, costs = estimate(settings(tmp_path, "coco", "nocaps"), shape="tiny")
    assert device["type"] == "cpu"
    assert [cost.stage for cost in costs] == [
        "embed coco",
        "train transformer on coco",
        "train mlp on coco",
        "evaluate transformer on coco",
        "evaluate mlp on coco",
        "evaluate transformer on nocaps",
        "evaluate mlp on nocaps",
    ]
    assert all(cost.hours > 0 and cost.disk > 0 for cost in costs)
    text = estimate_text((device, costs))
    assert all(cost.stage in text for cost in costs) and text.splitlines()[-1].startswith("all")
    assert not list(tmp_path.iterdir())


def test_existing_captioners_are_not_trained(tmp_path):
    chosen = settings(tmp_path, "nocaps", source="checkpoint", path=str(tmp_path))
    assert [cost.stage.split()[0] for cost in estimate(chosen, shape="tiny")[1]] == ["evaluate"] * 2


def test_the_sizes_are_those_of_the_paper():
    assert SIZES["coco"].train_images == 113_287 and 566_000 <= SIZES["coco"].captions < 567_000
