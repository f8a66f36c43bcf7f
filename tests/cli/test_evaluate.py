"""`clipcap evaluate`: complete evaluations of the packaged captioner, also interrupted and in two processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import clipcap_hf
import pytest
from clipcap_hf.cli import main
from clipcap_hf.evaluation import captions as captioning


MODEL = os.fspath(clipcap_hf.EMOJI_MINI)
EMOJI = ["evaluate", "--benchmark", "emoji", "--split", "validation", "--tokenizer", "python"]


def evaluate(out, *arguments):
    return main([*EMOJI, "--model", MODEL, "--beams", "1", "--workers", "0", "--out", str(out), *arguments])


def results(out):
    entries = json.loads((out / "emoji-validation" / "results.json").read_text(encoding="utf-8"))
    return {entry["image_id"]: entry["caption"] for entry in entries}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert evaluate(out, "--limit", "60") == 0
    return out


def test_an_evaluation_writes_scores_captions_and_page(uninterrupted):
    folder = uninterrupted / "emoji-validation"
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "results.json", "scores.json"]
    report = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert report["scores"]["entire"]["exact_match"] > 25
    assert report["decoding"]["num_beams"] == 1 and report["decoding"]["max_new_tokens"] == 40
    assert len(report["model"]["weights_sha256"]) == 64 and report["model"]["dtype"] == "float32"
    assert report["protocol"]["deviations"] == ["emoji drawings, validation, has 190 images, and these are 60"]
    assert (folder / "index.html").read_text(encoding="utf-8").count("data:image/webp") == 36
    assert list(results(uninterrupted)) == list(range(60))


def test_a_results_file_scores_the_same_without_a_model(uninterrupted, tmp_path, capsys):
    file = uninterrupted / "emoji-validation" / "results.json"
    assert main([*EMOJI, "--results", str(file), "--out", str(tmp_path)]) == 1
    assert "130 of 190 images have no caption" in capsys.readouterr().err
    card = tmp_path / "card"
    card.mkdir()
    command = [*EMOJI, "--results", str(file), "--out", str(tmp_path), "--allow-subset", "--update-card", str(card)]
    assert main(command) == 0
    assert "Model card: " + str(card / "README.md") in capsys.readouterr().out
    assert main(command) == 0
    assert "Model card: unchanged" in capsys.readouterr().out
    ours, theirs = (
        json.loads((out / "emoji-validation" / "scores.json").read_text()) for out in (tmp_path, uninterrupted)
    )
    assert ours["scores"] == theirs["scores"] and ours["captions_sha256"] == theirs["captions_sha256"]


def test_a_killed_evaluation_goes_on_where_it_was(uninterrupted, tmp_path, monkeypatch):
    arguments = ["--model", MODEL, "--beams", "1", "--workers", "0", "--limit", "60", "--batch-size", "1"]
    process = subprocess.Popen([sys.executable, "-m", "clipcap_hf.cli", *EMOJI, *arguments, "--out", str(tmp_path)])
    deadline = time.monotonic() + 120
    while not (kept := kept_captions(tmp_path)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = kept_captions(tmp_path)
    assert 0 < len(kept) < 60
    (file,) = (tmp_path / "emoji-validation").glob(".captions-*")
    with file.open("ab") as cut_off:
        cut_off.write('{"image_id": 59, "caption": "猫'.encode()[:-1])

    captioned = []
    original = captioning.caption_images
    monkeypatch.setattr(
        captioning,
        "caption_images",
        lambda m, p, images, **kw: captioned.append(len(images)) or original(m, p, images, **kw),
    )
    assert evaluate(tmp_path, "--limit", "60") == 0
    assert captioned == [60 - len(kept)]
    assert results(tmp_path) == results(uninterrupted)
    assert not list((tmp_path / "emoji-validation").glob(".captions-*"))

    # Other settings do not take up captions that are not theirs.
    captioned.clear()
    assert evaluate(tmp_path, "--limit", "3", "--max-new-tokens", "2") == 0
    assert captioned == [3]


def kept_captions(out):
    lines = [line for file in out.glob("*/.captions-*") for line in file.read_bytes().split(b"\n")]
    return [json.loads(line) for line in lines[:-1]]


def test_two_processes_give_the_captions_of_one(uninterrupted, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    arguments = ["--model", MODEL, "--beams", "1", "--workers", "0", "--limit", "60", "--out", str(tmp_path)]
    command = [*torchrun, "-m", "clipcap_hf.cli", *EMOJI, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert results(tmp_path) == results(uninterrupted)
    assert finished.stdout.count("Scores:") == 1  # one process reports
    assert sorted(path.name for path in (tmp_path / "emoji-validation").iterdir()) == [
        "index.html",
        "results.json",
        "scores.json",
    ]


def test_broken_images_end_the_evaluation_and_are_named(model_folder, tmp_path, images, capsys):
    coco = {"images": []}
    (tmp_path / "images").mkdir()
    for image, picture in enumerate(images):
        picture.save(tmp_path / "images" / f"{image}.png")
        coco["images"].append(
            {"filename": f"{image}.png", "imgid": image, "split": "test", "sentences": [{"raw": "a"}]}
        )
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps(coco))
    (tmp_path / "images" / "2.png").write_bytes(b"no picture")
    arguments = ["evaluate", "--benchmark", "flickr8k", "--data", str(tmp_path), "--model", str(model_folder)]
    arguments += ["--tokenizer", "python", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert re.search("1 images of .* cannot be read: 2: .*--allow-subset", capsys.readouterr().err)
    assert len(kept_captions(tmp_path / "out")) == 7
    assert main([*arguments, "--allow-subset"]) == 0
    report = json.loads((tmp_path / "out" / "flickr8k-test" / "scores.json").read_text())
    assert report["images"]["entire"] == 7 and "1 of 8 images have no caption: 2" in report["protocol"]["deviations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model"),
        (["--results", "x.json"], "--benchmark, or --references"),
        (["--model", "x"], "--benchmark"),
        (["--model", "x", "--benchmark", "coco"], "no benchmark 'coco'"),
        (["--results", "x.json", "--benchmark", "emoji"], "one split"),
        (
            ["--results", "x.json", "--benchmark", "nocaps", "--tokenizer", "python"],
            "--references FILE or --data ROOT",
        ),
        (["--results", "absent.json", "--references", "absent.json", "--tokenizer", "python"], "absent.json"),
        (["--results", "x.json", "--references", "x.json", "--update-card"], "--update-card needs a --benchmark"),
        (["--model", "emoji-mini", "--benchmark", "emoji", "--update-card"], "writes into a folder"),
        (["--model", "emoji-mini", "--benchmark", "emoji", "--metrics", "blue"], "Unknown metrics blue"),
        (
            ["--model", "x", "--benchmark", "emoji", "--metrics", "clip_score", "--clip-model", "./none"],
            "Could not load the CLIP ./none",
        ),
        (["--results", "x", "--references", "x", "--metrics", "clip_score"], "clip_score needs the images"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_missing_java_is_named_before_the_captions(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("clipcap_hf.cli.evaluate.load_captioner", lambda *_: pytest.fail("a model was loaded"))
    assert main(["evaluate", "--benchmark", "emoji", "--model", MODEL, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "needs Java and there is no `java` on the PATH" in error and "python" in error
    assert not (tmp_path / "out").exists()
