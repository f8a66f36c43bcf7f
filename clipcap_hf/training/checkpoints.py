"""The files of a run: save checkpoints, find the one to resume from, check for space, clean up after killed runs."""

import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainerCallback


if TYPE_CHECKING:
    from transformers import Trainer

    from .arguments import CaptioningArguments

logger = logging.getLogger(__name__)

#: What a run writes at its end; none of it is replaced, since it may be of another run, or not of a run at all.
RESULTS = ("config.json", "model.safetensors", "scores.json", "curve.png", "samples.json", "samples.png")
SAVING = ".saving-"  # prefix of a folder that is being saved


def checkpoint_to_resume(args: "CaptioningArguments") -> str | None:
    """Return the checkpoint that a run continues from, if any.

    Raises:
        ValueError: If `output_dir` holds another run, or files that a run would replace, and `resume` is not set.
    """
    wanted = args.resume_from_checkpoint
    if wanted and wanted not in (True, "True", "true"):
        if not os.path.isdir(wanted):
            raise ValueError(f"`resume_from_checkpoint`: there is no folder {wanted}.")
        if not _is_whole(Path(wanted)):
            raise ValueError(f"`resume_from_checkpoint`: {wanted} holds no readable trainer_state.json of a run.")
        return wanted
    last = last_checkpoint(args.output_dir)
    if args.resume or wanted:
        if last is None:
            logger.warning(f"{args.output_dir} holds no checkpoint to resume from; training starts anew.")
        return last
    names = [os.path.basename(last)] if last else RESULTS
    if held := next((name for name in names if os.path.lexists(os.path.join(args.output_dir, name))), None):
        raise ValueError(
            f"{args.output_dir} already holds {held}: pass `resume` (--resume) to continue that run, or "
            "another `output_dir` (--out)."
        )
    return None


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the newest complete `checkpoint-STEP`, or None.

    `Trainer` writes the weights first and `trainer_state.json` last, so a checkpoint without it is incomplete.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        if (number := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _is_whole(path):
            found.append((int(number[1]), str(path)))
    return max(found)[1] if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def check_writable(folder: str | os.PathLike, model: nn.Module):
    """Create the folder, and check that it is writable and has space for a checkpoint and the final model.

    Raises:
        OSError: If the check fails; the message says what to do.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
            file.write(b"a")
    except OSError as error:
        raise OSError(
            f"The output folder {folder} cannot be written to ({error.strerror or error}): choose another "
            "`output_dir`."
        ) from error
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = 2 * weights + 2 * trained  # a checkpoint with the two moments of AdamW, and the final model
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"The disk of {folder} has {free / 1e9:.2f} GB left, but a checkpoint and the final model need "
            f"{needed / 1e9:.2f} GB: make room, or choose another `output_dir`."
        )


def remove_leftovers(folder: str | os.PathLike):
    """Remove the unfinished files of runs that were killed while saving."""
    for path in Path(folder).iterdir():
        if path.name.startswith(SAVING) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".") and path.name.endswith(".tmp") and path.is_file():
            path.unlink(missing_ok=True)
        elif re.fullmatch(r"checkpoint-\d+", path.name) and not _is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


class SaveAfterEvaluation(TrainerCallback):
    """Save the checkpoint of an epoch's last step after the epoch's evaluation, which draws random numbers.

    `Trainer` saves at steps before it evaluates at the epoch's end: a run that resumed from such a checkpoint left out
    the evaluation, and ended with other weights.
    """

    def __init__(self):
        self.owed = False

    def on_step_end(self, args, state, control, **kwargs):
        self.owed = control.should_save and float(state.epoch).is_integer()
        if self.owed:
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.owed:
            control.should_save = True
        self.owed = False


def save_whole(trainer: "Trainer", out: Path):
    """Save the captioner to a temporary folder, then move its files, so that no file is ever half written."""
    with tempfile.TemporaryDirectory(dir=out, prefix=SAVING) as folder:
        trainer.save_model(folder, _internal_call=True)
        if trainer.is_world_process_zero():
            for path in sorted(Path(folder).iterdir(), reverse=True):  # weights before the files that describe them
                os.replace(path, out / path.name)
