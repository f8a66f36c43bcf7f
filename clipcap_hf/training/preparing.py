"""Turn loaded data into the rows of a run: check it against the captioner, embed it, expand the captions."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..clip import load_text_tower
from ..data import check_embeddings
from ..data.embeddings import embeds_as_tensors
from ..data.readable import drop_unreadable, row_name, undecoded
from ..model.configuration_clipcap import context_length
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from .arguments import CaptioningArguments, DataArguments, ModelArguments
from .baselines import read_pooled
from .embed_once import embed_once, pays_to_embed, reads_all_images
from .endings import warn_of_endings
from .loading import cut_to_context
from .packing import can_pack
from .recipe import fit_recipe
from .rows import as_list, one_row_per_caption
from .text_only import CAPDEC_NOISE, text_only_rows


logger = logging.getLogger(__name__)


@dataclass
class RunData:
    """
    The rows of a run and their settings.

    Args:
        train: Rows to train on, one per image or per caption; or a stream.
        evaluation: Rows to evaluate on, one per image, or None.
        train_captions (`list[list[str]]`): Captions of the training images; empty for a stream.
        train_embeds (`Callable`, *optional*): Returns the embeddings (training images, ...), if they exist.
        max_caption_length (`int`, *optional*): Tokens that captions are cut to.
        embeds_noise (`float`): Noise on the embeddings.
        name (`Callable`, *optional*): Returns the name of a training row for messages.
    """

    train: Any
    evaluation: Any
    train_captions: list[list[str]]
    train_embeds: Callable[[], torch.Tensor] | None
    max_caption_length: int | None
    embeds_noise: float
    name: Callable[[int], str] | None = None


def prepare(
    train,
    evaluation,
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: CaptioningArguments,
) -> RunData:
    """Check the data against the captioner, complete the recipe, and make the rows of the run."""
    embeds_noise = _noise(data_args, model)
    _check_fit(train, evaluation, model, data_args)
    _check_stream(train, data_args, args)
    if evaluation is None:
        _without_evaluation(args)
    room = _room(model, processor)
    tokenizer = processor.tokenizer
    for data, what in ((evaluation, "evaluation"), (train, "training")):
        length = None if data is None else cut_to_context(data, tokenizer, room, data_args.max_caption_length, what)
    if data_args.references == "together":
        _check_together(train, model, data_args, args)
    new = model_args.text is not None
    fit_recipe(args, model, _captions_per_epoch(train, data_args, args), new)
    if data_args.references == "together":
        _count_images(train, args)
    if data_args.text_only:
        train = _text_only(train, model, data_args, args)
    if pays_to_embed(train, model, data_args, args):
        train = embed_once(train, "train", model, processor, args)
        evaluation = embed_once(evaluation, "eval", model, processor, args)
    else:
        evaluation = _without_unreadable(evaluation, "evaluation")
        if reads_all_images(train, data_args, args):
            train = _without_unreadable(train, "training")
    _say_how_much(train)
    train, evaluation = _fast_to_read(train), _fast_to_read(evaluation)
    data = RunData(train, evaluation, [], None, length, embeds_noise)
    if hasattr(train, "select"):
        data.train_captions = [as_list(texts) for texts in train["captions"]]
        warn_of_endings(data.train_captions, tokenizer, model.generation_config.eos_token_id, data_args.append_eos)
        if "clip_embeds" in train.column_names and not data_args.text_only:
            data.train_embeds = lambda: read_pooled(train)
    data.train = _rows(train, data_args, args)
    if hasattr(train, "select") and data.train is not train:
        name, image_of = row_name(train), getattr(data.train, "image_of", range(len(train)))
        data.name = lambda row: name(int(image_of[row]))
    elif hasattr(train, "select"):
        data.name = row_name(train)
    return data


def _without_unreadable(data, what: str):
    if data is None or "clip_embeds" in data.column_names:
        return data
    return drop_unreadable(data, what)


def _say_how_much(train):
    if hasattr(train, "select"):
        captions = sum(len(as_list(texts)) for texts in train["captions"])
        logger.info(f"Training data: {len(train)} images with {captions} captions.")
    else:
        logger.info("Training data: a stream.")


def _check_fit(train, evaluation, model, data_args: DataArguments):
    for data, what, argument in ((train, "training", "data"), (evaluation, "evaluation", "eval_data")):
        if data is None or data.column_names is None or (what == "training" and data_args.text_only):
            continue
        where = f"The {what} data (`{argument}`)"
        if "clip_embeds" not in data.column_names and model.vision_tower is None:
            raise ValueError(
                f"{where} has images and no column {data_args.embeds_column!r}, but the captioner has no vision "
                "tower: pass `vision`, or embed the images first."
            )
        if "clip_embeds" in data.column_names and hasattr(data, "select"):
            try:
                check_embeddings(data, model)
            except ValueError as error:
                raise ValueError(f"{where} does not fit the captioner. {error}") from error


def _check_stream(train, data_args: DataArguments, args: CaptioningArguments):
    if hasattr(train, "select"):
        return
    if args.max_steps <= 0:
        raise ValueError("The training set is streamed and has no length: pass `max_steps`.")
    if args.objective == "scst" or data_args.text_only or data_args.embed_once:
        raise ValueError("`objective scst`, `text_only` and `embed_once` read all captions: leave out `streaming`.")


def _without_evaluation(args: CaptioningArguments):
    args.eval_strategy, args.load_best_model_at_end = type(args.eval_strategy)("no"), False
    if args.early_stopping_patience is not None:
        raise ValueError("`early_stopping_patience` needs an evaluation set: pass `eval_data` or `eval_split`.")


def _room(model, processor: ClipCapProcessor) -> int | None:
    """Return how many tokens of caption, end token included, fit into the context; None without a limit."""
    context = context_length(model.config.text_config)
    if context is None:
        return None
    return context - len(processor.tokenize_prompts(None, 1)["input_ids"][0])


def _captions_per_epoch(train, data_args: DataArguments, args: CaptioningArguments) -> int | None:
    if not hasattr(train, "select"):
        return None
    if data_args.references in ("all", "together") and args.objective == "cross_entropy":
        return sum(len(as_list(texts)) for texts in train["captions"])
    return len(train)


def _check_together(train, model, data_args: DataArguments, args: CaptioningArguments):
    if not hasattr(train, "select") or data_args.text_only or args.objective == "scst":
        raise ValueError("`references together` is for cross entropy on images, not streamed: leave it out.")
    if not can_pack(model):
        data_args.references = "all"
        logger.warning(
            f"The language model, a `{model.config.text_config.model_type}`, takes no 4-dimensional attention masks, "
            "so each caption gets a row of its own (`references all`)."
        )


def _count_images(train, args: CaptioningArguments):
    """Reduce the batch size, since each row holds all captions of an image, to keep the captions per batch."""
    per_image = sum(len(as_list(texts)) for texts in train["captions"]) / len(train)
    args.per_device_train_batch_size = max(1, round(args.per_device_train_batch_size / per_image))
    logger.info(f"Batches hold {args.per_device_train_batch_size} images with all their captions.")


def _text_only(train, model, data_args: DataArguments, args: CaptioningArguments):
    embed = load_text_tower(data_args.text_tower, args.device)
    captions = [as_list(texts) for texts in train["captions"]]
    if data_args.references == "first":
        captions = [texts[:1] for texts in captions]
    rows = text_only_rows(captions, embed, progress=not args.disable_tqdm)
    if (width := len(rows[0]["clip_embeds"])) != model.config.clip_embed_dim:
        raise ValueError(
            f"The text tower {data_args.text_tower} gives embeddings of width {width}, but the captioner takes "
            f"{model.config.clip_embed_dim}: it must belong to the captioner's vision tower."
        )
    return rows


def _noise(data_args: DataArguments, model) -> float:
    if data_args.text_only and not model.config.normalize_clip_embeds:
        raise ValueError("`text_only` needs a captioner with `normalize_clip_embeds`.")
    if data_args.embeds_noise is None:
        return CAPDEC_NOISE if data_args.text_only else 0.0
    if data_args.embeds_noise and not model.config.normalize_clip_embeds:
        raise ValueError("`embeds_noise` needs a captioner with `normalize_clip_embeds`: pass that too.")
    return data_args.embeds_noise


def _fast_to_read(data):
    embedded = hasattr(data, "select") and "clip_embeds" in data.column_names
    return embeds_as_tensors(data) if embedded else data


def _rows(train, data_args: DataArguments, args: CaptioningArguments):
    if {"clip_embeds", "image"} <= set(train.column_names or ()):
        train = train.remove_columns("image")  # not needed, and each row would decode its image
    if hasattr(train, "select") and "image" in train.column_names:
        train = undecoded(train)  # read by `EpochRows`
    if data_args.references == "all" and args.objective == "cross_entropy":
        return one_row_per_caption(train)
    return train
