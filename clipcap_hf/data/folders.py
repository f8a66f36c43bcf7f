"""Read folders of images with captions: metadata files, a text file per image, or Flickr8k's own files."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import check_file, files_below, find_images, listed
from .records import CaptionedRecord, ImageFolder, present_records, records_to_dataset
from .schema import CAPTION_COLUMNS, SPLIT_NAMES, select_split, split_name, warn_of_overlap


logger = logging.getLogger(__name__)

_METADATA = ("metadata.jsonl", "metadata.csv")
_FLICKR8K = ("Flickr8k.token.txt", "captions.txt")
_FLICKR8K_SPLITS = {"train": "trainImages", "validation": "devImages", "test": "testImages"}


def load_folder(
    source: str | os.PathLike,
    images: None = None,
    split: str | None = None,
    missing: str | None = None,
    image_column: str | None = None,
    caption_column: str | list[str] | None = None,
    id_column: str | None = None,
    streaming: bool = False,
    cache_dir: Any = None,  # unused, since nothing is cached; accepted as other readers do
):
    """Read a folder of images: the reader "imagefolder" of [`load_captions`]."""
    root = Path(source)
    if images is not None:
        raise ValueError("Leave out `images`: the folder itself holds the images.")
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}." if not root.exists() else f"{root} is not a folder.")
    columns = (image_column, caption_column, id_column)
    below = files_below(root, [])  # folders that cannot be read are an error where their images are sought
    files = [path for name in _METADATA for path in below if path.name == name]
    if files:
        records = [record for file in files for record in _read_metadata(file, root, *columns)]
    elif any((root / name).is_file() for name in _FLICKR8K):
        return load_flickr8k(root, split=split, missing=missing)
    else:
        records = list(_read_sidecars(root))
    return _to_splits(_one_per_image(records), root, split, missing or "error", streaming)


def _to_splits(records: list[CaptionedRecord], root: Path, split: str | None, missing: str, streaming: bool = False):
    from datasets import DatasetDict, IterableDatasetDict

    _check_every_image_has_a_record(records, root, missing)
    splits: dict[str, list[CaptionedRecord]] = {}
    for record in records:
        splits.setdefault(record.split, []).append(record)
    if split is not None:  # images missing from other splits do not matter
        splits = {name: group for name, group in splits.items() if split_name(name) == split_name(split)} or splits
    folder = ImageFolder(root)
    datasets = DatasetDict(
        {
            name: records_to_dataset(name, list(present_records(group, folder, missing, root)), root)
            for name, group in splits.items()
        }
    )
    warn_of_overlap(datasets)
    if streaming:
        datasets = IterableDatasetDict({name: dataset.to_iterable_dataset() for name, dataset in datasets.items()})
    return select_split(datasets, split, str(root))


def _check_every_image_has_a_record(records: list[CaptionedRecord], root: Path, missing: str):
    folder = ImageFolder(root)
    paths = {record.paths[0]: folder.find(record.paths) for record in records}
    present = {os.path.normpath(path) for path in paths.values() if path is not None}
    found = [path for path in _images_below(root) if os.path.normpath(path) not in present]
    if not found:
        return
    names = listed([os.path.relpath(path, root) for path in found], 3)
    message = f"{len(found)} images in {root} have no caption: {names}"
    if absent := [name for name, path in paths.items() if path is None]:
        message += f", while {len(absent)} rows name files that do not exist: {listed(absent, 3)}"
    if missing == "error":
        raise ValueError(f"{message}. To go on without them, pass `missing='skip'` (--missing skip).")
    logger.warning(f"{message}. They were left out.")


def _images_below(root: Path) -> list[str]:
    paths, errors = find_images([root])
    if unreadable := [error for error in errors if "cannot be read" in error]:
        raise PermissionError(unreadable[0])
    return paths


def _split_of(path: str, root: Path) -> str:
    """Return the split of an image: its top-level folder if that is the name of a split, otherwise "train"."""
    first = Path(path).parts[0]
    return split_name(first) if first in SPLIT_NAMES and (root / first).is_dir() else "train"


def _one_per_image(records: list[CaptionedRecord]) -> list[CaptionedRecord]:
    """Join the captions of rows with the same id, which must be rows of the same image."""
    images: dict[tuple, CaptionedRecord] = {}
    for record in records:
        first = images.setdefault((record.split, record.image_id), record)
        if first.paths != record.paths:
            raise ValueError(
                f"The images {first.paths[0]} and {record.paths[0]} have the same id {record.image_id!r:.80}: each "
                "image needs its own."
            )
        if first is not record:
            first.captions += record.captions
    return list(images.values())


# -- metadata.jsonl and metadata.csv


def _read_metadata(file: Path, root: Path, image_column, caption_column, id_column) -> Iterator[CaptionedRecord]:
    check_file(file, "file of captions")
    rows = list(_read_rows(file))
    if not rows:
        raise ValueError(f"{file} has no rows.")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    file_column = _file_column(names, image_column, file)
    captions = _caption_columns(names, caption_column, file)
    if id_column is not None and id_column not in names:
        raise ValueError(f"{file} has no column {id_column!r}; the columns are {', '.join(names)}.")
    for line, row in rows:
        name = row.get(file_column)
        if not isinstance(name, str) or not name:
            raise ValueError(f"Line {line} of {file} names no image in {file_column!r}: {name!r:.80}.")
        path = os.path.normpath(os.path.relpath(file.parent / name, root))
        texts = [text for column in captions for text in _texts(row.get(column), column, line, file)]
        image_id = path if id_column is None else row.get(id_column)
        if not isinstance(image_id, (int, str)) or isinstance(image_id, bool):
            raise ValueError(f"Line {line} of {file} has the id {image_id!r:.80}, which is neither text nor a number.")
        yield CaptionedRecord(image_id, [path], texts, _split_of(path, root))


def _texts(value: Any, column: str, line: int, file: Path) -> list[str]:
    texts = [] if value is None else value if isinstance(value, list) else [value]
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"Line {line} of {file}: {column!r} must be text, but is {text!r:.80} ({type(text).__name__}): is "
                "this the column of the captions?"
            )
    return texts


def _file_column(names: list[str], image_column: str | None, file: Path) -> str:
    wanted = ["file_name"] if image_column in (None, "image") else [f"{image_column}_file_name", image_column]
    wanted += [name for name in names if image_column is None and name.endswith("_file_name")]
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"{file} has no column {wanted[0]!r}; the columns are {', '.join(names)}.")


def _caption_columns(names: list[str], caption_column, file: Path) -> list[str]:
    if caption_column is None:
        caption_column = [name for name in CAPTION_COLUMNS if name in names][:1]
        if not caption_column:
            raise ValueError(
                f"{file} has no column known for captions; the columns are {', '.join(names)}. Pass `caption_column=`."
            )
    caption_column = [caption_column] if isinstance(caption_column, str) else list(caption_column)
    for name in caption_column:
        if name not in names:
            raise ValueError(f"{file} has no column {name!r}; the columns are {', '.join(names)}.")
    return caption_column


def _read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the rows of a metadata file with their line numbers. Each field of a CSV is text, even `None` and `12`."""
    text = read_text(file)
    if file.suffix == ".csv":
        yield from _read_csv(text, file)
        return
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError) as error:
            array = " The file is a JSON array; write one object per line." if text.lstrip()[:1] == "[" else ""
            raise ValueError(f"Line {line} of {file} is not a JSON object: {error}.{array}") from None
        if not isinstance(row, dict):
            raise ValueError(f"Line {line} of {file} is not a JSON object, but a {type(row).__name__}.")
        yield line, row


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; of fields of the same name, Python would keep the last without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it has several fields {repeated!r:.80}")
    return row


