"""Find the images of a data set that cannot be read: they are left out, counted and named."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..files import listed
from ..model.images_clipcap import load_image
from ..processes import process_state
from .remote import with_bytes
from .schema import image_paths


logger = logging.getLogger(__name__)


def undecoded(dataset):
    """Return the data with paths and bytes in the column `image`, which [`load_image`] reads."""
    from datasets import Image

    if dataset.features is None:
        dataset = dataset._resolve_features()
    if "image" not in dataset.features:
        raise ValueError(f"The data has no column 'image'; it has {', '.join(dataset.features)}: rename the column.")
    return dataset.with_format(None).cast_column("image", Image(decode=False))


def drop_unreadable(dataset, what: str):
    """Read every image once, and leave out the rows whose image cannot be read. Processes share the work.

    Args:
        dataset ([`~datasets.Dataset`]): Rows with a column `image`; others are returned unchanged.
        what (`str`): Name of the data in the warning.

    Raises:
        ValueError: If no image can be read.
    """
    if dataset is None or "image" not in dataset.column_names:
        return dataset
    process = process_state()
    own = range(process.process_index, len(dataset), process.num_processes)
    found = {row: reason for row, reason in zip(own, _reasons(undecoded(dataset), own)) if reason is not None}
    bad = dict(sorted(pair for part in gather_object([found]) for pair in part.items()))
    if not bad:
        return dataset
    name = row_name(dataset)
    first = next(iter(bad.values()))
    logger.warning(
        f"{len(bad)} images of the {what} data cannot be read and are left out: {listed([*map(name, bad)], 3)} "
        f"({first})."
    )
    if len(bad) == len(dataset):
        raise ValueError(f"No image of the {what} data can be read: {first}.")
    return dataset.select([row for row in range(len(dataset)) if row not in bad])


def _reasons(dataset, rows: range) -> list[str | None]:
    """Tell for each of the rows why its image cannot be read, or None."""
    # Starting a process takes as long as reading dozens of images.
    workers = 0 if len(rows) < 256 else min(8, os.cpu_count() or 1)
    loader = DataLoader(_Reasons(dataset, rows), batch_size=64, num_workers=workers, collate_fn=list)
    return [reason for batch in loader for reason in batch]


class _Reasons(TorchDataset):
    def __init__(self, dataset, rows: range):
        self.dataset = dataset
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str | None:
        try:
            load_image(self.dataset[self.rows[index]]["image"])
        except ValueError as error:
            return str(error)
        return None


def row_name(dataset):
    """Return a function that names a row by the path of its image, or by its number."""
    paths: list = []

    def name(row: int) -> str:
        if not paths and "image" in dataset.column_names:
            paths.extend(image_paths(dataset))
        return str(paths[row]) if paths and paths[row] else f"of row {row}"

    return name


class LeftOut:
    """Count the rows of a stream that are left out, over all workers, and name the first few and then ever fewer."""

    def __init__(self, source: str):
        self.source = source
        self.count = torch.zeros((), dtype=torch.long).share_memory_()

    def __call__(self, name: str, reason: str):
        self.count += 1
        if (count := int(self.count)) <= 3 or set(str(count)[1:]) == {"0"}:
            logger.warning(f"{self.source}: {name} is left out ({reason}); {count} rows left out so far.")


class ReadableImages:
    """Read the images of a stream, for its `map` with batches of one row; leave out what cannot be read."""

    def __init__(self, what: str):
        self.left_out = LeftOut(f"The {what} data")

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        [image] = batch["image"]
        try:
            return {**batch, "image": [load_image(image and with_bytes(image))]}
        except (ValueError, OSError) as error:
            name = (batch.get("image_id") or [None])[0] or (image or {}).get("path")
            self.left_out(f"the image {name or 'of a row'}", str(error))
        return {name: [] for name in batch}


def readable_stream(stream, what: str):
    """Return the stream with its images read, without the rows whose image cannot be read."""
    if "image" not in (stream.column_names or stream._resolve_features().column_names):
        return stream
    return undecoded(stream).map(ReadableImages(what), batched=True, batch_size=1)


def read_image(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of [`undecoded`] data with its image read; a row without one is returned unchanged."""
    return {**row, "image": load_image(row["image"])} if isinstance(row.get("image"), dict) else row
