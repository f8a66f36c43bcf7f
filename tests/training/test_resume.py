"""A killed run continues as if never interrupted; a run that diverges keeps its last good checkpoint."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapTrainer
from clipcap_hf.cli import main
from clipcap_hf.training.arguments import CaptioningArguments
from clipcap_hf.training.checkpoints import check_writable, last_checkpoint
from clipcap_hf.training.rows import EpochRows
from clipcap_hf.training.trainer import NonFiniteError
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback


def make_rows(captions, count=60, width=16):
    embeds = torch.randn(count, width)
    several = [[captions[i % 8], captions[(i + 1) % 8], captions[(i + 3) % 8]] for i in range(count)]
    return Dataset.from_dict({"clip_embeds": embeds.tolist(), "captions": several})


@pytest.fixture
def run_folder(tmp_path, make_model, embeds_processor, captions):
    """Save a captioner with dropout and a data set."""
    make_model(None, normalize_clip_embeds=True).save_pretrained(tmp_path / "captioner")
    embeds_processor.save_pretrained(tmp_path / "captioner")
    rows = make_rows(captions)
    DatasetDict({"train": rows, "validation": rows.select(range(6))}).save_to_disk(tmp_path / "data")
    return tmp_path


def flags(folder: Path, out: str, *more: str) -> list[str]:
    settings = {
        "model": folder / "captioner",
        "data": folder / "data",
        "output_dir": folder / out,
        "references": "random",
        "embeds_noise": 0.05,
        "max_steps": 60,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "save_strategy": "steps",
        "save_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 30,
        "load_best_model_at_end": False,
        "num_samples": 0,
        "logging_steps": 10,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ["train", *(text for name, value in settings.items() for text in (f"--{name}", str(value))), *more]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_killed_run_ends_with_the_same_weights(run_folder):
    assert main(flags(run_folder, "whole")) == 0

    command = [sys.executable, "-m", "clipcap_hf.cli", *flags(run_folder, "killed", "--resume")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # 60 rows are 8 batches an epoch, so that step 20 lies within one.
    deadline = time.monotonic() + 120
    while not (run_folder / "killed" / "checkpoint-20" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run_folder / "killed" / "model.safetensors").exists()

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights(run_folder / "killed") == weights(run_folder / "whole")
    histories = [
        json.loads((run_folder / out / "trainer_state.json").read_text())["log_history"] for out in ("whole", "killed")
    ]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == losses[1] and len(losses[0]) == 7  # of the first step, and after each tenth
    # The mean over the whole run, also if a finished run is resumed.
    whole, killed = (train_loss(run_folder / out) for out in ("whole", "killed"))
    steps = [1, 9, 10, 10, 10, 10, 10]
    assert whole == killed == pytest.approx(sum(map(math.prod, zip(losses[0], steps))) / 60, rel=1e-4)
    assert main(flags(run_folder, "killed", "--resume")) == 0
    assert train_loss(run_folder / "killed") == whole


def test_a_checkpoint_at_the_end_of_an_epoch_is_saved_after_its_evaluation(run_folder):
    """60 rows are 8 batches: checkpoint-8 is of the last step of an epoch, and the evaluation draws random numbers."""
    epochs = "--eval_strategy epoch --save_steps 4 --save_total_limit 9 --max_steps 24".split()
    assert main(flags(run_folder, "whole", *epochs)) == 0
    (run_folder / "killed").mkdir()
    shutil.copytree(run_folder / "whole/checkpoint-8", run_folder / "killed/checkpoint-8")
    assert main(flags(run_folder, "killed", *epochs, "--resume")) == 0
    assert weights(run_folder / "killed") == weights(run_folder / "whole")
    evaluated = [
        [
            entry["step"]
            for entry in json.loads((run_folder / out / "trainer_state.json").read_text())["log_history"]
            if "eval_loss" in entry
        ]
        for out in ("whole", "killed")
    ]
    assert evaluated == [[8, 16, 24]] * 2
    assert (run_folder / "whole/checkpoint-4").is_dir() and (run_folder / "whole/checkpoint-24").is_dir()


def train_loss(folder: Path) -> float:
    return json.loads((folder / "scores.json").read_text())["train_loss"]


class Interruption(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_resuming_does_not_depend_on_how_batches_are_made(tmp_path, make_model, embeds_processor, captions, settings):
    rows = make_rows(captions)

    def train(out, interrupted_at=None, resume=None):
        args = CaptioningArguments(
            output_dir=str(tmp_path / out),
            max_steps=20,
            warmup_steps=2,
            learning_rate=1e-3,
            save_strategy="steps",
            save_steps=5,
            eval_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            report_to="none",
            **{"per_device_train_batch_size": 8, **settings},
        )
        model = make_model(None, normalize_clip_embeds=True)
        trainer = ClipCapTrainer(
            model=model,
            args=args,
            train_dataset=EpochRows(rows, seed=1),
            data_collator=CaptioningCollator(embeds_processor, embeds_noise=0.05),
            processing_class=embeds_processor,
            callbacks=[Interruption(interrupted_at)],
        )
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            pass
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    whole = train("whole")
    train("cut", interrupted_at=13)
    resumed = train("cut", resume=last_checkpoint(tmp_path / "cut"))
    assert torch.equal(resumed, whole)


def test_rows_are_drawn_by_seed_epoch_and_row(embeds_processor, captions):
    collator = CaptioningCollator(embeds_processor, embeds_noise=0.1)

    def draw(seed, epoch, indices):
        rows = EpochRows(make_rows(captions), seed)
        rows.set_epoch(epoch)
        return collator(rows.__getitems__(indices))

    torch.manual_seed(5)
    first = draw(0, 2, [3, 4, 5])
    torch.manual_seed(5)
    alone = draw(0, 2, [4])
    length = alone["input_ids"].shape[1]
    assert torch.equal(first["input_ids"][1, :length], alone["input_ids"][0])
    for seed, epoch in ((1, 2), (0, 3)):
        torch.manual_seed(5)
        assert not torch.equal(draw(seed, epoch, [3, 4, 5])["clip_embeds"], first["clip_embeds"])


def test_interrupted_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "nothing") is None
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"global_'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_another_run_is_not_overwritten(run_folder, capsys):
    (run_folder / "out" / "checkpoint-3").mkdir(parents=True)
    (run_folder / "out" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert main(flags(run_folder, "out")) == 1
    assert "already holds checkpoint-3: pass `resume`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scores.json", "curve.png", "samples.json", "model.safetensors"])
def test_files_that_a_run_would_replace_are_left_alone(run_folder, capsys, name):
    (run_folder / "out").mkdir()
    (run_folder / "out" / name).write_text("mine")
    assert main(flags(run_folder, "out")) == 1
    assert f"already holds {name}: pass `resume`" in capsys.readouterr().err
    assert (run_folder / "out" / name).read_text() == "mine"


class Poison(TrainerCallback):
    """Ruin a weight, as a step with an infinite gradient does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.mapping_network.fc1.weight[0, 0] = torch.nan


@pytest.mark.parametrize(("step", "message"), [(7, "step 8: the loss is nan"), (10, "fc1.weight holds NaN")])
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(
    tmp_path, make_model, embeds_processor, captions, step, message
):
    args = CaptioningArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=1,
        eval_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
    )
    trainer = ClipCapTrainer(
        model=make_model(None),
        args=args,
        train_dataset=EpochRows(make_rows(captions)),
        data_collator=CaptioningCollator(embeds_processor),
        callbacks=[Poison(step)],
    )
    with pytest.raises(NonFiniteError, match=message) as raised:
        trainer.train()
    assert "checkpoint-5, is as it was" in str(raised.value) and "learning rate" in str(raised.value)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_output_folders_that_cannot_take_the_captioner(tmp_path, make_model, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to .*choose another `output_dir`"):
        check_writable(tmp_path / "file" / "out", make_model(None))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="has 0.00 GB left, but .* need"):
        check_writable(tmp_path / "out", make_model(None))
