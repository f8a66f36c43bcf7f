"""Run training from the arguments to the saved captioner: `clipcap train`."""

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_utils import has_length

from ..extras import install_hint
from ..files import lock_folder, write_text
from ..metrics.tokenization import tokenize
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from ..pictures import draw_curve
from ..processes import keep_freed_memory, leave_at_exit
from . import verdict
from .arguments import CaptioningArguments, DataArguments, ModelArguments
from .baselines import BEFORE, MOST_COMMON, NEAREST, most_common_caption, nearest_images, read_pooled
from .caption_start import set_caption_start
from .captioner import check_names, load_captioner
from .checkpoints import SaveAfterEvaluation, check_writable, checkpoint_to_resume, remove_leftovers, save_whole
from .collator import CaptioningCollator
from .held_out import MOST_BEFORE, CaptionMetrics, HeldOut, look, look_before, score, write_samples
from .loading import load_data
from .packing import can_pack
from .preparing import prepare
from .progress import TableCallback
from .recipe import warn_of_warmup
from .rows import EpochRows, spread_rows
from .self_critical import CiderReward
from .trackers import CaptionsInTrackers
from .trainer import ClipCapTrainer


logger = logging.getLogger(__name__)


def run_training(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: CaptioningArguments,
    find_stop_token: Callable[[PreTrainedTokenizerBase], int] | None = None,
) -> dict:
    """Train a captioner and save it with its processor, scores, a curve, sample captions and a verdict.

    Args:
        model_args ([`ModelArguments`]): The captioner.
        data_args ([`DataArguments`]): The data.
        args ([`CaptioningArguments`]): The recipe. `output_dir` receives everything.
        find_stop_token (`Callable`, *optional*): Finds in a tokenizer the token at which captioning stops. By default
            it is the end token.

    Returns:
        `dict`: The scores of the saved captioner on the held-out images, and `train_loss`, `train_runtime` and so on
        of `Trainer`.

    Raises:
        ValueError: If arguments, data and captioner do not fit each other, or another process writes into
            `output_dir`; the message says what to change.
        OSError: If something cannot be found, or `output_dir` cannot take the captioner.
    """
    leave_at_exit()
    if args.device.type == "cpu":
        keep_freed_memory()
    # A name that `push_to_hub` leaves out.
    with lock_folder(args.output_dir, "_lock") if args.process_index == 0 else nullcontext():
        checkpoint = checkpoint_to_resume(args)
        set_seed(args.seed)
        check_names(model_args, data_args)
        tokenize(["a caption"], args.eval_tokenizer)  # what it needs may be missing: Java, or an extra
        train, evaluation = load_data(data_args, args.seed)
        model, processor = load_captioner(model_args, data_args)
        if find_stop_token is not None:
            model.generation_config.eos_token_id = find_stop_token(processor.tokenizer)
        check_writable(args.output_dir, model)
        if args.process_index == 0:
            remove_leftovers(args.output_dir)
            _say_what_is_trained(model)
        data = prepare(train, evaluation, model, processor, model_args, data_args, args)
        return _run(model, processor, data, checkpoint, model_args, data_args, args)


def _run(
    model,
    processor: ClipCapProcessor,
    data,
    checkpoint: str | None,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: CaptioningArguments,
) -> dict:
    """Train and save, as the only run that writes the output folder."""
    if model_args.warm_start and checkpoint is None:
        _warm_start(model, processor, data.train, model_args.warm_start, args.seed)

    trainer = _trainer(model, processor, data, data_args, args)
    before = look_before(trainer) if data.evaluation is not None else HeldOut([], {})
    # After the captions before training, which are shown as the captioner wrote them.
    set_caption_start(trainer, data.train_captions, data_args.caption_start, existing=model_args.text is None)
    if before.captions:
        trainer.add_callback(CaptionsInTrackers(trainer, data.evaluation, before.captions))
    set_seed(args.seed)  # so that training does not depend on earlier random draws
    result = trainer.train(resume_from_checkpoint=checkpoint)
    model.config.use_cache = True  # Trainer switches the cache off in the saved configuration
    after = look(trainer) if data.evaluation is not None else HeldOut([], {})
    if after.metrics and not any("eval_loss" in entry for entry in trainer.state.log_history):
        trainer.log(after.metrics)  # `eval_strategy no`: the only evaluation of the run
    scores = {**result.metrics, **after.metrics}
    files = _save(trainer, scores, data.evaluation, after.captions)
    if trainer.is_world_process_zero():
        logger.info(verdict.report(_ending(trainer, data, before, after), files, args.output_dir))
    return scores


def _say_what_is_trained(model: ClipCapForConditionalGeneration):
    counts = model.parameter_counts().items()
    logger.info("Trained: " + ", ".join(f"{name} {trained:,} of {total:,}" for name, (trained, total) in counts))


def _warm_start(model, processor: ClipCapProcessor, train, steps: int, seed: int):
    from .warm_start import warm_start_mapper

    if "clip_embeds" not in (train.column_names or ()):
        raise ValueError("`warm_start` needs embeddings: pass `embed_once`, or data that was embedded.")
    captions = [texts if isinstance(texts, str) else texts[0] for texts in train["captions"]]
    embeds = torch.stack(list(train["clip_embeds"]))
    losses = warm_start_mapper(model, processor, embeds, captions, steps=steps, seed=seed)
    logger.info(f"Warm start of {steps} steps: loss {losses[0]:.3f} to {losses[-1]:.3f}")


