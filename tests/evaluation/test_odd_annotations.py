"""Malformed annotation files: an error that names file and entry, never a traceback or silence."""

import json
import random

import pytest
from clipcap_hf.cli import main
from clipcap_hf.data import load_captions
from clipcap_hf.evaluation import read_references, read_results


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"annotations": None, "images": None}, None),  # nothing in it, and no crash
        ({"annotations": 3}, "annotations must be a list, not 3"),
        ({"annotations": {"a": 1}}, "annotations must be a list"),
        ({"annotations": ["a cat"]}, "annotation 0 must be like .*'a cat'"),
        ({"annotations": [{"caption": "a"}]}, "annotation 0: image_id must be a whole number or a string, not None"),
        ({"annotations": [{"image_id": [1], "caption": "a"}]}, r"annotation 0: image_id .* not \[1\]"),
        ({"annotations": [{"image_id": True, "caption": "a"}]}, "annotation 0: image_id .* not True"),
        ({"annotations": [{"image_id": 2**70, "caption": "a"}]}, "annotation 0: image_id must fit into 64 bits"),
        ({"annotations": [{"image_id": 1}]}, "annotation 0: the caption must be a string, not None"),
        (
            {"annotations": [{"image_id": 1, "caption": ["a"]}]},
            r"annotation 0: the caption must be a string, not \['a'\]",
        ),
        ({"annotations": [{"image_id": 1, "caption": {"x": LONG}}]}, "annotation 0: the caption must be a string"),
        ({"annotations": [], "images": 5}, "images must be a list, not 5"),
        ({"annotations": [], "images": [None]}, "image 0 must be like .*None"),
        ({"annotations": [], "images": [{"file_name": "a.jpg"}]}, "image 0: id must be"),
        ({"annotations": [], "images": [{"id": 1.5}]}, "image 0: id must be .* not 1.5"),
        ({"annotations": [], "images": [{"id": 1, "domain": ["in-domain"]}]}, "image 0: domain must be a string"),
        ({"annotations": [], "images": [{"id": 1}, {"id": 1}]}, "same image id twice: 1"),
        ({"1": ["a"], "2": [None]}, "image 2: the caption must be a string, not None"),
        ({LONG: [3]}, "the caption must be a string, not 3"),
        ({LONG: LONG}, "references are"),
        ([LONG], "references are .* a list"),
        (LONG, "references are .* a str"),
    ],
)  # fmt: skip
def test_odd_references_are_named(tmp_path, content, message):
    path = tmp_path / "references.json"
    path.write_text(json.dumps(content))
    if message is None:
        assert len(read_references(path)) == 0
        return
    with pytest.raises(ValueError, match=message) as raised:
        read_references(path)
    assert str(path) in str(raised.value) and len(str(raised.value)) < len(str(path)) + 500


@pytest.mark.parametrize("entry", [3, None, "a", [1], {"image_id": {"a": 1}, "caption": "b"}, {"image_id": LONG}])
def test_odd_results_are_named(tmp_path, entry):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 1, "caption": "a"}, entry]))
    with pytest.raises(ValueError, match="entry 1") as raised:
        read_results(path)
    assert str(path) in str(raised.value) and len(str(raised.value)) < len(str(path)) + 500


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "\ufeff{}x", "nan"])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    for read in (read_results, read_references):
        with pytest.raises(ValueError, match=r"x\.json"):
            read(tmp_path / "x.json")


def test_the_reader_for_training_and_the_one_for_references_agree(tmp_path):
    """There were once two readers, which refused different files."""
    broken = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": None, "caption": "a"}]}
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(broken))
    for read in (read_references, lambda path: load_captions("coco", path)):
        with pytest.raises(ValueError, match="annotation 0: image_id must be"):
            read(path)


def test_random_damages_end_in_a_line(tmp_path, capsys):
    """Values of other types in random places of results and references: a score or an error, no traceback."""
    rng = random.Random(0)
    odd = [None, 3, 1.5, True, "", "x", [], {}, ["a"], {"a": 1}, -1, 10**30, "\ud800"]
    failed = 0
    for turn in range(150):
        results = [{"image_id": image, "caption": "a cat"} for image in range(4)]
        annotations = [{"image_id": image, "caption": "a cat sits"} for image in range(4)]
        references = {"images": [{"id": image, "domain": "in"} for image in range(4)], "annotations": annotations}
        target = rng.choice([*results, *annotations, *references["images"], references])
        target[rng.choice(list(target))] = rng.choice(odd)
        for name, content in (("results", results), ("references", references)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        arguments = ["--results", f"{tmp_path}/results.json", "--references", f"{tmp_path}/references.json"]
        code = main(["evaluate", *arguments, "--tokenizer", "python", "--out", str(tmp_path / f"out{turn}")])
        error = capsys.readouterr().err
        assert code in (0, 1) and (code == 0 or error.startswith("clipcap: ")), error
        failed += code
    assert 75 < failed < 150
