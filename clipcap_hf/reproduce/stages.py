"""The stages: embed once, train by the paper's recipe, convert official weights, evaluate by protocol.

Each does what the command of its name does, by the same functions, and goes on where a killed one stopped.
"""

import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..clip import load_tower
from ..convert import convert_official_checkpoint
from ..data import embed, load_embeddings
from ..evaluation import (
    alone_in,
    caption_benchmark,
    check_folder,
    default_metrics,
    evaluate_captions,
    load_evaluation_set,
    read_results,
    remove_progress,
    write_report,
)
from ..files import write_text
from ..model.beam_search_clipcap import official_beam_search
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from ..processes import default_workers, process_state
from ..training.arguments import CaptioningArguments, DataArguments, ModelArguments
from ..training.run import run_training
from .choices import CHOICES, differences, lengths_of
from .claims import TABLES, VARIANTS
from .settings import Settings


logger = logging.getLogger(__name__)

OFFICIAL_TOKENS = 67  # the longest caption of the official decoders
PAPER_BATCH = 40
SAVE_STEPS = 1000
CONVERTING = ".converting-"  # prefix of a folder that is being converted
MADE_BY = "reproduction.json"  # in a captioner's folder: what it was trained on
#: The official files: (the table that they were trained on, the variant, is the embedding normalised).
OFFICIAL_WEIGHTS = {
    "coco_weights.pt": ("coco", "mlp", "no"),
    "conceptual_weights.pt": ("conceptual-captions", "mlp", "no"),
    "transformer_weights.pt": ("coco", "transformer", "yes"),
}
CLIP_OF_WIDTH = {512: "ViT-B-32/openai", 640: "RN50x4/openai"}


@dataclass(frozen=True)
class Captioner:
    """A captioner that numbers are of.

    Attributes:
        trained_on: The table whose training images it saw; None where nobody says.
        variant: Of the paper.
        seed: Of its training.
        choices: That its training depends on.
        path: Of existing weights, an existing captioner or a results file.
    """

    trained_on: str | None
    variant: str
    seed: int
    choices: tuple[tuple[str, str], ...] = ()
    path: str | None = None

    @property
    def name(self) -> str:
        name = f"{self.trained_on or 'unknown'}-{self.variant}-seed{self.seed}"
        if self.path is not None:
            name = f"{self.trained_on or 'unknown'}-{self.variant}-{Path(self.path).stem}"
        other = [
            f"{choice}-{Path(value).name if Path(value).is_dir() else value}"
            for choice, value in differences(dict(self.choices)).items()
        ]
        return file_name("-".join([name, *other]))


def choices_of_training(choices: Mapping[str, str], variant: str) -> tuple[tuple[str, str], ...]:
    """Return the choices that the training of a variant depends on."""
    return tuple(
        (name, value)
        for name, value in choices.items()
        if CHOICES[name].trains and (name != "lengths" or variant == "transformer")
    )


def file_name(text: str) -> str:
    """Turn a name with slashes into one for a folder; of a model's folder only the last part counts."""
    text = Path(text).name if Path(text).is_dir() else text
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


# -- embed


