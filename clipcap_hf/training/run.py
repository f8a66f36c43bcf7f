"""A training run from its arguments to the saved captioner: what `clipcap train` does."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_utils import has_length

from ..assets import EMOJI_MINI
from ..data.schema import CaptionCleaner
from ..extras import install_hint
from ..metrics import score_captions
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from ..pictures import draw_captions, draw_curve
from ..processes import keep_freed_memory, leave_at_exit
from .arguments import CaptioningArguments, DataArguments, ModelArguments
from .checkpoints import check_writable, last_checkpoint
from .embed_once import embed_once, pays_to_embed
from .rows import EpochRows, evenly_spread, one_row_per_caption
from .self_critical import CiderReward
from .trainer import CaptioningCollator, ClipCapTrainer


logger = logging.getLogger(__name__)


def run_training(model_args: ModelArguments, data_args: DataArguments, args: CaptioningArguments) -> dict:
    """Train a captioner and save it with its processor, its scores, a curve of the training and sample captions.

    Args:
        model_args ([`ModelArguments`]): The captioner.
        data_args ([`DataArguments`]): The data.
        args ([`CaptioningArguments`]): The recipe. `output_dir` receives everything.

    Returns:
        `dict`: The last evaluation's scores, and `train_loss`, `train_runtime` and so on of `Trainer`.

    Raises:
        ValueError: If arguments, data and captioner do not fit each other; the message says what to change.
        OSError: If something is not to be found, or `output_dir` cannot take the captioner.
    """
    leave_at_exit()
    if args.device.type == "cpu":
        keep_freed_memory()
    checkpoint = _checkpoint_to_resume(args)
    set_seed(args.seed)
    model, processor = load_captioner(model_args, data_args)
    if args.process_index == 0:
        counts = model.parameter_counts().items()
        logger.info("Trained: " + ", ".join(f"{name} {trained:,} of {total:,}" for name, (trained, total) in counts))
    check_writable(args.output_dir, model)
    train, evaluation = load_data(data_args)
    columns = {name: getattr(data_args, name) for name in ("image_column", "caption_column", "embeds_column")}
    train, evaluation = _shaped(train, evaluation, model, processor, model_args, data_args, args, columns)
    if model_args.warm_start and checkpoint is None:
        _warm_start(model, processor, train, columns, model_args.warm_start, args.seed)

    reward = None
    if args.objective == "scst":
        reward = CiderReward(_references(_column(train, columns["caption_column"])), args.eval_tokenizer)
    collator = CaptioningCollator(
        processor,
        **columns,
        append_eos=data_args.append_eos,
        sample_captions=data_args.references == "random",
        max_caption_length=data_args.max_caption_length,
        embeds_noise=_noise(data_args, model),
        return_references=reward is not None,
    )
    captions_images = evaluation is not None and args.predict_with_generate
    trainer = ClipCapTrainer(
        model=model,
        args=args,
        train_dataset=EpochRows(train, args.data_seed or args.seed) if has_length(train) else train,
        eval_dataset=_without_images(evaluation, columns),
        data_collator=collator,
        processing_class=processor,
        compute_metrics=caption_metrics(processor, _references(evaluation[columns["caption_column"]]), args)
        if captions_images
        else None,
        callbacks=_callbacks(args),
        reward=reward,
    )
    _warn_of_warmup(trainer)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    model.config.use_cache = True  # Trainer switches the cache off in what is saved
    scores = dict(result.metrics)
    if evaluation is not None:
        scores.update(trainer.evaluate())
    _save(trainer, scores)
    if captions_images and args.num_samples:
        _save_samples(trainer, evaluation, columns)
    return scores


def _checkpoint_to_resume(args: CaptioningArguments) -> str | None:
    if args.resume_from_checkpoint and args.resume_from_checkpoint not in (True, "True", "true"):
        if not os.path.isdir(args.resume_from_checkpoint):
            raise ValueError(f"`resume_from_checkpoint`: there is no folder {args.resume_from_checkpoint}.")
        return args.resume_from_checkpoint
    last = last_checkpoint(args.output_dir)
    if args.resume or args.resume_from_checkpoint:
        if last is None:
            logger.warning(f"{args.output_dir} holds no checkpoint to resume from; training starts anew.")
        return last
    if last is not None:
        raise ValueError(
            f"{args.output_dir} already holds {os.path.basename(last)}: pass `resume` to go on from it, or another "
            "`output_dir`."
        )
    return None


# -- the captioner


def load_captioner(
    model_args: ModelArguments, data_args: DataArguments
) -> tuple[ClipCapForConditionalGeneration, ClipCapProcessor]:
    """The captioner and the processor that the arguments ask for; a new one has the paper's sizes where they are silent."""
    if model_args.model is not None:
        if model_args.text or model_args.vision:
            raise ValueError("Pass either `model`, to go on from, or `vision` and `text`, for a new captioner.")
        name = EMOJI_MINI if model_args.model == "emoji-mini" else model_args.model
        model = ClipCapForConditionalGeneration.from_pretrained(name)
        if model_args.freeze_language_model is not None:
            model.config.freeze_language_model = model_args.freeze_language_model
            model.language_model.requires_grad_(True)
            model._freeze()
        return model, ClipCapProcessor.from_pretrained(name)
    if model_args.text is None:
        raise ValueError("Pass `model`, a captioner to train further, or `text` (and `vision`) for a new one.")

    paper_light = model_args.mapping_type == "transformer"
    prefix_length = model_args.prefix_length or (40 if paper_light else 10)
    freeze = paper_light if model_args.freeze_language_model is None else model_args.freeze_language_model
    normalize = model_args.normalize_clip_embeds
    overrides = model_args.config_overrides or {}
    config = {
        "vision_feature": model_args.vision_feature,
        "mapping_type": model_args.mapping_type,
        "prefix_length": prefix_length,
        "clip_length": model_args.clip_length,
        "clip_embed_dim": model_args.clip_embed_dim,
        "normalize_clip_embeds": data_args.text_only if normalize is None else normalize,
        "freeze_language_model": freeze,
        "freeze_vision": model_args.freeze_vision,
        "lora": None if model_args.lora_r is None else {"r": model_args.lora_r},
        "save_frozen": model_args.save_frozen,
        **(json.loads(overrides) if isinstance(overrides, str) else overrides),
    }
    vision, image_processor = _vision_of_captioner(model_args.vision)
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(vision, model_args.text, **config)
    vision_name = vision if isinstance(vision, str) else None
    processor = ClipCapProcessor.from_vision_text_pretrained(vision_name, model_args.text, prefix_length)
    if image_processor is not None:
        processor.image_processor = image_processor
    return model, processor


