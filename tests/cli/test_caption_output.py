"""`clipcap caption --out` and `--sidecar`: a killed run loses nothing, and files of others are never overwritten."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from clipcap_hf.cli import main
from clipcap_hf.cli.caption_output import CaptionTable
from PIL import Image


CAPTION = ("caption", "--model", "emoji-mini")  # the smaller captioner of the package
COLOURS = ["red", "green", "blue", "yellow", "white", "black"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(24):
        Image.new("RGB", (40 + index, 40), COLOURS[index % 6]).save(folder / f"{index:02}.png")
    return folder


def rows(path) -> list[list[str]]:
    """Read the images and captions of a file independently of the code that wrote it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [[record["image"], *record["captions"]] for record in map(json.loads, text.splitlines())]
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    header, *found = csv.reader(text.splitlines(), **dialect)
    assert header == ["image", "caption", "caption_2"][: len(header)]
    return found


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_files_hold_what_is_printed(tmp_path, pictures, capsys, suffix):
    (pictures / "00.png").rename(pictures / '00, "a"\tb.png')
    (pictures / "bad.png").write_text("no picture")
    assert main([*CAPTION, str(pictures), "--captions", "2"]) == 1
    printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    out = tmp_path / f"captions{suffix}"
    command = [*CAPTION, str(pictures), "--captions", "2", "--out", str(out)]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 24 images captioned, 0 done before\n" and "bad.png" in captured.err
    found = rows(out)
    if suffix == ".jsonl":
        found = [[field.replace("\t", "\\t") for field in row] for row in found]
    assert found == printed