def embed_once(settings: Settings, clip: str, splits: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Encode the images of the splits with a CLIP, in float32 unless the settings say otherwise."""
    tower, image_processor = load_tower(clip)
    embedded = embed(
        tower.to(pick_device(settings.device)).eval(),
        dict(splits),
        out,
        image_processor,
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        dtype=getattr(torch, settings.dtype),
        progress=sys.stderr.isatty(),
    )
    lost = {name: len(rows) - len(embedded[name]) for name, rows in splits.items()}
    return {"images": {name: len(rows) for name, rows in embedded.items()}, "unreadable": lost}


# -- train


def train(settings: Settings, captioner: Captioner, embeddings: Path, out: Path) -> dict[str, Any]:
    """Train by the paper's recipe on embeddings, and leave a captioner that decodes as the official code does."""
    choices = dict(captioner.choices)
    scores = run_training(*training_arguments(settings, captioner, embeddings, out))
    if process_state().is_main_process:
        if choices["captions-end"] == "full-stop":
            _stop_at_full_stop(out)
        made_by = {"trained_on": captioner.trained_on, "seed": captioner.seed, "choices": choices}
        write_text(out / MADE_BY, json.dumps(made_by, indent=1) + "\n")
    return {"train_loss": scores.get("train_loss"), "images": _splits(embeddings)[0]}


def training_arguments(
    settings: Settings, captioner: Captioner, embeddings: Path, out: Path
) -> tuple[ModelArguments, DataArguments, CaptioningArguments, Callable[[PreTrainedTokenizerBase], int] | None]:
    """Return the arguments of [`run_training`] that are the paper's recipe."""
    choices = dict(captioner.choices)
    _, has_validation = _splits(embeddings)
    return (
        _model_arguments(choices, captioner.variant),
        DataArguments(
            data=str(embeddings),
            data_format="saved",
            eval_split="validation" if has_validation else "none",
            append_eos=choices["captions-end"] == "end-token",
        ),
        _recipe(settings, choices, captioner.seed, out, has_validation),
        _full_stop if choices["captions-end"] == "full-stop" else None,
    )


def _splits(embeddings: Path) -> tuple[int, bool]:
    data = load_embeddings(embeddings)
    return len(data["train"]), "validation" in data


def _model_arguments(choices: Mapping[str, str], variant: str) -> ModelArguments:
    mapping_type, frozen, _ = VARIANTS[variant]
    prefix, clip = lengths_of(choices) if mapping_type == "transformer" else (10, None)
    return ModelArguments(
        vision=choices["clip"],
        text=choices["language-model"],
        mapping_type=mapping_type,
        prefix_length=prefix,
        clip_length=clip,
        normalize_clip_embeds=choices["normalize"] == "yes",
        freeze_language_model=frozen,
    )


def _recipe(settings: Settings, choices: Mapping[str, str], seed: int, out: Path, evaluates: bool):
    processes = process_state().num_processes
    if PAPER_BATCH % processes:
        raise ValueError(
            f"The paper's batch of {PAPER_BATCH} cannot be divided by {processes} processes: start fewer."
        )
    stops_early = choices["epochs"] == "early-stopping" and evaluates
    options: dict[str, Any] = {
        "recipe": "paper",
        "seed": seed,
        "per_device_train_batch_size": PAPER_BATCH // processes,
        "eval_strategy": "epoch" if evaluates else "no",
        "predict_with_generate": False,  # the loss on the validation split; captions are scored afterwards
        "load_best_model_at_end": stops_early,
        "early_stopping_patience": 1 if stops_early else None,
        # Without early stopping, more often than each epoch: a kill costs so many steps at most.
        "save_strategy": "epoch" if stops_early else "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 1,
        "num_samples": 0,
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",
        "torch_compile": settings.compile,
        "use_cpu": pick_device(settings.device).type == "cpu",
        "report_to": [],
        **settings.training,
    }
    return CaptioningArguments(output_dir=str(out), resume=out.exists(), **options)


def _stop_at_full_stop(folder: Path):
    """Let the captioner stop at the first full stop and at 67 tokens: it has seen no end token."""
    stop = _full_stop(ClipCapProcessor.from_pretrained(folder).tokenizer)
    decoding = GenerationConfig.from_pretrained(folder)
    decoding.update(eos_token_id=stop, max_new_tokens=OFFICIAL_TOKENS, do_sample=False)
    decoding.save_pretrained(folder)


def _full_stop(tokenizer) -> int:
    stop = tokenizer.encode("a dog.", add_special_tokens=False)[-1]
    if tokenizer.decode([stop]).strip() != ".":
        raise ValueError(
            "The tokenizer of this language model has no token for a full stop: --choose captions-end=end-token."
        )
    return stop


# -- official weights


def convert(captioner: Captioner, choices: Mapping[str, str], clip: str | None, out: Path) -> dict[str, Any]:
    """Convert an official checkpoint to a captioner with the CLIP that it was trained with.

    Raises:
        ValueError: The file is of another variant, or of an unknown CLIP.
    """
    if not process_state().is_main_process:
        return {}
    text = choices["language-model"]
    path = Path(captioner.path).expanduser()
    bare = convert_official_checkpoint(path, text_config=text)
    if bare.config.mapping_type != VARIANTS[captioner.variant][0]:
        raise ValueError(f"{path} is of the variant {bare.config.mapping_type}, not {captioner.variant}: --variant.")
    clip = clip or CLIP_OF_WIDTH.get(bare.config.clip_embed_dim)
    if clip is None:
        raise ValueError(
            f"{path} takes embeddings of width {bare.config.clip_embed_dim}: name its CLIP, --choose clip=NAME."
        )
    tower, image_processor = load_tower(clip)
    processor = ClipCapProcessor.from_vision_text_pretrained(None, text, bare.config.prefix_length)
    processor.image_processor = image_processor
    model = convert_official_checkpoint(
        path,
        text_config=text,
        vision=tower,
        normalize_clip_embeds=choices["normalize"] == "yes",
        freeze_language_model=VARIANTS[captioner.variant][1],
        image_token_id=processor.image_token_id,
        stop_token_id=_full_stop(processor.tokenizer),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f"{CONVERTING}*"):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=CONVERTING) as folder:
        model.save_pretrained(Path(folder) / "captioner")
        processor.save_pretrained(Path(folder) / "captioner")
        made_by = {"trained_on": captioner.trained_on, "weights": path.name, "choices": dict(captioner.choices)}
        write_text(Path(folder) / "captioner" / MADE_BY, json.dumps(made_by, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        (Path(folder) / "captioner").rename(out)
    return {"clip": clip, "prefix_length": model.config.prefix_length}


# -- evaluate


def decoding_arguments(decoding: str) -> dict[str, Any]:
    """Return the arguments of `generate()`; the stop token and the length are the captioner's own."""
    arguments: dict[str, dict[str, Any]] = {
        "greedy": {"num_beams": 1, "do_sample": False},
        "beam-5": {"num_beams": 5, "do_sample": False},
        "official-beam-5": {"num_beams": 5, "custom_generate": official_beam_search},
    }
    return arguments[decoding]


def evaluate(
    settings: Settings, source: Path, table: str, split: str, decoding: str | None, out: Path
) -> dict[str, Any]:
    """Score a captioner, or with `decoding` None a results file, by the benchmark's protocol."""
    benchmark = TABLES[table].protocol
    data = load_evaluation_set(benchmark, settings.data, split)
    inputs = [] if decoding else [source]
    check_folder(out, inputs)
    config, record = None, {"captions_file": source.name}
    with alone_in(out):
        if decoding is None:
            captions = read_results(source)
        else:
            model, processor = load_captioner(source, settings)
            config = model.config
            if settings.limit:
                data = data.take(range(min(settings.limit, len(data))))
            captions, record = caption_benchmark(
                model,
                processor,
                source.name,
                data,
                out,
                batch_size=settings.batch_size,
                num_workers=_workers(settings, len(data), model.device),
                progress=sys.stderr.isatty(),
                allow_subset=settings.allow_subset,
                **decoding_arguments(decoding),
            )
            if not process_state().is_main_process:
                return {}
        tokenizer = settings.tokenizer or benchmark.tokenizer
        report, data = evaluate_captions(
            captions,
            data,
            benchmark,
            split,
            metrics=default_metrics(benchmark, tokenizer, settings.spice_home),
            tokenizer=tokenizer,
            spice_home=settings.spice_home,
            allow_subset=settings.allow_subset or settings.limit is not None,
            config=config,
        )
        report = {**record, **report}
        write_report(out, report, data, inputs)
        if decoding is not None:
            remove_progress(out, record["settings_sha256"])
    return {key: report[key] for key in ("scores", "images", "protocol", "notes", "captions_sha256")} | {
        "parts": None if config is None else describe_parts(config),
        "report": str(out / "scores.json"),
    }


def describe_parts(config) -> dict[str, Any]:
    """Describe a captioner by what tells it from the paper's."""
    text = config.text_config.get_text_config()
    return {
        "mapping_type": config.mapping_type,
        "clip_embed_dim": config.clip_embed_dim,
        "language_model": [text.model_type, text.num_hidden_layers, text.hidden_size],
    }


def load_captioner(folder: Path, settings: Settings):
    """Load a captioner, ready to caption, and its processor."""
    model = ClipCapForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    return model.to(pick_device(settings.device)).eval(), ClipCapProcessor.from_pretrained(folder)


def pick_device(name: str | None) -> torch.device:
    """Return the named device; by default an accelerator if there is one, under torchrun this process's own."""
    if name is None:
        return process_state().device
    return torch.device(name)


def _workers(settings: Settings, images: int, device: torch.device) -> int:
    return default_workers(images, device=device) if settings.workers is None else settings.workers