def _vision_of_captioner(name: str | None):
    """The tower and image processor of a captioner; the name itself if it is no captioner."""
    from transformers import AutoConfig

    name = EMOJI_MINI if name == "emoji-mini" else name
    if name is None or not (Path(name) / "config.json").is_file():
        return name, None
    if AutoConfig.from_pretrained(name).model_type != "clipcap":
        return name, None
    vision_tower = ClipCapForConditionalGeneration.from_pretrained(name).vision_tower
    if vision_tower is None:
        raise ValueError(f"`vision`: the captioner {name} works on embeddings alone and has no tower.")
    return vision_tower, ClipCapProcessor.from_pretrained(name).image_processor


# -- the data


def load_data(data_args: DataArguments):
    """The data to train on and to evaluate on (None where there is none)."""
    if data_args.data is None:
        raise ValueError("Pass `data`: an annotation file, a folder, a Hub data set or emoji.")
    train = _load_split(data_args, data_args.data, data_args.train_split, data_args.streaming)
    train = evenly_spread(train, data_args.max_train_samples)
    wanted = data_args.eval_split != "none"
    if not wanted:
        return train, None
    if data_args.eval_data is not None:
        evaluation = _load_split(data_args, data_args.eval_data, data_args.eval_split, False)
    else:
        try:
            evaluation = _load_split(data_args, data_args.data, data_args.eval_split, data_args.streaming)
        except (ValueError, KeyError) as error:
            default = DataArguments.eval_split
            if data_args.eval_split != default:
                raise
            logger.warning(f"There is no evaluation: no split {default!r} ({error}).")
            return train, None
    if not hasattr(evaluation, "select"):
        if data_args.max_eval_samples is None:
            raise ValueError(
                "The evaluation set is streamed: pass `max_eval_samples` (its first rows are kept in memory), "
                "`eval_data`, or `eval_split none`."
            )
        from datasets import Dataset

        evaluation = Dataset.from_list(list(evaluation.take(data_args.max_eval_samples)))
    return train, evenly_spread(evaluation, data_args.max_eval_samples)


