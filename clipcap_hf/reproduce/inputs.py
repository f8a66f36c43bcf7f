"""The publishers' files: which are needed, where they are from, what is missing, broken or changed."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..data import load_captions
from ..data.schema import image_paths
from ..evaluation.sets import find_published_files
from ..files import check_file, listed
from .claims import TABLES


@dataclass(frozen=True)
class Published:
    """Where the files of a data set are from, and about how large they are."""

    annotations: str
    images: str


_KARPATHY = "Andrej Karpathy's page 'Deep Visual-Semantic Alignments' (caption_datasets.zip)"
_GCC = "Google's page 'Conceptual Captions' (ai.google.com/research/ConceptualCaptions, Download)"
#: By the publishers' own pages; sizes are about what they say, and were not measured here.
PUBLISHED = {
    "coco": Published(
        f"dataset_coco.json (144 MB), from {_KARPATHY}",
        "train2014/ (82,783 images, 13 GB) and val2014/ (40,504 images, 6 GB), from cocodataset.org, Download, '2014 "
        "Train images' and '2014 Val images'",
    ),
    "conceptual-captions": Published(
        "Train_GCC-training.tsv (3.3 M rows, 0.5 GB) and Validation_GCC-1.1.0-Validation.tsv (15,840 rows), from "
        f"{_GCC}",
        "training/ and validation/, images named by their row (000000012.jpg), downloaded from the URLs of the files, "
        "for example by img2dataset (90 GB or more at 256 pixels)",
    ),
    "nocaps": Published(
        "nocaps_val_4500_captions.json (10 MB), from nocaps.org, Download, 'Validation set with captions'",
        "val/ (4,500 images of Open Images, 1.5 GB), from the URLs in that file (coco_url)",
    ),
    "flickr8k": Published(
        f"dataset_flickr8k.json (9 MB), from {_KARPATHY}", "Flicker8k_Dataset/ (8,091 images, 1 GB), from its authors"
    ),
    "flickr30k": Published(
        f"dataset_flickr30k.json (38 MB), from {_KARPATHY}",
        "flickr30k-images/ (31,783 images, 4 GB), from its authors",
    ),
    "stair": Published(
        "stair_captions_v1.2_val.json, from captions.stair.center",
        "val2014/ (40,504 images, 6 GB), from cocodataset.org",
    ),
}


class PublishedSplit:
    """A split of a publisher's files; they are read when they are first asked for."""

    def __init__(self, table: str, split: str, root: str | os.PathLike):
        self.table, self.split, self.root = table, split, Path(root)

    @cached_property
    def files(self) -> tuple[str, Path, Path]:
        return find_published_files(TABLES[self.table].protocol, self.root, self.split)

    @cached_property
    def rows(self):
        """The captioned images, as `clipcap_hf.data.load_captions` gives them."""
        kind, annotations, images = self.files
        check_file(annotations, "annotation file")
        source = {self.split: annotations} if kind in ("conceptual", "nocaps", "stair") else annotations
        return load_captions(kind, source, images=images, split=self.split)

    @cached_property
    def paths(self) -> list[str]:
        return [str(path) for path in image_paths(self.rows)]

    def missing(self) -> list[str]:
        """Say what is missing and where it is from; nothing if all is there."""
        published = PUBLISHED[self.table]
        try:
            _ = self.files
        except FileNotFoundError as error:
            return [f"{error} Needed: {published.annotations}; and {published.images}."]
        try:
            _ = self.rows
        except FileNotFoundError as error:
            return [f"{error} Needed: {published.images}."]
        return []

    def wrong_number(self) -> list[str]:
        """Say that the number of images is not that of the paper or the benchmark; nothing if it is."""
        table = TABLES[self.table]
        expected = table.train_images if self.split == "train" else table.protocol.splits.get(self.split)
        if expected in (None, len(self.rows)):
            return []
        _, annotations, _ = self.files
        return [f"{annotations}, split {self.split}: {len(self.rows)} images, and there should be {expected}"]

    def broken(self) -> list[str]:
        """List the images that are cut short or no images; a picture that ends as JPEG files do is not decoded."""
        return [path for path in self.paths if not _is_whole(path)]

    def fingerprint(self) -> dict[str, Any]:
        """Describe the files, so that a change is noticed: the annotations by content, images by size and time."""
        digest = hashlib.sha256()
        for path in self.paths:
            status = os.stat(path)
            digest.update(
                f"{Path(path).name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogatepass")
            )
        _, annotations, _ = self.files
        return {
            "annotations": annotations.name,
            "annotations_sha256": _sha256(annotations),
            "images": len(self.paths),
            "images_sha256_of_names_sizes_times": digest.hexdigest(),
        }


def check_inputs(splits: Iterable[PublishedSplit], allow_subset: bool = False):
    """Refuse data that is missing, broken or of another split, and say everything that is wrong at once.

    Args:
        splits: All that will be read.
        allow_subset: Accept another number of images, whose scores are no reproduction.

    Raises:
        FileNotFoundError: Files are missing; the message lists them, with the publishers' pages and sizes.
        ValueError: A file is not the publisher's, has another number of images, or images are broken.
    """
    splits = list(splits)
    missing = list(dict.fromkeys(line for split in splits for line in split.missing()))
    if missing:
        raise FileNotFoundError("Files are missing; nothing was run.\n" + "\n".join(f"- {line}" for line in missing))
    wrong = [] if allow_subset else [line for split in splits for line in split.wrong_number()]
    if wrong:
        raise ValueError(
            "The data is of another split, or images are missing; nothing was run. --allow-subset goes on, and its "
            "numbers are no reproduction.\n" + "\n".join(f"- {line}" for line in wrong)
        )
    broken = [path for split in splits if split.table != "conceptual-captions" for path in split.broken()]
    if broken:
        raise ValueError(f"{len(broken)} images are cut short or no images; download them again: {listed(broken, 3)}.")


def _is_whole(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            file.seek(-2, os.SEEK_END)
            if start == b"\xff\xd8" and file.read() == b"\xff\xd9":
                return True
        with Image.open(path) as image:
            image.load()
        return True
    except Exception:  # decoders raise many kinds of errors for damaged files
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
