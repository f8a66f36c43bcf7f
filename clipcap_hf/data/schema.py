"""The common form of captioned images for training, embedding and evaluation, and its checks."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

logger = logging.getLogger(__name__)

# Longer than any caption of an image: a whole document must have got into the column.
MAX_CAPTION_LENGTH = 10_000
_LINE_SEPARATORS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_SPLITS = {"val": "validation", "valid": "validation", "dev": "validation", "restval": "train", "training": "train"}
_SPLITS |= dict.fromkeys(("testing", "eval", "evaluation"), "test")
SPLIT_NAMES = {*_SPLITS, "train", "validation", "test"}
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentences", "json.caption")


def caption_features(int_ids: bool = True, domain: bool = False) -> Features:
    """
    Return the columns of captioned images.

    - `image`: [`~datasets.Image`], a path or bytes, decoded when the row is read; only raster formats are.
    - `captions`: list of strings, empty for images without references.
    - `image_id`: int64 if the format has whole numbers, which COCO's result files need, else string.
    - `split`: `"train"`, `"validation"`, `"test"`, or the data's own name.
    - `domain` (nocaps only): `"in-domain"`, `"near-domain"` or `"out-domain"`.
    """
    from datasets import Features, List, Value

    from .raster_image import RasterImage

    columns = {"image": RasterImage(), "captions": List(Value("string"))}
    columns |= {"image_id": Value("int64" if int_ids else "string"), "split": Value("string")}
    return Features(columns | ({"domain": Value("string")} if domain else {}))


def split_name(name: str) -> str:
    """Return the name of a split in `datasets`: `"val"` is `"validation"`, Karpathy's `"restval"` is `"train"`."""
    return _SPLITS.get(name, name)


def to_caption_form(
    dataset,
    image: str = "image",
    captions: str = "captions",
    image_id: str = "image_id",
    clip_embeds: str = "clip_embeds",
):
    """
    Rename columns to `image`, `captions`, `image_id` and `clip_embeds`, and make `captions` a list of strings.

    Missing columns are ignored; a column that already has one of the new names is dropped. Nothing is decoded.

    Args:
        dataset ([`~datasets.Dataset`], `IterableDataset` or a dictionary of them by split): The data set.
        image (`str`): Name of its image column.
        captions (`str`): Name of its caption column; each value is a string or a list of strings.
        image_id (`str`): Name of its id column.
        clip_embeds (`str`): Name of its column of CLIP embeddings.
    """
    if isinstance(dataset, dict):
        splits = {
            name: to_caption_form(split, image, captions, image_id, clip_embeds) for name, split in dataset.items()
        }
        return type(dataset)(splits)
    if dataset.column_names is None:
        dataset = dataset._resolve_features()
    names = {image: "image", captions: "captions", image_id: "image_id", clip_embeds: "clip_embeds"}
    renamed = {old: new for old, new in names.items() if old != new and old in dataset.column_names}
    in_the_way = [new for old, new in renamed.items() if new in dataset.column_names and new not in renamed]
    if in_the_way:
        dataset = dataset.remove_columns(in_the_way)
    if renamed:
        dataset = dataset.rename_columns(renamed)
    return _captions_as_lists(dataset) if "captions" in dataset.column_names else dataset


def _captions_as_lists(dataset):
    from datasets import Image, List, Value

    if dataset.features is not None and not isinstance(dataset.features["captions"], Value):
        return dataset
    if hasattr(dataset, "num_rows"):
        texts = [[] if text is None else [text] for text in dataset["captions"]]
        return dataset.remove_columns("captions").add_column("captions", texts, feature=List(Value("string")))
    if dataset.features is None:
        dataset = dataset._resolve_features()
    features = dataset.features.copy()
    for name, feature in features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    features["captions"] = List(Value("string"))
    # Cast last: `map` with features would leave images as bytes.
    as_list = dataset.map(lambda text: {"captions": [] if text is None else [text]}, input_columns="captions")
    return as_list.cast(features)


def clean_caption(caption: Any, where: str = "the data") -> str | None:
    """
    Put a caption on one line and strip it.

    Line separators of every kind (U+2028, U+0085, ...), which break tokenisers and result files, become a space.

    Returns:
        `str` or `None`: `None` if nothing is left, or if it has more than `MAX_CAPTION_LENGTH` characters.

    Raises:
        ValueError: If it is neither a string nor missing; the message names the place, `where`.
    """
    if caption is None:
        return None
    if not isinstance(caption, str):
        raise ValueError(
            f"A caption must be a string, but {where} has {str(caption)[:80]!r} ({type(caption).__name__}): is this "
            "the column of the captions?"
        )
    # Text files of Windows may begin with a byte order mark, which is no space.
    caption = _LINE_SEPARATORS.sub(" ", caption).strip().strip("\ufeff").strip()
    if not caption or len(caption) > MAX_CAPTION_LENGTH:
        return None
    # JSON can hold half a surrogate pair, which cannot be written to a file.
    return caption.encode("utf-8", "replace").decode("utf-8")


