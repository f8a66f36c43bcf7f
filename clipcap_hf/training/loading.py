"""Load the data of a run in a common form: `captions` (a list of strings) with `image` or `clip_embeds`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, List, Value

from ..data import READERS, load_captions, load_embeddings, load_emoji, to_caption_form, warn_of_overlap
from ..data.raster_image import RasterImage
from ..data.readable import LeftOut, readable_stream
from ..data.saved import is_saved, load_saved
from ..data.schema import CaptionCleaner, image_paths
from ..files import listed
from ..model.configuration_clipcap import IMAGE_TOKEN
from .arguments import DataArguments
from .rows import as_list, evenly_spread


logger = logging.getLogger(__name__)

FEW_IMAGES = 20  # with fewer, a tenth would be a single image


def load_data(data_args: DataArguments, seed: int = 0):
    """Load the data to train on and the data to evaluate on (None without evaluation).

    Both have the column `captions`, and `image`, `clip_embeds` or both; other columns are kept unchanged.
    """
    if data_args.data is None:
        raise ValueError("Pass `data`: an annotation file, a folder, a Hub data set or emoji.")
    train = _load_split(data_args, data_args.data, data_args.train_split, data_args.streaming, "training")
    train = evenly_spread(_one_form(train, data_args, "training"), data_args.max_train_samples)
    train, evaluation = _with_evaluation(train, data_args, seed)
    if evaluation is not None and hasattr(train, "select"):
        warn_of_overlap({"training": train, "evaluation": evaluation})
    _warn_of_one_caption(train)
    return train, evaluation


def _with_evaluation(train, data_args: DataArguments, seed: int):
    if data_args.eval_split == "none":
        return train, None
    if data_args.eval_data is not None:
        evaluation = _load_split(data_args, data_args.eval_data, data_args.eval_split, False, "evaluation")
    else:
        try:
            evaluation = _load_split(
                data_args, data_args.data, data_args.eval_split, data_args.streaming, "evaluation"
            )
        except (ValueError, KeyError):
            if data_args.eval_split != DataArguments.eval_split:
                raise
            return hold_out(train, data_args.validation_share, seed)
    evaluation = _one_form(evaluation, data_args, "evaluation")
    if not hasattr(evaluation, "select"):
        if data_args.max_eval_samples is None:
            raise ValueError(
                "The evaluation set is streamed: pass `max_eval_samples` (its first rows are kept in memory), "
                "`eval_data`, or `eval_split none`."
            )
        evaluation = Dataset.from_list(list(evaluation.take(data_args.max_eval_samples)))
    return train, evenly_spread(evaluation, data_args.max_eval_samples)


def hold_out(data, share: float, seed: int):
    """Hold out a share of the images, each with all its captions, and log it.

    Returns:
        The rows to train on, and the held-out rows or None.
    """
    if not share or not hasattr(data, "select"):
        logger.warning(
            "No images are held out for evaluation, so the quality of captions for new images will be unknown."
        )
        return data, None
    images = _image_of_rows(data)
    count = int(images.max()) + 1
    if count < FEW_IMAGES:
        logger.warning(
            f"Only {count} images: none is held out for evaluation, so the quality of captions for new images will be "
            f"unknown. With {FEW_IMAGES} images or more, a tenth is held out."
        )
        return data, None
    chosen = np.random.default_rng(seed).permutation(count)[: max(2, round(share * count))]
    held_out = np.isin(images, chosen)
    logger.info(f"{len(chosen)} of the {count} images are held out for evaluation (`validation_share` {share:g}).")
    return data.select(np.flatnonzero(~held_out)), data.select(np.flatnonzero(held_out))


def _image_of_rows(data) -> np.ndarray:
    """Return the image number of each row: rows with the same id, path or embedding are one image."""
    names = data.column_names
    if "image_id" in names:
        keys = list(data["image_id"])
    elif "image_path" in names:
        keys = list(data["image_path"])
    elif "image" in names:
        keys = [row if path is None else path for row, path in enumerate(image_paths(data))]
    elif "clip_embeds" in names:
        keys = [np.asarray(embeds, dtype=np.float32).tobytes() for embeds in data["clip_embeds"]]
    else:
        keys = list(range(len(data)))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


# -- reading a split


def _load_split(data_args: DataArguments, source: str, split: str, streaming: bool, what: str):
    kind = _guess_format(source) if data_args.data_format == "auto" else data_args.data_format
    if kind == "emoji":
        return _named(load_emoji(split), data_args, what)
    if kind == "saved":
        return _named(_load_saved(source, split), data_args, what)
    if kind not in READERS:
        raise ValueError(f"`data_format` must be one of auto, emoji, saved, {', '.join(READERS)}, but is {kind!r}.")
    kwargs: dict[str, Any] = {} if data_args.id_column is None else {"id_column": data_args.id_column}
    if kind in ("imagefolder", "webdataset", "hub"):
        for name in ("image_column", "caption_column"):
            if (column := getattr(data_args, name)) != getattr(DataArguments, name):
                kwargs[name] = column.split(",") if name == "caption_column" else column
        if streaming:
            kwargs["streaming"] = True
    elif streaming:
        raise ValueError(f"`streaming` works with imagefolder, webdataset and hub; {kind} is a single file.")
    try:
        return load_captions(kind, source, images=data_args.images, split=split, missing=data_args.missing, **kwargs)
    except OSError as error:
        if kind != "hub" or Path(source).exists():
            raise
        raise OSError(
            f"{_argument(what)}: there is no file or folder {source} here, nor on the Hub ({error})."
        ) from error


def _guess_format(source: str) -> str:
    if source == "emoji":
        return "emoji"
    folder = Path(source)
    if is_saved(folder):
        return "saved"
    if folder.is_dir():
        return "webdataset" if list(folder.glob("*.tar")) else "imagefolder"
    if folder.is_file():
        raise ValueError(f"Pass `data_format`, the format of the file {source} (karpathy, coco, ...).")
    return "hub"


def _load_saved(source: str, split: str):
    data = load_saved(source)
    splits = data if isinstance(data, DatasetDict) else {"train": data}
    if any("clip_embeds" in rows.column_names for rows in splits.values()):
        data = load_embeddings(source)
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"{source} has no split {split!r}; it has {', '.join(data)}.")
        return data[split]
    if "split" in data.column_names and (names := set(data["split"])) != {split}:
        rows = np.flatnonzero(np.asarray(data["split"]) == split)
        if not len(rows):
            raise ValueError(f"{source} has no rows of the split {split!r}; it has {', '.join(sorted(names))}.")
        return data.select(rows)
    if split not in (DataArguments.train_split, str(data.split)):
        raise ValueError(f"{source} has no splits.")
    return data


# -- the common form


def _one_form(data, data_args: DataArguments, what: str):
    """Use our column names, make captions clean lists, and leave out rows without a caption."""
    argument = _argument(what)
    if not hasattr(data, "select"):
        return readable_stream(data, what).map(_CleanRow(argument)).filter(bool, input_columns="captions")
    if not len(data):
        raise ValueError(f"{argument} has no rows.")
    if "image" in data.column_names and getattr(data.features["image"], "dtype", None) in ("string", "large_string"):
        data = data.cast_column("image", RasterImage())
    return _clean(data, argument, data_args.caption_column)


def _argument(what: str) -> str:
    return f"The {what} data (`{'data' if what == 'training' else 'eval_data'}`)"


def _named(data, data_args: DataArguments, what: str):
    """Rename the columns that the user named to ours; readers do this themselves."""
    argument, text_only = _argument(what), data_args.text_only and what == "training"
    chosen = {"captions": "caption_column", "image": "image_column", "clip_embeds": "embeds_column"}
    theirs = {ours: getattr(data_args, option) for ours, option in chosen.items()}
    names = data.column_names
    has = f"it has {', '.join(names)}"
    if theirs["captions"] not in names:
        raise ValueError(f"{argument} has no column {theirs['captions']!r}; {has}. Pass `caption_column`.")
    if not text_only and theirs["image"] not in names and theirs["clip_embeds"] not in names:
        raise ValueError(
            f"{argument} has neither a column {theirs['image']!r} nor {theirs['clip_embeds']!r}; {has}. Pass "
            "`image_column` or `embeds_column`."
        )
    # Columns with one of our names that the user did not choose.
    if replaced := [ours for ours, name in theirs.items() if name != ours and ours in names]:
        data = data.remove_columns(replaced)
    return to_caption_form(data, **theirs)


class _CleanRow:
    """Clean the captions of a stream's row; a row without a usable one is named and counted."""

    def __init__(self, source: str):
        self.clean = CaptionCleaner(source)
        self.left_out = LeftOut(source)

    def __call__(self, row: dict) -> dict:
        captions = self.clean(row["captions"], row.get("image_id"))
        kept = [text for text in captions if IMAGE_TOKEN not in text]
        if not kept:
            reason = f"its captions hold {IMAGE_TOKEN}, which is reserved" if captions else "it has no caption"
            self.left_out(f"the image {row.get('image_id', 'of a row')}", reason)
        return {"captions": kept}