def _load_split(data_args: DataArguments, source: str, split: str, streaming: bool):
    from ..data import READERS, load_captions, load_emoji

    kind = data_args.data_format
    if kind == "auto":
        kind = _guess_format(source)
    if kind == "emoji":
        return load_emoji(split)
    if kind == "saved":
        return _load_saved(source, split, data_args.caption_column)
    if kind not in READERS:
        raise ValueError(f"`data_format` must be one of auto, emoji, saved, {', '.join(READERS)}, but is {kind!r}.")
    kwargs = {} if data_args.id_column is None else {"id_column": data_args.id_column}
    if kind in ("imagefolder", "webdataset", "hub"):
        for name in ("image_column", "caption_column"):
            if (column := getattr(data_args, name)) != getattr(DataArguments, name):
                kwargs[name] = column.split(",") if name == "caption_column" else column
        if streaming:
            kwargs["streaming"] = True
    elif streaming:
        raise ValueError(f"`streaming` works with imagefolder, webdataset and hub; {kind} is a single file.")
    data = load_captions(kind, source, images=data_args.images, split=split, missing=data_args.missing, **kwargs)
    # Readers name columns in their own way; from here on all data have the names that the user gave.
    names = {"image": data_args.image_column, "captions": data_args.caption_column}
    return data.rename_columns({old: new for old, new in names.items() if old != new})


def _guess_format(source: str) -> str:
    if source == "emoji":
        return "emoji"
    folder = Path(source)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "saved"
    if folder.is_dir():
        return "webdataset" if list(folder.glob("*.tar")) else "imagefolder"
    if folder.is_file():
        raise ValueError(f"`data_format`: say which format the file {source} has (karpathy, coco, ...).")
    return "hub"


def _load_saved(source: str, split: str, caption_column: str):
    from datasets import DatasetDict, load_from_disk

    from ..data import load_embeddings

    data = load_from_disk(source)
    splits = data if isinstance(data, DatasetDict) else {"train": data}
    if any("clip_embeds" in rows.column_names for rows in splits.values()):
        data = load_embeddings(source)
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"{source} has no split {split!r}; it has {', '.join(data)}.")
        return _captioned(data[split], caption_column, source)
    if "split" in data.column_names and (names := set(data["split"])) != {split}:
        rows = np.flatnonzero(np.asarray(data["split"]) == split)
        if not len(rows):
            raise ValueError(f"{source} has no rows of the split {split!r}; it has {', '.join(sorted(names))}.")
        return _captioned(data, caption_column, source, rows)
    if split not in (DataArguments.train_split, str(data.split)):
        raise ValueError(f"{source} has no splits.")
    return _captioned(data, caption_column, source)


def _captioned(data, column: str, source: str, rows: Sequence[int] | None = None):
    """Those rows of a data set (all by default) that have captions, with their captions cleaned."""
    rows = range(len(data)) if rows is None else rows
    if column not in data.column_names or not len(rows):
        return data.select(rows)
    clean = CaptionCleaner(source)
    found = data[column][:]
    captions = list(found)
    for row in rows:
        texts = clean(found[row], f"in row {row}")
        captions[row] = (texts or [None])[0] if isinstance(found[row], str) else texts
    clean.report()
    kept = [row for row in rows if captions[row]]
    if not kept:
        raise ValueError(f"{source} has no captions in the column {column!r}: pass `caption_column`, or other data.")
    if without := [row for row in rows if not captions[row]]:
        logger.warning(f"{source}: {len(without)} rows without a caption were left out, row {without[0]} the first.")
    if any(captions[row] != found[row] for row in kept):
        # Before the selection, since adding a column to one would copy the images.
        data = data.remove_columns(column).add_column(column, captions, feature=data.features[column])
    return data if len(kept) == len(data) else data.select(kept)


def _shaped(
    train,
    evaluation,
    model,
    processor,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: CaptioningArguments,
    columns: dict,
):
    """Checks the data against the captioner, and makes the rows that are trained on."""
    for data, what in ((train, "training"), (evaluation, "evaluation")):
        if data is not None:
            text_only = what == "training" and data_args.text_only
            _check_columns(data, what, model, columns, text_only, f"`{'data' if what == 'training' else 'eval_data'}`")
    if evaluation is None:
        args.eval_strategy, args.load_best_model_at_end = type(args.eval_strategy)("no"), False
        if args.early_stopping_patience is not None:
            raise ValueError("`early_stopping_patience` needs an evaluation set: pass `eval_data` or `eval_split`.")
    if not hasattr(train, "select"):
        if args.max_steps <= 0:
            raise ValueError("The training set is streamed and has no length: pass `max_steps`.")
        if args.objective == "scst" or data_args.text_only or data_args.embed_once:
            raise ValueError(
                "`objective scst`, `text_only` and `embed_once` read all captions: leave out `streaming`."
            )
    elif data_args.text_only:
        train = _text_only(train, model, data_args, columns, args)
    if pays_to_embed(train, model, model_args, data_args, args):
        train = embed_once(train, "train", model, processor, columns, args)
        evaluation = embed_once(evaluation, "eval", model, processor, columns, args)
    train = _without_images(train, columns)
    if data_args.references == "all" and args.objective == "cross_entropy":
        train = one_row_per_caption(train, columns["caption_column"])
    return train, evaluation