class CaptionCleaner:
    """Clean the captions of many images; `report` says at the end how many were left out."""

    def __init__(self, source: str):
        self.source = source
        self.left_out = 0
        self.example = None

    def __call__(self, captions: str | Iterable[Any] | None, image: Any) -> list[str]:
        if captions is None or isinstance(captions, str):
            captions = [captions]
        elif not isinstance(captions, Iterable) or isinstance(captions, Mapping):
            clean_caption(captions, f"image {image} of {self.source}")
        kept = []
        for caption in captions:
            cleaned = clean_caption(caption, f"image {image} of {self.source}")
            if cleaned is not None:
                kept.append(cleaned)
            elif caption is not None:
                self.left_out += 1
                self.example = image if self.example is None else self.example
        return kept

    def report(self):
        if self.left_out:
            logger.warning(
                f"{self.source}: {self.left_out} captions are empty or longer than {MAX_CAPTION_LENGTH} characters "
                f"and were left out, the first of image {self.example}."
            )


def select_split(splits: DatasetDict, split: str | None, source: str) -> Dataset | DatasetDict:
    """Return the named split, or all splits for `None`.

    Raises:
        ValueError: If the split does not exist; the message lists the splits.
    """
    if split is None:
        return splits
    found = [name for name in splits if name == split] or [
        name for name in splits if split_name(name) == split_name(split)
    ]
    if not found:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(map(repr, splits)) or 'none'}.")
    return splits[found[0]]


def warn_of_overlap(splits: Mapping[str, Dataset]) -> dict[tuple[str, str], int]:
    """
    Warn of images in several splits, by `image_id` and path: scores on them say nothing about new images.

    Args:
        splits (mapping of `str` to [`~datasets.Dataset`]): Such as a [`~datasets.DatasetDict`], or
            `{"train": ..., "test": ...}` from two sources.

    Returns:
        `dict`: The number of shared images for each pair of splits that shares some.
    """
    seen = {name: _image_keys(dataset) for name, dataset in splits.items()}
    shared = {}
    names = list(seen)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            # Ids of two sources may both count from 0, so paths decide if both splits have them.
            ids, paths = (len(seen[first][key] & seen[second][key]) for key in ("image_id", "path"))
            both_know_paths = seen[first]["path"] and seen[second]["path"]
            if count := paths if both_know_paths else ids:
                shared[first, second] = count
                logger.warning(
                    f"{count} images are in both {first!r} and {second!r}: remove them from one of the two."
                )
    return shared


def _image_keys(dataset: Dataset) -> dict[str, set]:
    keys: dict[str, set] = {"image_id": set(), "path": set()}
    if "image_id" in dataset.column_names:
        keys["image_id"] = set(dataset["image_id"])
    if "image" in dataset.column_names and getattr(dataset.features["image"], "_type", None) == "Image":
        keys["path"] = set(image_paths(dataset)) - {None}
    elif "image_path" in dataset.column_names:
        keys["path"] = set(dataset["image_path"]) - {None}
    return keys


def image_paths(dataset: Dataset, column: str = "image") -> list[str | None]:
    """Return the paths of an image column without reading the images; `None` if the data set holds the bytes."""
    import pyarrow.compute as pc

    arrow = dataset.select_columns([column]).with_format("arrow")
    paths = []
    for table in arrow.iter(10_000):
        stored = table[column]
        inside = pc.is_valid(pc.struct_field(stored, "bytes")).to_pylist()
        # In plain Python: `pc.if_else` of pyarrow before 26 reads outside of selected rows.
        paths += [None if held else path for held, path in zip(inside, pc.struct_field(stored, "path").to_pylist())]
    return paths


def check_unique(ids: Iterable, source: str):
    """Raise a `ValueError` that names the first ids that occur twice."""
    repeated = (i for i, count in Counter(ids).items() if count > 1)
    if first := list(islice(repeated, 4)):
        more = ", ..." if len(first) > 3 else ""
        raise ValueError(
            f"{source} lists the same image id twice: {', '.join(map(str, first[:3]))}{more}. Each image may have one "
            "entry with all its captions."
        )
