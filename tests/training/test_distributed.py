"""Two real processes (gloo) train like one process with the same global batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from clipcap_hf.cli import main
from clipcap_hf.data import load_embeddings
from datasets import Dataset, DatasetDict


@pytest.fixture
def run_folder(tmp_path, make_model, embeds_processor, captions):
    """Make a captioner without dropout, which differs between processes, and 45 rows: no multiple of the batch."""
    model = make_model(None, normalize_clip_embeds=True)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(model.config.text_config, name, 0.0)
    model.save_pretrained(tmp_path / "captioner")
    embeds_processor.save_pretrained(tmp_path / "captioner")
    several = [[captions[i % 8], captions[(i + 1) % 8]] for i in range(45)]
    rows = Dataset.from_dict({"clip_embeds": torch.randn(45, 16).tolist(), "captions": several})
    DatasetDict({"train": rows, "validation": rows.select(range(7))}).save_to_disk(tmp_path / "data")
    return tmp_path


def flags(folder, out, **settings) -> list[str]:
    settings = {
        "model": folder / "captioner",
        "data": folder / "data",
        "output_dir": folder / out,
        "references": "random",
        "embeds_noise": 0.05,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "num_samples": 3,
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def history(folder):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    return losses, [(entry["eval_loss"], entry["eval_cider"]) for entry in entries if "eval_loss" in entry]


@pytest.mark.parametrize("freeze", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_have_the_loss_curve_of_one(run_folder, freeze):
    more = {"freeze_language_model": freeze}
    assert main(["train", *flags(run_folder, "one", per_device_train_batch_size=8, **more)]) == 0
    two = flags(run_folder, "two", per_device_train_batch_size=4, ddp_backend="gloo", **more)
    launch("-m", "clipcap_hf.cli.train", *two)

    (losses, evaluations), (losses_of_two, evaluations_of_two) = (
        history(run_folder / "one"),
        history(run_folder / "two"),
    )
    assert len(losses) == 12
    # The last batch of an epoch has 5 rows. Two processes fill it up with rows from the start, so later steps differ.
    assert losses_of_two[:5] == pytest.approx(losses[:5], rel=1e-4)
    assert losses_of_two == pytest.approx(losses, rel=0.1)
    assert [loss for loss, _ in evaluations_of_two] == pytest.approx([loss for loss, _ in evaluations], rel=0.05)
    assert len(json.loads((run_folder / "two" / "samples.json").read_text())) == 3


@pytest.mark.slow
def test_two_processes_encode_the_images_together(tmp_path):
    settings = {
        "model": "emoji-mini",
        "data": "emoji",
        "max_train_samples": 30,
        "max_eval_samples": 7,
        "logging_steps": 1,
        "num_train_epochs": 2,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "num_samples": 3,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    command = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *command, "--per_device_train_batch_size", "8", "--output_dir", str(one)]) == 0
    more = ["--per_device_train_batch_size", "4", "--ddp_backend", "gloo", "--output_dir", str(two)]
    launch("-m", "clipcap_hf.cli.train", *command, *more)
    (losses, _), (losses_of_two, _) = history(one), history(two)
    assert len(losses_of_two) == len(losses) > 6
    assert sum(losses_of_two) == pytest.approx(sum(losses), rel=0.1)  # the dropout is another
    (folder,), (expected,) = (list((out / "_embeddings").glob("train-*")) for out in (two, one))
    assert folder.name == expected.name
    rows, wanted = load_embeddings(folder), load_embeddings(expected)
    assert list(rows["captions"]) == list(wanted["captions"])
    torch.testing.assert_close(torch.tensor(rows["clip_embeds"][:]), torch.tensor(wanted["clip_embeds"][:]))
    assert (two / "samples.png").is_file()
