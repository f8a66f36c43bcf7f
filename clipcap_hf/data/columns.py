"""Load data sets with `datasets` and rename their columns to the common form of `schema.py`."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from .readable import LeftOut
from .saved import is_saved, load_saved
from .schema import CAPTION_COLUMNS, CaptionCleaner, caption_features, clean_caption, image_paths, select_split
from .shards import load_shards


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

logger = logging.getLogger(__name__)


def load_columns(
    builder: str | None,
    source: str | os.PathLike,
    images: None = None,
    split: str | None = None,
    missing: str | None = None,
    image_column: str | None = None,
    caption_column: str | list[str] | None = None,
    id_column: str | None = None,
    **load_kwargs,
) -> Dataset | DatasetDict | IterableDataset:
    """Read with `datasets`: the readers "webdataset" and "hub" (`builder` is None) of [`load_captions`]."""
    if images is not None:
        raise ValueError("Leave out `images`: the data set itself contains its images or their paths.")
    splits = _load(builder, source, load_kwargs, missing or "error")
    if split is not None:
        selected = select_split(splits, split, str(source))
        splits = type(splits)({next(name for name in splits if splits[name] is selected): selected})
    names = {"image_column": image_column, "caption_column": caption_column, "id_column": id_column}
    for name, dataset in splits.items():
        if hasattr(dataset, "num_rows"):
            root = source if builder == "imagefolder" else None
            splits[name] = _map_style(dataset, name, str(source), missing or "error", root, **names)
        else:
            splits[name] = _streamed(dataset, name, str(source), **names)
    return splits if split is None else next(iter(splits.values()))


def _load(builder: str | None, source, load_kwargs: dict, missing: str):
    from datasets import DatasetDict, load_dataset

    if builder == "webdataset":
        return load_shards(source, {"streaming": True, **load_kwargs}, missing)
    if builder is not None:
        if not os.path.isdir(source):
            raise FileNotFoundError(f"There is no folder {source}.")
        return load_dataset(builder, data_dir=os.fspath(source), **load_kwargs)
    if is_saved(source):
        saved = load_saved(source)
        return saved if isinstance(saved, DatasetDict) else DatasetDict({str(saved.split or "train"): saved})
    if os.path.isfile(source):
        raise ValueError(
            f"{source} is a single file, but 'hub' reads folders and Hub ids: pass its folder. Name a table of images "
            "and captions metadata.csv or metadata.jsonl, with a column file_name, and read it as 'imagefolder'."
        )
    return load_dataset(os.fspath(source), **load_kwargs)


def _map_style(
    dataset: Dataset, split: str, source: str, missing: str, root, image_column, caption_column, id_column
) -> Dataset:
    from .raster_image import RasterImage

    if "__key__" in dataset.column_names:
        dataset = _one_image_column(dataset, image_column)
        keys = _column(dataset, "__key__")
        id_column = "__key__" if id_column is None and len(set(keys)) == len(keys) else id_column
    image_column, caption_columns = _find_columns(dataset, source, image_column, caption_column, id_column)
    ids_of_rows = None if id_column in (None, image_column) else _column(dataset, id_column)
    dataset = dataset.cast_column(image_column, RasterImage())
    paths = image_paths(dataset, image_column)
    if ids_of_rows is not None:
        ids = ids_of_rows
    elif id_column is not None:
        ids = list(paths)
    else:
        ids = [_default_id(split, *row, root) for row in enumerate(paths)]
    _check_ids(ids, dataset, image_column, source)
    clean = CaptionCleaner(source)
    captions: dict[Any, list[str]] = {}
    first_rows: dict[Any, int] = {}
    tops = list(dict.fromkeys(name.partition(".")[0] for name in caption_columns))
    for row, (image_id, texts) in enumerate(zip(ids, dataset.select_columns(tops))):
        first_rows.setdefault(image_id, row)  # with one caption per row, the rows of an image become one
        found = [caption for name in caption_columns for caption in clean(_get(texts, name), image_id)]
        captions.setdefault(image_id, []).extend(found)
    clean.report()
    if len(first_rows) < len(ids):
        logger.info(f"{source}: {len(ids)} rows belong to {len(first_rows)} images.")
    kept = [image_id for image_id, texts in captions.items() if texts]
    if without := len(captions) - len(kept):
        logger.warning(f"{source}: {without} images without a caption were left out.")
    kept_rows = _rows_with_image([first_rows[image_id] for image_id in kept], paths, missing, source)
    features = caption_features(int_ids=all(isinstance(image_id, int) for image_id in ids))
    columns = {
        "captions": [captions[image_id] if first_rows[image_id] == row else [] for row, image_id in enumerate(ids)],
        "image_id": ids if features["image_id"].dtype == "int64" else list(map(str, ids)),
        "split": [split] * len(ids),
    }
    dataset = dataset.select_columns([image_column])
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    for name, column in columns.items():
        dataset = dataset.add_column(name, column, feature=features[name])
    # Select last: adding columns to a selection would copy the images.
    return dataset if kept_rows == list(range(len(ids))) else dataset.select(kept_rows)


def _check_ids(ids: list, dataset: Dataset, image_column: str, source: str):
    """Refuse rows without an id, and different images with the same, since rows with the same id become one."""
    if None in ids:
        raise ValueError(f"Row {ids.index(None)} of {source} has no id.")
    if len(set(ids)) == len(ids):
        return
    first_rows: dict[Any, int] = {}
    images = list(zip(image_paths(dataset, image_column), _byte_counts(dataset, image_column)))
    for row, image_id in enumerate(ids):
        first = first_rows.setdefault(image_id, row)
        if images[first] != images[row]:
            raise ValueError(
                f"The images in rows {first} and {row} of {source} differ, but have the same id {image_id!r:.80}: "
                "each image needs its own."
            )


def _byte_counts(dataset: Dataset, column: str) -> list[int | None]:
    """Return the number of bytes of each image that the data set itself holds."""
    import pyarrow.compute as pc

    tables = dataset.select_columns([column]).with_format("arrow").iter(10_000)
    return [
        count for table in tables for count in pc.binary_length(pc.struct_field(table[column], "bytes")).to_pylist()
    ]


def _default_id(split: str, row: int, path: str | None, root) -> str:
    if root is not None and path is not None:
        return os.path.relpath(path, root)
    return f"{split}-{row}"


def _rows_with_image(rows: list[int], paths: list[str | None], missing: str, source: str) -> list[int]:
    absent = {row for row in rows if paths[row] is not None and not _exists(paths[row])}
    if not absent:
        return rows
    names = [str(paths[row]) for row in sorted(absent)[:3]]
    message = f"{len(absent)} of the {len(rows)} images that {source} lists do not exist: {', '.join(names)}"
    message += ", ..." if len(absent) > 3 else ""
    if missing == "error" or len(absent) == len(rows):
        raise FileNotFoundError(f"{message}. To go on with those present, pass `missing='skip'` (--missing skip).")
    logger.warning(f"{message}. They were left out.")
    return [row for row in rows if row not in absent]


def _exists(path: str) -> bool:
    return "://" in path or os.path.isfile(path)


def _streamed(
    dataset: IterableDataset, split: str, source: str, image_column, caption_column, id_column
) -> IterableDataset:
    from datasets import Image

    first_column, caption_columns = _find_columns(dataset, source, image_column, caption_column, id_column)
    id_column = id_column or ("__key__" if "__key__" in dataset.column_names else None)
    image_columns = _image_columns(dataset)
    for name in image_columns:
        dataset = dataset.cast_column(name, Image(decode=False))
    # Shards may hold images with several extensions, each in its own column.
    image_columns = image_columns if image_column is None and "__key__" in dataset.column_names else [first_column]

    left_out = LeftOut(source)

    def convert(row: dict, number: int) -> dict:
        image_id = str(_get(row, id_column)) if id_column else f"{split}-{number}"
        where = f"image {image_id} of {source}"
        captions = []
        for name in caption_columns:
            texts = _get(row, name)
            captions += [clean_caption(text, where) for text in ([texts] if isinstance(texts, str) else texts or [])]
        captions = [caption for caption in captions if caption is not None]
        if not captions:
            left_out(f"the image {image_id}", "it has no caption")
        # None if there is none: it is counted where images are read.
        image = next((row[name] for name in image_columns if row[name] is not None), None)
        return {"image": image, "captions": captions, "image_id": image_id, "split": split}

    # Cast last: `map` with features would leave images as bytes.
    dataset = dataset.map(convert, with_indices=True, remove_columns=dataset.column_names)
    return dataset.filter(bool, input_columns="captions").cast(caption_features(int_ids=False))


def _image_columns(dataset) -> list[str]:
    return [name for name, feature in dataset.features.items() if _kind(feature) == "Image"]


def _one_image_column(shards: Dataset, image_column: str | None) -> Dataset:
    """Join the image columns of shards, one for each extension, into the first of them."""
    import pyarrow.compute as pc

    columns = _image_columns(shards)
    if image_column is not None or len(columns) < 2:
        return shards
    first = columns[0]
    joined = shards.with_format("arrow").map(
        lambda table: table.set_column(
            table.column_names.index(first), first, pc.coalesce(*(table[name] for name in columns))
        ),
        batched=True,
        batch_size=100,
        remove_columns=columns[1:],
    )
    return joined.with_format(None)


def _column(dataset: Dataset, name: str) -> list:
    return [_get(row, name) for row in dataset.select_columns([name.partition(".")[0]])]


def _get(row: dict, name: str) -> Any:
    """Return a column, or with dots a field inside one: `"json.caption"`."""
    found: Any = row
    for part in name.split("."):
        found = None if found is None else found.get(part)
    return found


def _find_columns(dataset, source: str, image_column, caption_column, id_column) -> tuple[str, list[str]]:
    if dataset.features is None:
        dataset = dataset._resolve_features()
    features = dataset.features
    exists = "the columns are " + ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    if image_column is None:
        image_column = next((name for name, feature in features.items() if _kind(feature) == "Image"), "image")
    if isinstance(caption_column, str):
        caption_column = [caption_column]
    elif caption_column is None:
        known = [name for name in CAPTION_COLUMNS if _feature(features, name) is not None]
        if not known:
            raise ValueError(f"{source} has no column known for captions; {exists}. Pass `caption_column=`.")
        caption_column = known[:1]
    for name in (image_column, *caption_column, *filter(None, [id_column])):
        if _feature(features, name) is None:
            raise ValueError(f"{source} has no column {name!r}; {exists}.")
    if _kind(features[image_column]) not in ("Image", "string"):
        raise ValueError(f"The column {image_column!r} of {source} does not hold images; {exists}.")
    if id_column is not None and id_column != image_column and not _holds_ids(_feature(features, id_column)):
        raise ValueError(f"The column {id_column!r} of {source} holds neither text nor whole numbers; {exists}.")
    for name in caption_column:
        if _kind(_feature(features, name)) not in ("string", "list of string"):
            raise ValueError(f"The column {name!r} of {source} does not hold captions; {exists}.")
    return image_column, list(caption_column)


def _holds_ids(feature) -> bool:
    return _kind(feature) == "string" or _kind(feature).removeprefix("u").startswith("int")


def _feature(features, name: str):
    for part in name.split("."):
        features = features.get(part) if isinstance(features, dict) else None
    return features


def _kind(feature) -> str:
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return f"list of {_kind(inner)}"
    dtype = getattr(feature, "dtype", None)
    if feature.__class__.__name__ == "Value":
        return "string" if dtype in ("string", "large_string") else str(dtype)
    return getattr(feature, "_type", "struct")