def _may_pack(train, args: CaptioningArguments) -> bool:
    # The batches of streams, and of several GPUs of one process, are cut by rows, of which a packed batch has fewer.
    return args.objective == "cross_entropy" and has_length(train) and args.n_gpu <= 1 and not args.torch_compile


def _trainer(model, processor: ClipCapProcessor, data, data_args: DataArguments, args: CaptioningArguments):
    """Build the trainer: rows, collator, metrics, callbacks."""
    reward = CiderReward(data.train_captions, args.eval_tokenizer) if args.objective == "scst" else None
    collator = CaptioningCollator(
        processor,
        append_eos=data_args.append_eos,
        sample_captions=data_args.references == "random",
        max_caption_length=data.max_caption_length,
        embeds_noise=data.embeds_noise,
        return_references=reward is not None,
        captions_together=data_args.references == "together",
        packed=_may_pack(data.train, args) and can_pack(model),
    )
    captions_images = data.evaluation is not None and args.predict_with_generate
    trainer = ClipCapTrainer(
        model=model,
        args=args,
        train_dataset=EpochRows(data.train, args.data_seed or args.seed, data.name)
        if has_length(data.train)
        else data.train,
        eval_dataset=_without_images(data.evaluation),
        data_collator=collator,
        processing_class=processor,
        compute_metrics=CaptionMetrics(processor, list(data.evaluation["captions"]), args.eval_tokenizer)
        if captions_images
        else None,
        callbacks=_callbacks(args),
        reward=reward,
    )
    if not args.verbose:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(TableCallback(bar=not args.disable_tqdm))
    warn_of_warmup(args, len(data.train) if args.max_steps <= 0 else 0)
    return trainer


def _without_images(data):
    """Drop images if there are embeddings: each row would decode its image in vain."""
    if data is not None and {"clip_embeds", "image"} <= set(data.column_names):
        return data.remove_columns("image")
    return data


def _callbacks(args: CaptioningArguments) -> list:
    stopping = [] if args.early_stopping_patience is None else [EarlyStoppingCallback(args.early_stopping_patience)]
    return [SaveAfterEvaluation(), *stopping]


# -- saving and the report at the end


def _save(trainer: ClipCapTrainer, scores: dict, evaluation, captions: list[str]) -> list[str]:
    """Save the captioner, scores, curve and samples; return the names of the files that a user may want to open."""
    out = Path(trainer.args.output_dir)
    save_whole(trainer, out)
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return []
    write_text(out / "scores.json", json.dumps(scores, indent=2))
    files = ["scores.json"]
    if draw_curve(out / "curve.png", trainer.state.log_history):
        files.append("curve.png")
    else:
        logger.warning(f"curve.png is not drawn without matplotlib: {install_hint('train')}.")
    return files + write_samples(trainer.args, evaluation, captions)


def _ending(trainer: ClipCapTrainer, data, before: HeldOut, after: HeldOut) -> verdict.Ending:
    args, state = trainer.args, trainer.state
    evaluations = [
        verdict.Evaluation(
            round(entry["epoch"], 2),
            entry["step"],
            {name.removeprefix("eval_"): value for name, value in entry.items()},
        )
        for entry in state.log_history
        if "eval_loss" in entry
    ]
    restored = args.load_best_model_at_end and state.best_global_step
    ending = verdict.Ending(
        evaluations=evaluations,
        saved_step=state.best_global_step if restored else state.global_step,
        metric=str(args.metric_for_best_model).removeprefix("eval_") if restored else "last",
        before=before.captions,
        after=after.captions,
        loss_before=before.metrics.get("eval_loss"),
    )
    if after.captions:
        _add_baselines(ending, data, args.eval_tokenizer)
    return ending


def _add_baselines(ending: verdict.Ending, data, tokenizer: str):
    references = ending.references = list(data.evaluation["captions"])
    ending.before_rows = list(spread_rows(len(references), MOST_BEFORE)) if ending.before else []
    captions = {"captioner": ending.after}
    if len(ending.before) == len(references):  # with more held-out images, only some were captioned before
        captions[BEFORE] = ending.before
    if data.train_captions:
        ending.shared_words = verdict.shared_words(data.train_captions)
        ending.mean_words = verdict.mean_words([text for texts in data.train_captions for text in texts])
        captions[MOST_COMMON] = [most_common_caption(data.train_captions)] * len(references)
    if data.train_embeds is not None and "clip_embeds" in data.evaluation.column_names:
        nearest, similarity = nearest_images(read_pooled(data.evaluation), data.train_embeds())
        captions[NEAREST] = [data.train_captions[row][0] for row in nearest.tolist()]
        ending.overlap = int((similarity > verdict.SAME_IMAGE).sum())
    else:
        ending.notes.append(f"  ({NEAREST}: not computed, since the images were not embedded before training)")
    ending.scores = {name: score(texts, references, tokenizer) for name, texts in captions.items()}
