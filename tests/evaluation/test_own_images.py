"""`clipcap evaluate --model M --data FOLDER`: evaluate on your own images and captions."""

import json
import os
import shutil

import pytest
from clipcap_hf.cli import main
from clipcap_hf.data import load_emoji
from clipcap_hf.evaluation import load_own_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve drawings as a user has them: image files and a metadata.jsonl."""
    folder = tmp_path_factory.mktemp("data") / "my-images"
    folder.mkdir()
    lines = []
    for place, row in enumerate(load_emoji("validation").select(range(12))):
        row["image"].save(folder / f"drawing {place}.png")
        lines.append(json.dumps({"file_name": f"drawing {place}.png", "text": row["captions"][0]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def evaluate(folder, out, *arguments):
    options = ["--model", "emoji-mini", "--beams", "1", "--workers", "0", "--out", str(out)]
    return main(["evaluate", "--data", str(folder), *options, *arguments])


def test_a_folder_is_scored_with_its_pictures(folder, tmp_path, capsys):
    assert evaluate(folder, tmp_path / "out", "--tokenizer", "python", "--metrics", "cider", "exact_match") == 0
    printed = capsys.readouterr().out
    assert f"{folder}: 12 images, 12 references" in printed and f"Page: {tmp_path / 'out' / 'index.html'}" in printed
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["scores"]["entire"]["exact_match"] > 0 and report["protocol"]["complete"]
    assert (report["benchmark"], report["title"], report["model"]["name"]) == (None, "my-images", "emoji-mini")
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/webp") == 12 and "<h1>my-images</h1>" in page
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {f"drawing {place}.png" for place in range(12)}
    # The captions alone, with one's own references, score the same.
    file = str(tmp_path / "out" / "results.json")
    options = ["--tokenizer", "python", "--metrics", "cider", "exact_match", "--out", str(tmp_path / "again")]
    assert main(["evaluate", "--results", file, "--data", str(folder), *options]) == 0
    assert json.loads((tmp_path / "again" / "scores.json").read_text())["scores"] == report["scores"]


def test_without_java_the_exact_tokenizer_is_replaced_aloud(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evaluate(folder, tmp_path / "out", "--limit", "3") == 0
    captured = capsys.readouterr()
    assert "--tokenizer python, which is not exact" in captured.err and "Java" in captured.err
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["protocol"]["tokenizer"] == "python (not exact)" and report["images"]["entire"] == 3
    assert "meteor" not in report["scores"]["entire"]
    # What was asked for is not replaced.
    assert evaluate(folder, tmp_path / "out", "--tokenizer", "ptb") == 1


def test_annotation_files_and_splits(folder, tmp_path, capsys):
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": "a drawing"}, {"raw": "an emoji"}]}
        for name, split in (("drawing 0.png", "train"), ("drawing 1.png", "test"), ("drawing 2.png", "test"))
    ]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"images": images}))
    arguments = ["--tokenizer", "python", "--images", str(folder)]
    assert evaluate(file, tmp_path / "out", *arguments) == 1
    assert "name its form by --data-format" in capsys.readouterr().err
    assert evaluate(file, tmp_path / "out", *arguments, "--data-format", "karpathy") == 1
    assert "has the splits train, test: name the one to score by --split" in capsys.readouterr().err
    assert evaluate(file, tmp_path / "out", *arguments, "--data-format", "karpathy", "--split", "test") == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["images"]["entire"] == 2
    both = ["--data-format", "karpathy", "--split", "train", "test"]
    assert evaluate(file, tmp_path / "both", *arguments, *both) == 0
    assert sorted(os.listdir(tmp_path / "both")) == ["test", "train"]


def test_the_caption_column_is_named(folder, tmp_path):
    own = tmp_path / "images"
    shutil.copytree(folder, own)
    lines = [json.loads(line) for line in (own / "metadata.jsonl").read_text().split("\n")]
    for line in lines:
        line["what"] = line.pop("text")
    (own / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="known for captions"):
        load_own_images(own)
    data = load_own_images(own, caption_column=["what"])
    assert sorted(text for group in data.references for text in group) == sorted(line["what"] for line in lines)
    assert data.images[0].size == (128, 128)


def test_a_data_set_of_shards_has_random_access(tmp_path, images):
    import io
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for place in range(3):
            buffer = io.BytesIO()
            images[place].save(buffer, "PNG")
            for name, content in ((f"{place}.png", buffer.getvalue()), (f"{place}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = load_own_images(tmp_path, "webdataset")
    assert data.references == [["a caption"]] * 3 and data.images[2].size == images[2].size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent-folder", "--data-format", "imagefolder", "--tokenizer", "python"], "absent-folder"),
        (["--data", "x", "--data-format", "voc", "--tokenizer", "python"], "Unknown reader 'voc'"),
        (["--benchmark", "emoji", "--caption-column", "text"], "--caption-column describes your own images"),
        (["--benchmark", "emoji", "--data-format", "coco"], "--data-format describes your own images"),
        (["--data", "x", "--references", "y.json"], "--references goes with --results"),
        (["--data", "x", "--metrics", "cider", "blue"], "Unknown metrics blue"),
        (["--data", "x", "--update-card", "."], "--update-card needs a --benchmark"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--model", "emoji-mini", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not os.path.exists("clipcap-evaluation/scores.json")
