"""The folder of an evaluation: other files stay, one process works in it, killed runs leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from clipcap_hf.cli import main
from clipcap_hf.evaluation import EvaluationSet, check_folder, evaluate_captions, only_process, write_report


CAPTIONS = {1: "a red heart", 2: "a blue boat", 3: "two dogs"}
REFERENCES = {"1": ["a red heart"], "2": ["the boat is blue"], "3": ["dogs run", "two dogs"]}


def write_files(folder, captions=CAPTIONS):
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
    (folder / "results.json").write_text(json.dumps(entries))
    (folder / "references.json").write_text(json.dumps(REFERENCES))
    return folder


def score(folder, out, *arguments):
    files = ["--results", str(folder / "results.json"), "--references", str(folder / "references.json")]
    return main(["evaluate", *files, "--tokenizer", "python", "--out", str(out), *arguments])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_results_file_in_the_output_folder_keeps_every_row(tmp_path, capsys):
    captions = {**CAPTIONS, 4: "of an image without references"}
    folder = write_files(tmp_path / "d", captions)
    before = (folder / "results.json").read_bytes()
    assert score(folder, folder, "--allow-subset") == 0
    assert (folder / "results.json").read_bytes() == before
    assert json.loads((folder / "scores.json").read_text())["images"]["entire"] == 3
    printed = capsys.readouterr().out
    assert "Scores: " in printed and "Captions: /" not in printed  # only what was written is named
    assert score(folder, folder, "--allow-subset", "--overwrite") == 0
    assert (folder / "results.json").read_bytes() == before
    # It does not become ours by being scored.
    write_files(folder)
    assert score(folder, folder) == 0
    other = write_files(tmp_path / "other", {**CAPTIONS, 1: "another caption"})
    assert score(other, folder) == 1 and "did not write: results.json." in capsys.readouterr().err
    before = write_files(folder, captions).joinpath("results.json").read_bytes()
    # By another name it is the same file.
    os.symlink(folder, tmp_path / "link")
    assert score(tmp_path / "link", folder, "--allow-subset", "--overwrite") == 0
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("index.html", "<!doctype html><html>my page</html>"),
        ("scores.json", '{"cider": 1.0}'),
        ("scores.json", "[not JSON"),
        ("results.json", '[{"image_id": 9, "caption": "mine"}]'),
        ("results.json", ""),
    ],
)
def test_files_of_others_stay_without_overwrite(tmp_path, capsys, name, content):
    folder = write_files(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    before = contents(out)
    assert score(folder, out) == 1
    error = capsys.readouterr().err
    assert f"did not write: {name}." in error and "--overwrite" in error
    assert contents(out) == before
    assert score(folder, out, "--overwrite") == 0
    assert (out / name).read_text() != content
    assert score(folder, out) == 0  # now they are ours


def test_foreign_files_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    (tmp_path / "emoji-validation").mkdir()
    (tmp_path / "emoji-validation" / "index.html").write_text("mine")
    monkeypatch.setattr("clipcap_hf.cli.evaluate.load_captioner", lambda *_: pytest.fail("a model was loaded"))
    arguments = ["--benchmark", "emoji", "--split", "validation", "--model", "emoji-mini", "--tokenizer", "python"]
    assert main(["evaluate", *arguments, "--out", str(tmp_path)]) == 1
    assert "did not write: index.html" in capsys.readouterr().err


def test_our_captions_that_were_edited_are_not_ours_any_more(tmp_path, capsys):
    folder = write_files(tmp_path / "in")
    assert score(folder, tmp_path / "out") == 0
    write_files(tmp_path / "out", {**CAPTIONS, 3: "edited by hand"})
    assert score(folder, tmp_path / "out") == 1
    assert "did not write: results.json." in capsys.readouterr().err
    assert "edited by hand" in (tmp_path / "out" / "results.json").read_text()


def test_references_are_never_replaced(tmp_path, capsys):
    folder = write_files(tmp_path / "d")
    os.rename(folder / "references.json", folder / "scores.json")
    files = ["--results", str(folder / "results.json"), "--references", str(folder / "scores.json")]
    assert main(["evaluate", *files, "--tokenizer", "python", "--out", str(folder), "--overwrite"]) == 1
    assert "is read, and would be replaced" in capsys.readouterr().err
    assert json.loads((folder / "scores.json").read_text()) == REFERENCES


def test_the_function_refuses_as_the_command_does(tmp_path):
    data = EvaluationSet([1, 2, 3], list(REFERENCES.values()), source="x")
    report, data = evaluate_captions(CAPTIONS, data, tokenizer="python")
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(ValueError, match=r"did not write: index\.html.*overwrite=True"):
        write_report(tmp_path, report, data)
    assert contents(tmp_path) == {"index.html": b"mine"}
    write_report(tmp_path, report, data, overwrite=True)
    write_report(tmp_path, report, data)
    check_folder(tmp_path)


def test_a_second_evaluation_of_a_folder_is_refused_by_the_number_of_the_first(tmp_path, capsys):
    folder = write_files(tmp_path / "in")
    out = tmp_path / "out"
    code = (
        "import sys, time; from clipcap_hf.evaluation import only_process\n"
        "with only_process(sys.argv[1]): print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        assert score(folder, out) == 1
        assert f"{out} is being written by process {other.pid} on " in capsys.readouterr().err
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert score(folder, out) == 0  # a killed process holds nothing
    assert sorted(contents(out)) == ["index.html", "results.json", "scores.json"]


def test_what_killed_runs_left_is_removed(tmp_path):
    scratch = [".scores.json.abc.tmp", ".index.html.def.tmp", ".results.json.ghi.tmp"]
    foreign = [".notes.json.abc.tmp", "captions.jsonl"]
    for name in (*scratch, *foreign, ".captions-old-0.jsonl", ".captions-new-0.jsonl"):
        (tmp_path / name).write_text("half")
    weeks_ago = time.time() - 21 * 24 * 3600
    os.utime(tmp_path / ".captions-old-0.jsonl", (weeks_ago, weeks_ago))
    with only_process(tmp_path):
        pass
    # Captions of an interrupted run with other settings are kept for a week, so that it can be continued.
    assert sorted(contents(tmp_path)) == sorted([*foreign, ".captions-new-0.jsonl"])
