"""Turn the records that readers yield, one per image, into a data set."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import listed
from .coco import is_name
from .schema import CaptionCleaner, caption_features, check_unique


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass
class CaptionedRecord:
    """One image of an annotation file: its possible paths and its captions."""

    image_id: int | str
    paths: list[str]  # relative to the folder of images; the first that exists is used
    captions: list[Any] = field(default_factory=list)
    split: str = "train"
    domain: str | None = None


class ImageFolder:
    """Find images by name. Each folder is listed once, since asking for files one by one is slow over a network."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder of images {root}.")
        self.root = root
        self.listings: dict[str, dict[str, str]] = {}

    def find(self, paths: Iterable[str]) -> str | None:
        """Return the first of the paths that exists. An accent may be one character there and two here."""
        for path in paths:
            parent, name = os.path.split(os.path.join(self.root, path))
            names = self._names(parent)
            if found := names.get(name, names.get(_composed(name))):
                return os.path.join(parent, found)
        return None

    def _names(self, parent: str) -> dict[str, str]:
        if parent not in self.listings:
            names = os.listdir(parent) if os.path.isdir(parent) else []
            self.listings[parent] = {**{_composed(name): name for name in names}, **{name: name for name in names}}
        return self.listings[parent]


def _composed(name: str) -> str:
    """Return a name with each accented letter as one character, since file systems and editors differ in that."""
    return unicodedata.normalize("NFC", name)


def present_records(
    records: list[CaptionedRecord], folder: ImageFolder, missing: str, source: Path
) -> Iterator[CaptionedRecord]:
    absent = []
    for record in records:
        path = folder.find(record.paths)
        if path is None:
            absent.append(record.paths[0])
        else:
            record.paths = [path]
            yield record
    if not absent:
        return
    message = (
        f"{len(absent)} of the {len(records)} images that {source} lists are not in {folder.root}: {listed(absent, 3)}"
    )
    if missing == "error" or len(absent) == len(records):
        raise FileNotFoundError(
            f"{message}. Is `images` the right folder? To go on with those present, pass `missing='skip'` "
            "(--missing skip)."
        )
    logger.warning(f"{message}. They were left out.")


def records_to_dataset(split: str, records: list[CaptionedRecord], source) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo, NamedSplit

    check_unique((record.image_id for record in records), f"{source} ({split})")
    clean = CaptionCleaner(str(source))
    if unnamed := [record.paths[0] for record in records if not is_name(f"{record.paths[0]}{record.image_id}")]:
        raise ValueError(
            f"{source}: the file name {unnamed[0]!r} is not UTF-8, and data sets hold text in UTF-8 only: rename the "
            "file."
        )
    uncaptioned = not any(record.captions for record in records)  # images to caption, without references
    rows: dict[str, list] = {"image": [], "captions": [], "image_id": [], "split": [], "domain": []}
    without = []
    for record in records:
        captions = clean(record.captions, record.image_id)
        if not captions and not uncaptioned:
            without.append(record.image_id)
            continue
        rows["image"].append({"bytes": None, "path": record.paths[0]})
        rows["captions"].append(captions)
        rows["image_id"].append(record.image_id)
        rows["split"].append(split)
        rows["domain"].append(record.domain)
    clean.report()
    if without:
        logger.warning(f"{source}: {len(without)} images without a caption were left out, the first is {without[0]}.")
    int_ids = all(isinstance(image_id, int) for image_id in rows["image_id"])
    if not int_ids:
        rows["image_id"] = [str(image_id) for image_id in rows["image_id"]]
    features = caption_features(int_ids, domain=any(rows["domain"]))
    schema = features.arrow_schema
    arrays = [pa.array(rows[name], type=schema.field(name).type) for name in features]
    table = pa.Table.from_arrays(arrays, schema=schema)
    return Dataset(table, info=DatasetInfo(features=features), split=NamedSplit(split))