def _check_columns(data, what: str, model, columns: dict, text_only: bool, argument: str):
    from ..data import check_embeddings

    names = data.column_names
    if names is None:  # some streams do not know
        return
    caption, image, embeds = (columns[f"{name}_column"] for name in ("caption", "image", "embeds"))
    has = f"it has {', '.join(names)}"
    if caption not in names:
        raise ValueError(f"The {what} data ({argument}) has no column {caption!r}; {has}. Pass `caption_column`.")
    if hasattr(data, "select") and len(data) and not any(data[caption]):
        raise ValueError(f"The {what} data ({argument}) has no captions: its column {caption!r} is empty.")
    if text_only:
        return
    if embeds in names:
        if hasattr(data, "select"):
            try:
                check_embeddings(data.rename_column(embeds, "clip_embeds") if embeds != "clip_embeds" else data, model)
            except ValueError as error:
                raise ValueError(f"The {what} data ({argument}) does not fit the captioner. {error}") from error
    elif image not in names:
        raise ValueError(
            f"The {what} data ({argument}) has neither a column {image!r} nor {embeds!r}; {has}. Pass `image_column` or "
            "`embeds_column`."
        )
    elif model.vision_tower is None:
        raise ValueError(
            f"The {what} data ({argument}) has images and no column {embeds!r}, but the captioner has no vision tower: "
            "pass `vision`, or embed the images first."
        )
    if hasattr(data, "select") and not len(data):
        raise ValueError(f"The {what} data ({argument}) has no rows.")


def _text_only(train, model, data_args: DataArguments, columns: dict, args: CaptioningArguments):
    from ..clip import load_text_tower
    from .text_only import text_only_rows

    if data_args.text_tower is None:
        raise ValueError("`text_only` needs `text_tower`, the CLIP that the vision tower belongs to.")
    if not model.config.normalize_clip_embeds:
        raise ValueError("`text_only` needs a captioner with `normalize_clip_embeds`.")
    embed = load_text_tower(data_args.text_tower, args.device)
    captions = _references(train[columns["caption_column"]])
    if data_args.references == "first":
        captions = [texts[:1] for texts in captions]
    rows = text_only_rows(captions, embed, progress=not args.disable_tqdm)
    if (width := len(rows[0]["clip_embeds"])) != model.config.clip_embed_dim:
        raise ValueError(
            f"The text tower {data_args.text_tower} gives embeddings of width {width}, but the captioner takes "
            f"{model.config.clip_embed_dim}: it must belong to the captioner's vision tower."
        )
    return rows.rename_columns({"clip_embeds": columns["embeds_column"], "captions": columns["caption_column"]})


def _without_images(data, columns: dict):
    """The data without images that nobody reads, which would be decoded with each row."""
    names = (data is not None and data.column_names) or ()
    if columns["embeds_column"] in names and columns["image_column"] in names:
        return data.remove_columns(columns["image_column"])
    return data


def _warm_start(model, processor, train, columns: dict, steps: int, seed: int):
    from .warm_start import warm_start_mapper

    if columns["embeds_column"] not in (train.column_names or ()):
        raise ValueError("`warm_start` needs embeddings: pass `embed_once`, or data that was embedded.")
    captions = [texts[0] for texts in _references(_column(train, columns["caption_column"]))]
    embeds = torch.from_numpy(np.asarray(train[columns["embeds_column"]], dtype=np.float32))
    losses = warm_start_mapper(model, processor, embeds, captions, steps=steps, seed=seed)
    logger.info(f"Warm start of {steps} steps: loss {losses[0]:.3f} to {losses[-1]:.3f}")


