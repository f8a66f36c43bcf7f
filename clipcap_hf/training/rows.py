"""Rows to train on; a resumed run shows the same captions in the same epochs."""

import logging
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..data.readable import read_image


DRAW = "draw"

logger = logging.getLogger(__name__)


# The errors of damaged images: Pillow's decoders raise many kinds.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def as_list(captions: str | Sequence[str] | None) -> list:
    """Return the captions of an image, which may be one string, as a list."""
    if captions is None:
        return []
    return [captions] if isinstance(captions, str) else list(captions)


class EpochRows(Dataset):
    """
    Rows of a data set, each with a column `draw` from which [`CaptioningCollator`] draws the caption and the noise.

    Draws depend only on the seed, the epoch and the row, not on the number of earlier batches or on the process. So an
    interrupted run continues as if it had never stopped, with any number of workers and processes (except that
    `dataloader_persistent_workers` shifts torch's generator and so the dropout). [`ClipCapTrainer`] sets the epoch.

    An image that cannot be read is replaced by the next row, and a warning names it once.

    Args:
        rows (sequence of `dict`): A map-style data set, such as [`~datasets.Dataset`].
        seed (`int`): Seed of the draws.
        name (`Callable`, *optional*): Returns the name of a row for the warning, such as the path of its image.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int = 0, name: Callable[[int], str] | None = None):
        self.rows = rows
        self.seed = seed
        self.name = name or (lambda row: f"of row {row}")
        self.unreadable: set[int] = set()
        # In shared memory, so that persistent workers see each new epoch.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int):
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        read = getattr(self.rows, "__getitems__", None)  # a data set on disk reads a batch at once
        try:
            rows = list(map(read_image, read(indices) if read else [self.rows[index] for index in indices]))
        except UNREADABLE:
            rows = [self._readable(index) for index in indices]
        return [{**row, DRAW: (self.seed, self.epoch, index)} for row, index in zip(rows, indices)]

    def _readable(self, index: int) -> dict[str, Any]:
        """Return the row, or the first row after it whose image can be read."""
        for step in range(len(self.rows)):
            row = (index + step) % len(self.rows)
            try:
                return read_image(self.rows[row])
            except UNREADABLE as error:
                if row not in self.unreadable:
                    self.unreadable.add(row)
                    logger.warning(f"The image {self.name(row)} cannot be read and is left out ({str(error)[:200]}).")
        raise ValueError("No image of the training data can be read.")


def generator_of(row: dict[str, Any]) -> np.random.Generator | None:
    """Return the random generator of a row of [`EpochRows`], or None for other rows."""
    return np.random.default_rng(row[DRAW]) if DRAW in row else None


def one_row_per_caption(data):
    """Give each caption its own row, in the order of the images; return a stream for a stream."""
    if hasattr(data, "select"):
        return CaptionRows(data)

    def expand(batch: dict[str, list]) -> dict[str, list]:
        captions = [as_list(texts) for texts in batch.pop("captions")]
        expanded = {
            name: [value for value, texts in zip(values, captions) for _ in texts] for name, values in batch.items()
        }
        return {**expanded, "captions": [text for texts in captions for text in texts]}

    return data.map(expand, batched=True)


class CaptionRows(Dataset):
    """
    Rows with one caption each. An image with five captions is stored once, not five times.

    Args:
        data ([`~datasets.Dataset`]): Rows with a string, or a list of strings, in `captions`.
    """

    def __init__(self, data):
        captions = [as_list(texts) for texts in data["captions"]]
        self.data = data.remove_columns("captions")
        self.captions = [text for texts in captions for text in texts]
        self.image_of = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        self.column_names = data.column_names

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, key: int | str) -> dict[str, Any] | Sequence:
        """Return a row, or a column by its name."""
        if isinstance(key, str):
            return self.captions if key == "captions" else self.data.select(self.image_of)[key]
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        rows = self.data.__getitems__(self.image_of[keys].tolist())
        return [{**row, "captions": self.captions[key]} for row, key in zip(rows, keys)]


def caption_lengths(captions: Sequence[str | list[str]], tokenizer, batch_size: int = 1000) -> list[int]:
    """Count the tokens of each row's longest caption, by which rows are grouped."""
    lengths = []
    for start in range(0, len(captions), batch_size):
        groups = [as_list(texts) for texts in captions[start : start + batch_size]]
        tokens = iter(tokenizer([text for texts in groups for text in texts])["input_ids"])
        lengths += [max((len(next(tokens)) for _ in texts), default=0) for texts in groups]
    return lengths


def evenly_spread(data, limit: int | None):
    """Take at most `limit` rows, evenly spread over a data set; from a stream, take the first."""
    if limit is None:
        return data
    if limit < 1:
        raise ValueError(f"The number of rows to take must be at least 1, but is {limit}; None takes all.")
    return data.select(spread_rows(len(data), limit)) if hasattr(data, "select") else data.take(limit)


def spread_rows(length: int, limit: int) -> range:
    """Return the numbers of at most `limit` rows that are evenly spread over `length` rows."""
    return range(0, length, max(1, length // limit))[:limit]


class EpochShuffledLengths(torch.utils.data.Sampler):
    """`Trainer`'s batches of similar length, in an order that depends only on seed and epoch."""

    def __init__(self, rows: EpochRows, lengths: list[int], batch_size: int):
        self.rows, self.lengths, self.batch_size = rows, lengths, batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        from transformers.trainer_pt_utils import LengthGroupedSampler

        seed = random.Random(f"{self.rows.seed}-{self.rows.epoch}").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=generator))