def _clean(data, argument: str, column: str):
    clean = CaptionCleaner(argument)
    found = data["captions"][:]
    captions, reserved = [], []
    for row, texts in enumerate(found):
        kept = clean(texts, f"in row {row}")
        reserved += [row for text in kept if IMAGE_TOKEN in text]
        captions.append([text for text in kept if IMAGE_TOKEN not in text])
    clean.report()
    if reserved:
        logger.warning(
            f"{argument}: {len(reserved)} captions hold {IMAGE_TOKEN}, which is reserved, and were left out: row "
            f"{listed(reserved, 3)}."
        )
    kept_rows = [row for row, texts in enumerate(captions) if texts]
    if not kept_rows:
        raise ValueError(f"{argument} has no captions in the column {column!r}: pass `caption_column`, or other data.")
    if without := [row for row, texts in enumerate(captions) if not texts]:
        logger.warning(f"{argument}: {len(without)} rows without a caption were left out, first row {without[0]}.")
    if any(captions[row] != found[row] for row in kept_rows):
        data = data.remove_columns("captions").add_column("captions", captions, feature=List(Value("string")))
    return data if len(kept_rows) == len(data) else data.select(kept_rows)


def _warn_of_one_caption(train):
    if hasattr(train, "select") and len(train) > 1:
        captions = {text for texts in train["captions"] for text in as_list(texts)}
        if len(captions) == 1:
            logger.warning(
                f"All captions of the training data are the same, {next(iter(captions))[:80]!r}: the captioner can "
                "learn only this one caption."
            )


def cut_to_context(data, tokenizer, room: int | None, max_caption_length: int | None, what: str) -> int | None:
    """Return the number of tokens to cut captions to, and warn of captions that do not fit into the context.

    Args:
        data: Rows with `captions`, or a stream, whose captions are cut without a warning.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The language model's tokenizer.
        room (`int`, *optional*): Tokens that fit into the context after the prompt, including the end token.
        max_caption_length (`int`, *optional*): The length that the user chose.
        what (`str`): Name of the data in the warning.
    """
    if room is None or (max_caption_length is not None and max_caption_length <= room):
        return max_caption_length
    if hasattr(data, "select"):
        # A token is at least one byte long, so only long texts need to be tokenised.
        long = [
            row
            for row, texts in enumerate(data["captions"])
            for text in as_list(texts)
            if len(text.encode()) >= room and len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= room
        ]
        if long:
            logger.warning(
                f"{len(long)} captions of the {what} data are longer than the {room} tokens that fit into the "
                f"language model's context and are cut: row {listed(long, 3)}."
            )
    return room


def references_of(captions: Sequence) -> list[list[str]]:
    """Return the captions of each image as a list."""
    return [as_list(texts) for texts in captions]