def test_an_existing_file_is_continued_or_replaced(tmp_path, pictures, capsys):
    (pictures / "bad.png").write_text("no picture")
    out = tmp_path / "captions.csv"
    command = [*CAPTION, str(pictures), "--out", str(out)]
    assert main(command) == 1
    before = out.read_bytes()
    assert main(command) == 1
    assert "exists already; --skip-existing continues where it ends" in capsys.readouterr().err
    assert main([*command, "--skip-existing"]) == 1, "the bad picture is tried again"
    assert f"{out}: 0 images captioned, 24 done before" in capsys.readouterr().out
    assert out.read_bytes() == before
    assert main([*command, "--overwrite"]) == 1
    assert out.read_bytes() == before
    out.write_bytes(before[: len(before) // 2])
    assert main([*command, "--skip-existing"]) == 1
    assert out.read_bytes() == before, "continued after a cut"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_table_goes_on_after_any_cut(tmp_path, suffix):
    path = tmp_path / f"captions{suffix}"
    captions = {"a.png": 'a "cat", it is', "b\t.png": "two\nlines", "é日.png": "", "c.png": "the end"}

    def write():
        table = CaptionTable(path, skip_existing=True)
        table.open()
        for image, text in captions.items():
            if image not in table:
                table.add(image, [text], {"image": image, "captions": [text]})
        table.close()

    write()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        write()
        assert path.read_bytes() == whole


def test_killed_it_goes_on(tmp_path, pictures):
    out, undisturbed = tmp_path / "captions.csv", tmp_path / "undisturbed.csv"
    command = [sys.executable, "-m", "clipcap_hf", *CAPTION, str(pictures), "--batch-size", "1", "--sidecar"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    kills = 0
    for wanted in (3, 9):
        process = subprocess.Popen(
            [*command, "--out", out, "--skip-existing"], env=environment, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if out.exists() and out.read_bytes().count(b"\n") > wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
    assert kills, "no run was killed midway"
    subprocess.run([*command, "--out", out, "--skip-existing"], env=environment, check=True, timeout=240)
    assert main([*CAPTION, str(pictures), "--out", str(undisturbed), "--batch-size", "1"]) == 0
    assert out.read_bytes() == undisturbed.read_bytes()
    for image, text in rows(out):
        assert (pictures / image.replace(".png", ".txt")).read_text() == f"{text}\n"


def test_sidecars_overwrite_nothing_foreign(pictures, capsys):
    (pictures / "05.txt").write_text("my own words")
    assert main([*CAPTION, str(pictures), "--sidecar"]) == 1
    assert "05.txt exist already" in capsys.readouterr().err
    assert len(list(pictures.glob("*.txt"))) == 1, "found before any work"
    assert main([*CAPTION, str(pictures), "--sidecar", "--skip-existing"]) == 0
    assert (pictures / "05.txt").read_text() == "my own words"
    assert len(list(pictures.glob("*.txt"))) == 24
    assert main([*CAPTION, str(pictures), "--sidecar", "--overwrite"]) == 0
    assert (pictures / "05.txt").read_text() != "my own words"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--out", "captions.txt"], "must end in .csv, .tsv, .jsonl"),
        (["--out", "no/such/folder/captions.csv"], "its folder does not exist"),
        (["--out", "foreign.csv", "--skip-existing"], "is not a file that this command wrote"),
        (["--out", "a.csv", "--json"], "--out captions.jsonl"),
        (["--overwrite"], "go with --out or --sidecar"),
        (["--sidecar", "--overwrite", "--skip-existing"], "choose one"),
        (["--out", "a.csv", "--explain"], "FILE.jsonl"),
        (["same", "--sidecar"], "would both have"),
    ],
)
def test_arguments_are_checked_before_the_model_is_loaded(
    tmp_path, pictures, capsys, monkeypatch, arguments, complaint
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.csv").write_text("name,age\nAda,36\n")
    (tmp_path / "same").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / "same" / name)
    assert main(["caption", str(pictures), *arguments, "--model", "/no/such/model"]) == 1
    error = capsys.readouterr().err
    assert complaint in error and "/no/such/model" not in error
    assert (tmp_path / "foreign.csv").read_text() == "name,age\nAda,36\n"
    assert not (tmp_path / "a.csv").exists()


def test_table_with_other_columns_is_not_continued(tmp_path):
    path = tmp_path / "captions.csv"
    table = CaptionTable(path, captions=2)
    table.open()
    table.add("a.png", ["one", "two"], {})
    table.close()
    assert "a.png" in CaptionTable(path, captions=2, skip_existing=True)
    with pytest.raises(ValueError, match="as many captions per image"):
        CaptionTable(path, captions=1, skip_existing=True)


HOLD = """
import sys
from clipcap_hf.files import lock_file, lock_folder
lock = lock_file(sys.argv[1]) if len(sys.argv) == 2 else lock_folder(*sys.argv[1:])
with lock:
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(*arguments):
    """Hold a lock in another process, until the end or a kill."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        yield other
    finally:
        other.kill()
        other.communicate()


def test_two_runs_do_not_write_one_file(tmp_path, pictures, capsys):
    out = tmp_path / "captions.csv"
    command = [*CAPTION, str(pictures), "--out", str(out)]
    with held(out) as other:
        assert main(command) == 1
        assert f"{out} is being written by process {other.pid}" in capsys.readouterr().err and not out.exists()
        assert main([*CAPTION, str(pictures), "--out", str(tmp_path / "others.csv")]) == 0
    assert main(command) == 0, "a killed process holds nothing"
    assert len(rows(out)) == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "others.csv", "pictures"]


def test_two_runs_do_not_train_into_one_folder(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", "--data", "emoji", "--model", "emoji-mini", "--out", str(out), "--max-train-samples", "4"]
    command += ["--max-steps", "1", "--eval-split", "none", "--report-to", "none", "--device", "cpu"]
    with held(out, "_lock") as other:
        assert main(command) == 1
        assert f"{out} is being written by process {other.pid}" in capsys.readouterr().err
        assert os.listdir(out) == ["_lock"]
    assert main(command) == 0, "a killed process holds nothing"
    assert "_lock" not in os.listdir(out) and "model.safetensors" in os.listdir(out)