def _read_csv(text: str, file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if repeated := [name for name, count in Counter(header).items() if count > 1]:
            raise ValueError(f"{file} has several columns {repeated[0]!r:.80}: give each a name of its own.")
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"Line {reader.line_num} of {file} has {len(row)} fields, but the header has {len(header)}: put "
                    "captions with commas in double quotes."
                )
            if row:
                yield reader.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} of {file} is not CSV: {error}.") from None


def read_text(file: Path) -> str:
    """Read a UTF-8 file; an error names the file and the line."""
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"Line {line} of {file} is not UTF-8 ({error.reason}): save the file as UTF-8.") from None


# -- 1.jpg and 1.txt


def _read_sidecars(root: Path) -> Iterator[CaptionedRecord]:
    """Read images with their captions from text files of the same name, one caption per line."""
    found = False
    for image in _images_below(root):
        text = Path(image).with_suffix(".txt")
        if text.is_file():
            found = True
            path = os.path.relpath(image, root)
            captions = [line for line in read_text(text).split("\n") if line.strip()]
            yield CaptionedRecord(path, [path], captions, _split_of(path, root))
    if not found:
        raise ValueError(
            f"{root} has no captions in a known form: metadata.jsonl, metadata.csv, {', '.join(_FLICKR8K)}, or a .txt "
            "file next to each image."
        )


