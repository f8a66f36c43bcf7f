"""Checkpoints of training on disk: which of them are whole, and whether there is room for more."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from torch import nn


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest `checkpoint-STEP` that was written to its end; None if there is none.

    `Trainer` writes the weights first and `trainer_state.json` last, so a checkpoint without it was interrupted.
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
    """Make the folder, and see that it takes files and has room for a checkpoint and the final model.

    Raises:
        OSError: If not; the message says what to do.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"a")
    except OSError as error:
        raise OSError(
            f"The output folder {folder} cannot be written to ({error.strerror or error}): choose another `output_dir`."
        ) from error
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = 2 * weights + 2 * trained  # a checkpoint with the two moments of AdamW, and the model at the end
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"The disk of {folder} has {free / 1e9:.2f} GB left, but a checkpoint and the final model need "
            f"{needed / 1e9:.2f} GB: make room, or choose another `output_dir`."
        )
