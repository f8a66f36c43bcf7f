"""The scripts that users copy are short and run."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clipcap_hf import ClipCapConfig
from datasets import Dataset, DatasetDict
from PIL import Image


EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(name: str, *arguments) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_scripts_to_copy_are_few_and_short():
    assert 5 <= len(SCRIPTS) <= 7
    scripts = set(SCRIPTS) - {"benchmark_official.py"}  # a measurement, which people run and do not copy
    assert {name: lines for name in scripts if (lines := len((EXAMPLES / name).read_text().splitlines())) > 40} == {}


def test_page_of_the_examples_names_each_script_and_folder():
    linked = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    there = {path.name for path in EXAMPLES.iterdir() if path.is_dir() or path.suffix in (".py", ".ipynb")}
    assert linked == there - {"__pycache__"}


def test_caption(tmp_path):
    paths = [tmp_path / f"{color}.png" for color in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (64, 64), path.stem).save(path)
    lines = [line.split("\t") for line in run("caption.py", *paths).splitlines()]
    assert [path for path, _ in lines] == list(map(str, paths)) and all(caption for _, caption in lines)


def test_evaluate_captioner():
    scores = dict(line.split("\t") for line in run("evaluate_captioner.py").splitlines())
    assert scores.keys() == {"bleu_4", "rouge_l", "cider"}
    assert float(scores["rouge_l"]) > 0.8  # emoji-mini names most of these drawings


@pytest.mark.slow
def test_measure_photograph_captioners_on_features_side_by_side(tmp_path):
    for kind, width in (("pooled", 8), ("detector", 3)):
        splits = {}
        for split, images in (("train", 6), ("validation", 2), ("test", 2)):
            rows = {"image_path": [f"{split}-{image}.jpg" for image in range(images)]}
            rows["captions"] = [[f"dog number {image}", "a dog"] for image in range(images)]
            rows["clip_embeds"] = np.random.default_rng(width).normal(size=(images, width)).astype(np.float32).tolist()
            splits[split] = Dataset.from_dict(rows)
        DatasetDict(splits).save_to_disk(tmp_path / kind)
    folders = ["--pooled", tmp_path / "pooled", "--detector", tmp_path / "detector", "--out", tmp_path / "out"]
    script, row = "measurements/photograph_captioners.py", "pooled and detector features"
    run(script, *folders, "--rows", row, "--max-steps", 2, "--batch-size", 4, "--tokenizer", "python")
    assert ClipCapConfig.from_pretrained(tmp_path / "out" / "runs" / row).clip_embed_dim == 11
    assert f"| {row} | " in (tmp_path / "out" / "table.md").read_text()
    scores = run(script, *folders, "--test", row, "--tokenizer", "python").splitlines()
    systems = [f"{row}, greedy", f"{row}, 5 beams", "nearest training image", "most common caption"]
    assert [line.split(": ")[0] for line in scores] == systems


@pytest.mark.parametrize("name, option", [("train.py", "--out DIR"), ("benchmark.py", "--repeats")])
def test_scripts_that_take_the_options_of_a_command(name, option):
    assert option in run(name, "--help")


def test_serve(monkeypatch, model_folder):
    pytest.importorskip("gradio")
    monkeypatch.setenv("CAPTIONER", str(model_folder))
    assert (
        runpy.run_path(str(EXAMPLES / "serve.py"), run_name="example")["app"].title == "Image captioning with ClipCap"
    )
