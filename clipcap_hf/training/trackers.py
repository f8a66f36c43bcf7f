"""Show captions of held-out images in TensorBoard, Weights & Biases and trackio at each evaluation."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from .held_out import MOST_BEFORE
from .rows import spread_rows


SHOWN = 6
LARGEST = 256  # pixels of the longer side
TITLE = "held-out captions"


class CaptionsInTrackers(TrainerCallback):
    """
    Send some held-out images with their captions before training and now to the trackers that are on.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, whose `compute_metrics` keeps the last captions.
        evaluation: The held-out rows, with `captions` and perhaps `image`.
        before (`list[str]`): Captions before training of evenly spread rows, see `look_before`.
    """

    def __init__(self, trainer: Trainer, evaluation, before: Sequence[str]):
        captioned = spread_rows(len(evaluation), MOST_BEFORE)
        places = spread_rows(len(before), SHOWN)
        self.trainer = trainer
        self.rows = [captioned[place] for place in places]
        self.before = [before[place] for place in places]
        rows = evaluation.select(self.rows)
        self.references = [texts[0] for texts in rows["captions"]]
        has_images = "image" in rows.column_names and isinstance(rows[0]["image"], Image.Image)
        self.images = [_small(image) for image in rows["image"]] if has_images else []

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        captions = self.trainer.compute_metrics.captions
        texts = list(zip(self.before, [captions[row] for row in self.rows], self.references))
        for tracker, send in SENDERS.items():
            if tracker in args.report_to:
                send(self, state.global_step, texts)

    def _to_tensorboard(self, step: int, texts: list[tuple[str, str, str]]):
        callbacks = self.trainer.callback_handler.callbacks
        (writer,) = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
        lines = ["|before|now|reference|", "|---|---|---|", *("|" + "|".join(map(_cell, row)) + "|" for row in texts)]
        writer.add_text(TITLE, "\n".join(lines), step)  # Markdown
        for number, image in enumerate(self.images):
            writer.add_image(f"{TITLE}/{number}", np.asarray(image), step, dataformats="HWC")
        writer.flush()

    def _to_wandb(self, step: int, texts: list[tuple[str, str, str]]):
        import wandb

        shown = {TITLE: wandb.Table(columns=["before", "now", "reference"], data=[list(row) for row in texts])}
        if self.images:
            shown[f"{TITLE}, images"] = [wandb.Image(image, caption=row[1]) for image, row in zip(self.images, texts)]
        wandb.log({**shown, "train/global_step": step})

    def _to_trackio(self, step: int, texts: list[tuple[str, str, str]]):
        import pandas
        import trackio

        table = pandas.DataFrame(texts, columns=["before", "now", "reference"])
        if self.images:
            table.insert(0, "image", [trackio.Image(image) for image in self.images])
        trackio.log({TITLE: trackio.Table(dataframe=table)}, step=step)


SENDERS = {
    "tensorboard": CaptionsInTrackers._to_tensorboard,
    "wandb": CaptionsInTrackers._to_wandb,
    "trackio": CaptionsInTrackers._to_trackio,
}


def _cell(text: str) -> str:
    """Write a caption as a cell of a Markdown table, on one line and without a bar that would end the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST))
    return image