def _noise(data_args: DataArguments, model) -> float:
    from .text_only import CAPDEC_NOISE

    if data_args.embeds_noise is None:
        return CAPDEC_NOISE if data_args.text_only else 0.0
    if data_args.embeds_noise and not model.config.normalize_clip_embeds:
        raise ValueError("`embeds_noise` is for captioners with `normalize_clip_embeds`: pass that, too.")
    return data_args.embeds_noise


def _column(data, name: str) -> list:
    return list(data[name])


def _references(captions: Sequence) -> list[list[str]]:
    return [[texts] if isinstance(texts, str) else list(texts) for texts in captions]


# -- evaluation, and what is saved


def caption_metrics(
    processor: ClipCapProcessor, references: list[list[str]], args: CaptioningArguments
) -> Callable[..., dict[str, float]]:
    """`compute_metrics` for `Trainer`: CIDEr, BLEU-4 and ROUGE-L (times 100, as papers print them), and the mean length."""

    def compute(prediction) -> dict[str, float]:
        captions = decode_captions(processor, prediction.predictions)
        if len(captions) != len(references):
            raise ValueError(f"There are {len(captions)} captions for {len(references)} images.")
        metrics = ("bleu", "rouge_l", "cider")
        scores = score_captions(captions, references, metrics, args.eval_tokenizer, per_image=False)
        lengths = [len(caption.split()) for caption in captions]
        return {
            **{name: round(100 * float(scores[name]), 2) for name in ("cider", "bleu_4", "rouge_l")},
            "words": round(float(np.mean(lengths)), 2),
        }

    return compute


def decode_captions(processor: ClipCapProcessor, predictions: np.ndarray) -> list[str]:
    """The texts of what `Trainer.predict` returns with `predict_with_generate`."""
    predictions = np.where(predictions < 0, processor.tokenizer.pad_token_id, predictions)  # Trainer pads with -100
    return [text.strip() for text in processor.batch_decode(predictions, skip_special_tokens=True)]


def _callbacks(args: CaptioningArguments) -> list:
    return [] if args.early_stopping_patience is None else [EarlyStoppingCallback(args.early_stopping_patience)]


def _warn_of_warmup(trainer: ClipCapTrainer):
    args = trainer.args
    steps = args.max_steps
    if steps <= 0:
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = int(len(trainer.train_dataset) / rows_per_step * args.num_train_epochs)
    if args.warmup_steps >= 1 and args.warmup_steps > steps / 2:
        logger.warning(
            f"The warm-up of {args.warmup_steps:.0f} steps, the paper's for 14,000 steps an epoch, is more than half of the "
            f"{steps} steps of this run, so that the learning rate hardly gets to {args.learning_rate}: pass a smaller "
            "`warmup_steps`, 0.1 for a tenth of them."
        )


def _save(trainer: ClipCapTrainer, scores: dict):
    out = Path(trainer.args.output_dir)
    # Written beside and moved, so that a captioner of an earlier run is never half replaced.
    with tempfile.TemporaryDirectory(dir=out, prefix=".saving-") as folder:
        trainer.save_model(folder, _internal_call=True)
        if trainer.is_world_process_zero():
            for path in sorted(Path(folder).iterdir(), reverse=True):  # the weights before what describes them
                os.replace(path, out / path.name)
    trainer.save_state()
    if trainer.is_world_process_zero():
        _write(out / "scores.json", json.dumps(scores, indent=2))
        if not draw_curve(out / "curve.png", trainer.state.log_history):
            logger.warning(f"curve.png is not drawn without matplotlib: {install_hint('train')}.")


def _save_samples(trainer: ClipCapTrainer, evaluation, columns: dict):
    rows = evenly_spread(evaluation, trainer.args.num_samples)
    compute_metrics, trainer.compute_metrics = trainer.compute_metrics, None
    captions = decode_captions(trainer.processing_class, trainer.predict(rows).predictions)
    trainer.compute_metrics = compute_metrics
    if not trainer.is_world_process_zero():
        return
    out = Path(trainer.args.output_dir)
    references = _references(rows[columns["caption_column"]])
    samples = [{"caption": caption, "references": texts} for caption, texts in zip(captions, references)]
    _write(out / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False))
    if columns["image_column"] in rows.column_names and isinstance(rows[0][columns["image_column"]], Image.Image):
        pictures = [
            {"image": image, "captions": texts} for image, texts in zip(rows[columns["image_column"]], references)
        ]
        draw_captions(out / "samples.png", {"evaluation": pictures}, {"evaluation": captions})


def _write(path: Path, text: str):
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