# -- Flickr8k


def load_flickr8k(
    source: str | os.PathLike,
    images: str | os.PathLike | None = None,
    split: str | None = None,
    missing: str | None = None,
    streaming: bool = False,
):
    """Read Flickr8k's own files: the reader "flickr8k" of [`load_captions`]."""
    source = Path(source)
    names = [source / name for name in _FLICKR8K] if source.is_dir() else [source]
    file = next((path for path in names if path.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"There is no annotation file {' or '.join(map(str, names))}.")
    root = Path(images) if images is not None else file.parent
    by_name: dict[str, list[str]] = {}
    for path in _images_below(root):
        by_name.setdefault(os.path.basename(path), []).append(os.path.relpath(path, root))
    lists = _split_lists(file.parent)
    records: dict[str, CaptionedRecord] = {}
    unlisted = set()
    for name, caption in _read_flickr8k(file):
        split_of_name = lists.get(name) if lists else "train"
        if split_of_name is None:
            unlisted.add(name)
        else:
            [path, *others] = by_name.get(name, [name])
            if others:
                raise ValueError(f"{file} names {name}, but {root} has several: {listed([path, *others], 3)}.")
            records.setdefault(name, CaptionedRecord(name, [path], [], split_of_name)).captions.append(caption)
    if unlisted:
        logger.warning(f"{file}: {len(unlisted)} images are in no split list; they were left out.")
    if not records:
        raise ValueError(f"{file} holds no captions.")
    # Unlisted images are not an error here: the annotations define the data set.
    from datasets import DatasetDict, IterableDatasetDict

    folder = ImageFolder(root)
    splits: dict[str, list[CaptionedRecord]] = {}
    for record in present_records(list(records.values()), folder, missing or "error", file):
        splits.setdefault(record.split, []).append(record)
    datasets = DatasetDict({name: records_to_dataset(name, group, file) for name, group in splits.items()})
    if streaming:
        datasets = IterableDatasetDict({name: dataset.to_iterable_dataset() for name, dataset in datasets.items()})
    return select_split(datasets, split, str(file))


def _split_lists(folder: Path) -> dict[str, str]:
    """Return the split of each image that `Flickr_8k.trainImages.txt` and the like list, if these exist."""
    files = {name: folder / f"Flickr_8k.{part}.txt" for name, part in _FLICKR8K_SPLITS.items()}
    return {image: name for name, file in files.items() if file.is_file() for image in read_text(file).split()}


def _read_flickr8k(file: Path) -> Iterator[tuple[str, str]]:
    text = read_text(file)
    lines = text.split("\n")
    if lines[0].strip().lower() == "image,caption":
        reader = csv.reader(io.StringIO(text.partition("\n")[2], newline=""))
        try:
            for row in reader:
                if row:
                    yield row[0], ",".join(row[1:])  # captions with commas are not always quoted
        except csv.Error as error:
            raise ValueError(f"Line {reader.line_num + 1} of {file} is not CSV: {error}.") from None
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, tab, caption = line.rstrip("\r").partition("\t")
        if not tab:
            raise ValueError(
                f"Line {number} of {file} is not `name.jpg#0`, a tab and a caption, and the file has no header "
                f"`image,caption`: {line[:80]!r}."
            )
        name = name.partition("#")[0]
        # The published file has captions for one image that was never released.
        if not name.endswith(".jpg.1"):
            yield name, caption
