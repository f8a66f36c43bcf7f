"""Rows to train on: which reference of an image is shown in which epoch, and that a resumed run sees the same."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


DRAW = "draw"


class EpochRows(Dataset):
    """
    Rows of a data set, each with a column `draw` from which [`CaptioningCollator`] draws the reference and the noise.

    Draws depend on the seed, the epoch and the row alone, not on how many batches were made before or by which process.
    So a run that was interrupted goes on as if it had not been, with any number of workers and processes (but
    `dataloader_persistent_workers` shifts torch's generator and so the dropout). [`ClipCapTrainer`] sets the epoch.

    Args:
        rows (sequence of `dict`): A map-style data set, such as [`~datasets.Dataset`].
        seed (`int`): Of the draws.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int = 0):
        self.rows = rows
        self.seed = seed
        # Shared, so that workers that live through several epochs hear of them.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int):
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], DRAW: (self.seed, self.epoch, index)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        read = getattr(self.rows, "__getitems__", None)  # a data set on disk reads a batch at once
        rows = read(indices) if read else [self.rows[index] for index in indices]
        return [{**row, DRAW: (self.seed, self.epoch, index)} for row, index in zip(rows, indices)]


def generator_of(row: dict[str, Any]) -> np.random.Generator | None:
    """The generator of a row of [`EpochRows`]; None for other rows."""
    return np.random.default_rng(row[DRAW]) if DRAW in row else None


def one_row_per_caption(data, caption_column: str):
    """Every reference as a row of its own, in the order of the images; of a stream a stream, of a data set a [`CaptionRows`]."""
    if hasattr(data, "select"):
        return CaptionRows(data, caption_column)

    def expand(batch: dict[str, list]) -> dict[str, list]:
        batch[caption_column] = [[texts] if isinstance(texts, str) else texts for texts in batch[caption_column]]
        repeats = [len(texts) for texts in batch[caption_column]]
        expanded = {
            name: [value for value, times in zip(values, repeats) for _ in range(times)]
            for name, values in batch.items()
            if name != caption_column
        }
        expanded[caption_column] = [text for texts in batch[caption_column] for text in texts]
        return expanded

    return data.map(expand, batched=True)


class CaptionRows(Dataset):
    """
    Every reference of a data set as a row of its own. An image with five captions is stored once, not five times.

    Args:
        data ([`~datasets.Dataset`]): With a string, or a list of them, in `caption_column`.
        caption_column (`str`): Column of the captions.
    """

    def __init__(self, data, caption_column: str):
        captions = [[texts] if isinstance(texts, str) else texts for texts in data[caption_column]]
        self.data = data.remove_columns(caption_column)
        self.caption_column = caption_column
        self.captions = [text for texts in captions for text in texts]
        self.image_of = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        self.column_names = data.column_names

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, key: int | str) -> dict[str, Any] | Sequence:
        """A row, or by its name a column."""
        if isinstance(key, str):
            return self.captions if key == self.caption_column else self.data.select(self.image_of)[key]
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        rows = self.data.__getitems__(self.image_of[keys].tolist())
        return [{**row, self.caption_column: self.captions[key]} for row, key in zip(rows, keys)]


def caption_lengths(captions: Sequence[str | list[str]], tokenizer, batch_size: int = 1000) -> list[int]:
    """Tokens of each row's caption, the longest where there are several: what rows are grouped by."""
    lengths = []
    for start in range(0, len(captions), batch_size):
        groups = [[texts] if isinstance(texts, str) else texts for texts in captions[start : start + batch_size]]
        tokens = iter(tokenizer([text for texts in groups for text in texts])["input_ids"])
        lengths += [max((len(next(tokens)) for _ in texts), default=0) for texts in groups]
    return lengths


def evenly_spread(data, limit: int | None):
    """About so many rows from all over a data set; of a stream, the first."""
    if limit is None:
        return data
    if limit < 1:
        raise ValueError(f"The number of rows to take must be at least 1, but is {limit}; None takes all.")
    if not hasattr(data, "select"):
        return data.take(limit)
    return data.select(range(0, len(data), max(1, len(data) // limit))).select(range(min(limit, len(data))))


class EpochShuffledLengths(torch.utils.data.Sampler):
    """`Trainer`'s batches of like length, in an order that depends on the seed and the epoch of the rows alone."""

    def __init__(self, rows: EpochRows, lengths: list[int], batch_size: int):
        self.rows, self.lengths, self.batch_size = rows, lengths, batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        from transformers.trainer_pt_utils import LengthGroupedSampler

        seed = random.Random(f"{self.rows.seed}-{self.rows.epoch}").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=generator))
