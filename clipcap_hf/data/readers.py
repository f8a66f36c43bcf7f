"""Read captioned images in common formats into the form of `schema.py`; images stay paths until they are used."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_file
from .coco import check_image_id, is_name, read_coco, read_json
from .columns import load_columns
from .folders import load_flickr8k, load_folder, read_text
from .records import CaptionedRecord, ImageFolder, present_records, records_to_dataset
from .schema import select_split, split_name, warn_of_overlap


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

logger = logging.getLogger(__name__)

USUAL_SPLITS = ("train", "restval", "validation", "test")


def load_captions(
    kind: str,
    source: str | os.PathLike | dict[str, str],
    images: str | os.PathLike | None = None,
    split: str | None = None,
    missing: str | None = None,
    **kwargs,
) -> Dataset | DatasetDict | IterableDataset:
    r"""
    Read captioned images.

    The formats (`kind`), with their `source` and `images`:

    - `"karpathy"`: `dataset_coco.json`, `dataset_flickr8k.json` or `dataset_flickr30k.json`; `images` is the folder
      with `train2014/` and `val2014/`, or with the Flickr images.
    - `"coco"`: `captions_train2014.json`, `captions_val2017.json`, ...; `images` is the folder with the images, or
      with `train2014/` and the like.
    - `"stair"`: `stair_captions_v1.2_train.json`, ... (Japanese); `images` as for COCO.
    - `"nocaps"`: `nocaps_val_4500_captions.json`, ...; `images` is the folder with the images.
    - `"official"`: `train_caption.json` of the official ClipCap code; `images` as for COCO.
    - `"conceptual"`: TSV of captions and URLs (Conceptual Captions 3M, 12M); `images` is a folder of images named by
      their row, from 0: `12.jpg`, `000000012.jpg` (subfolders too), as `img2dataset` names them with its default of
      10,000 images per shard.
    - `"flickr8k"`: folder, `captions.txt` (`image,caption`) or `Flickr8k.token.txt`, with `Flickr_8k.trainImages.txt`
      and the like next to it for the official splits; `images` is the folder with the images, subfolders too.
    - `"imagefolder"`: folder of images with `metadata.jsonl` or `metadata.csv`, with a `.txt` file next to each image,
      or as for Flickr8k. Top-level folders named `train`, `validation`, `test` and the like are the splits. No
      `images`.
    - `"webdataset"`: folder, path or glob pattern of `.tar` shards; streamed. No `images`.
    - `"hub"`: a data set on the Hub, or a folder or file that `load_dataset` reads without a script. No `images`.

    Args:
        kind (`str`): The format.
        source (`str`, path, or `dict`): The annotations; a dictionary gives one file per split.
        images (`str` or path, *optional*): Folder of the images; by default that of `source`.
        split (`str`, *optional*): The split to return; `"val"` is `"validation"`. All by default.
        missing (`str`, *optional*): What to do if listed images do not exist: `"error"`, or `"skip"` them with a
            warning that counts them. The default is `"skip"` for Conceptual Captions, whose images vanish from the
            web, and `"error"` for all others.
        kwargs: For `"imagefolder"`, `"webdataset"` and `"hub"`: `image_column`, `caption_column` (a name or a list of
            names), `id_column`, and arguments of `datasets.load_dataset` such as `streaming=True`.

    Returns:
        [`~datasets.Dataset`] for one split, [`~datasets.DatasetDict`] for all; iterable ones if streamed. The columns
        are those of [`caption_features`]: `image`, `captions`, `image_id`, `split` and, for nocaps, `domain`.

    Raises:
        FileNotFoundError: If the annotations do not exist, or images are missing and `missing` is `"error"`.
        ValueError: If the file is not in this format, a caption is not a string, an image is listed twice, or a split
            or column does not exist; the message says what was found.

    Example:

    ```python
    >>> from clipcap_hf.data import load_captions

    >>> train = load_captions("karpathy", "dataset_coco.json", images="coco", split="train")  # doctest: +SKIP
    >>> train[0]["captions"]  # doctest: +SKIP

    ```
    """
    if kind not in READERS:
        raise ValueError(f"Unknown reader {kind!r}; choose one of {', '.join(map(repr, READERS))}.")
    if missing not in (None, "error", "skip"):
        raise ValueError(f"`missing` must be 'error' or 'skip', but is {missing!r}.")
    return READERS[kind](source, images=images, split=split, missing=missing, **kwargs)


def _load_files(
    read: Callable[[Path, str], Iterable[CaptionedRecord]],
    source,
    images=None,
    split: str | None = None,
    missing: str | None = None,
    **unknown,
) -> Dataset | DatasetDict:
    from datasets import DatasetDict

    if unknown:
        raise ValueError(f"This format has fixed columns, so it takes no {', '.join(map(repr, unknown))}.")
    files = source if isinstance(source, dict) else {None: source}
    splits: dict[str, list[CaptionedRecord]] = {}
    for name, file in files.items():
        file = Path(file)
        check_file(file, "annotation file")
        folder = ImageFolder(file.parent if images is None else Path(images))
        for record in present_records(list(read(file, folder)), folder, missing or "error", file):
            splits.setdefault(split_name(name or record.split), []).append(record)
    datasets = DatasetDict({name: records_to_dataset(name, records, source) for name, records in splits.items()})
    warn_of_overlap(datasets)
    if split is not None:
        _count_unusual_splits(datasets, split, source)
    return select_split(datasets, split, str(source))


def _count_unusual_splits(datasets, split: str, source):
    """Warn of splits that nobody would ask for, such as a misspelt one, whose images would vanish without a word."""
    for name, rows in datasets.items():
        if name not in (*USUAL_SPLITS, split, split_name(split)):
            logger.warning(f"{source}: {len(rows)} images of the split {name!r} were left out; {split!r} is read.")


def _read_json(path: Path, keys: Iterable[str], example: str) -> Any:
    data = read_json(path)
    if keys and not (isinstance(data, dict) and set(keys) <= data.keys()):
        found = ", ".join(list(data)[:10]) if isinstance(data, dict) else f"a {type(data).__name__}"
        raise ValueError(f"{path} does not have the layout of {example}, with {' and '.join(keys)}: it holds {found}.")
    return data


def _field(entry: Any, name: str, path: Path, number: int) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        found = ", ".join(entry) if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise ValueError(f"Entry {number} of {path} has no {name!r}; it has {found}.")
    return entry[name]


def _read_karpathy(path: Path, folder: ImageFolder) -> Iterator[CaptionedRecord]:
    images = _read_json(path, ["images"], "a Karpathy split (dataset_coco.json)")["images"]
    if not _list(images, f"`images` of {path}"):
        raise ValueError(f"{path} lists no images.")
    for number, image in enumerate(images):
        place = f"Entry {number} of {path}"
        filename = _text(_field(image, "filename", path, number), f"{place}: filename")
        split = _text(_field(image, "split", path, number), f"{place}: split")
        if not re.fullmatch(r"\w+(\.\w+)*", split):  # as data sets name them
            raise ValueError(f"{place}: split must be a name of letters and digits, not {split!r:.80}.")
        sentences = _list(_field(image, "sentences", path, number), f"{place}: sentences")
        yield CaptionedRecord(
            image_id=check_image_id(image.get("cocoid", image.get("imgid", filename)), f"{place}: cocoid or imgid"),
            paths=[os.path.join(_text(image.get("filepath", ""), f"{place}: filepath"), filename), filename],
            captions=[_field(sentence, "raw", path, number) for sentence in sentences],
            split=split_name(split),
        )


def _list(value: Any, place: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{place} must be a list, not {value!r:.80}.")
    return value


def _text(value: Any, place: str) -> str:
    if not is_name(value):
        raise ValueError(f"{place} must be text, not {value!r:.80}.")
    return value


def _read_coco(path: Path, folder: ImageFolder) -> Iterator[CaptionedRecord]:
    split = _split_of_name(path)
    strangers = 0
    for number, image in enumerate(read_coco(path)):
        if not image.entry:
            strangers += len(image.captions)
            continue
        name = _text(_field(image.entry, "file_name", path, number), f"{path}: image {number}: file_name")
        yield CaptionedRecord(image.image_id, _coco_paths(name), image.captions, split, image.domain)
    if strangers:
        logger.warning(f"{path}: {strangers} captions belong to images that it does not list; they were left out.")


def _coco_paths(file_name: str) -> list[str]:
    # COCO_train2014_000000000009.jpg usually lies in a folder train2014.
    found = re.match(r"COCO_(\w+?)_\d+\.", file_name)
    years = [found[1]] if found else ["train2017", "val2017", "test2017"]
    return [file_name, *(os.path.join(year, file_name) for year in years)]


def _split_of_name(path: Path) -> str:
    found = re.search(r"(?<![a-z])(train|val|test|dev)", path.stem.lower())
    return split_name(found[1]) if found else "train"


def _read_official(path: Path, folder: ImageFolder) -> Iterator[CaptionedRecord]:
    captions: dict[int, list] = {}
    data = _read_json(path, [], "train_caption.json")
    if not isinstance(data, list):
        raise ValueError(f"{path} does not have the layout of the official train_caption.json, a list of captions.")
    for number, entry in enumerate(data):
        image_id = _field(entry, "image_id", path, number)
        try:
            image_id = int(image_id)
        except (TypeError, ValueError):
            raise ValueError(
                f"Entry {number} of {path} has the image_id {image_id!r}, which is not a number."
            ) from None
        captions.setdefault(image_id, []).append(_field(entry, "caption", path, number))
    for image_id, texts in captions.items():
        names = [f"COCO_{part}2014_{image_id:012d}.jpg" for part in ("train", "val")]
        yield CaptionedRecord(image_id, [path for name in names for path in _coco_paths(name)[::-1]], texts)


def _read_conceptual(path: Path, folder: ImageFolder) -> Iterator[CaptionedRecord]:
    files = _files_by_number(folder.root)
    split = _split_of_name(path)
    # Only line feeds end a row: captions may contain other line separators.
    with path.open("rb") as file:
        number = 0
        for line_number, content in enumerate(file, start=1):
            try:
                line = content.decode("utf-8-sig" if line_number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"Line {line_number} of {path} is not UTF-8 ({error.reason}).") from None
            columns = line.rstrip("\r\n").split("\t")
            if line_number == 1 and sorted(column.strip().lower() for column in columns) == ["caption", "url"]:
                continue
            urls = [column.startswith(("http://", "https://")) for column in columns]
            if len(columns) != 2 or not any(urls):
                raise ValueError(f"Line {line_number} of {path} is not a caption, a tab and a URL: {line[:200]!r}.")
            caption = columns[1 if urls[0] and not urls[1] else 0]  # the 12M set has the URL first
            if number in files and number < 1000:
                _check_caption_beside(files[number], caption, number, path)
            yield CaptionedRecord(number, [files.get(number, f"{number}.jpg")], [caption], split)
            number += 1


def _check_caption_beside(image: str, caption: str, number: int, path: Path):
    # img2dataset writes the caption next to the image. Numbers that are not rows would silently mix up all captions.
    beside = Path(image).with_suffix(".txt")
    if beside.is_file() and (found := read_text(beside)).split() != caption.split():
        raise ValueError(
            f"{beside} has the caption {found!r}, but row {number} of {path} is {caption!r}: are the images named by "
            "their row?"
        )


def _files_by_number(root: Path) -> dict[int, str]:
    from ..files import find_images

    files: dict[int, str] = {}
    for path in find_images([root])[0]:
        if (stem := Path(path).stem).isdecimal():
            if (other := files.setdefault(int(stem), path)) != path:
                raise ValueError(f"{other} and {path} are both named by row {int(stem)}.")
    return files


def _load_conceptual(source, images=None, split=None, missing=None, **unknown):
    return _load_files(_read_conceptual, source, images, split, missing or "skip", **unknown)


READERS: dict[str, Callable] = {
    "karpathy": partial(_load_files, _read_karpathy),
    "coco": partial(_load_files, _read_coco),
    "stair": partial(_load_files, _read_coco),
    "nocaps": partial(_load_files, _read_coco),
    "official": partial(_load_files, _read_official),
    "conceptual": _load_conceptual,
    "flickr8k": load_flickr8k,
    "imagefolder": load_folder,
    "webdataset": partial(load_columns, "webdataset"),
    "hub": partial(load_columns, None),
}
