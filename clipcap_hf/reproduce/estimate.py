"""The cost of a reproduction on this device: each stage runs on a sample, and its time is scaled to the whole."""

import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionModelWithProjection

from ..benchmark.captioners import SHAPES, write_jpegs
from ..captioning import caption_images
from ..demo import train_tokenizer
from ..evaluation import default_metrics
from ..metrics import JavaError, check_requirements, score_captions
from ..processes import default_workers
from ..training.rows import evenly_spread
from ..training.run import run_training
from . import stages
from .choices import REPORTED_DECODINGS
from .claims import TABLES
from .inputs import PublishedSplit
from .record import describe_device
from .settings import Settings
from .stages import PAPER_BATCH, Captioner, choices_of_training, decoding_arguments, pick_device


@dataclass(frozen=True)
class Size:
    """How large a table's work is: images and captions of training, images that are scored, references of each."""

    train_images: int
    captions: int
    validation_images: int
    test_images: int
    references: int


SIZES = {
    "coco": Size(113_287, 566_747, 5000, 5000, 5),
    "conceptual-captions": Size(3_318_333, 3_318_333, 0, 15_840, 1),
    "nocaps": Size(0, 0, 0, 4500, 10),
    "flickr8k": Size(6000, 30_000, 1000, 1000, 5),
    "flickr30k": Size(29_000, 145_000, 1014, 1000, 5),
    "stair": Size(0, 0, 0, 40_504, 5),
}
EPOCHS = 10
# A made-up caption: of COCO's length on average, and one of the longest.
CAPTION_WORDS, LONGEST_WORDS = 11, 20
WORDS = "a man in the red hat rides an old bicycle on some wet street near two dogs and it rains".split()
#: Tokens until the longest caption of a batch has ended, on average. Random captions never end by themselves.
DECODED_TOKENS = {"greedy": 16, "official-beam-5": 16}
FEW_STEPS = 2
MOST_REPEATED = 50  # times the first measurement
SCORED = (20, 200)


@dataclass(frozen=True)
class Cost:
    """The cost of a stage: hours, and bytes that stay on the disk."""

    stage: str
    hours: float
    disk: float


@dataclass(frozen=True)
class Line:
    """Seconds that starting takes, and seconds of each unit."""

    start: float
    each: float

    def hours(self, units: float) -> float:
        return (self.start + units * self.each) / 3600


@dataclass(frozen=True)
class TrainingCost:
    """What a training takes: seconds of its start, each step, each evaluated image and each checkpoint; bytes left."""

    start: float
    step: float
    evaluated: float
    checkpoint: float
    disk: float

    def hours(self, size: Size, save_steps: int) -> float:
        steps = size.captions * EPOCHS / PAPER_BATCH
        evaluated = (EPOCHS + 1) * size.validation_images * self.evaluated
        return (self.start + steps * self.step + evaluated + steps // save_steps * self.checkpoint) / 3600


def estimate(
    settings: Settings, shape: str = "gpt2", seconds: float = 15, images: int = 384
) -> tuple[dict[str, Any], list[Cost]]:
    """Measure this device, and add up the stages of the settings.

    Args:
        settings: Tables, variants, seeds, device and precision. Models that are chosen as folders are used, otherwise
            random ones of the paper's sizes. Training images of the tables are used where they are in `data`,
            otherwise made-up ones of COCO's size; nothing of a split that claims are about is read.
        shape: Of the random models, see `clipcap_hf.benchmark`; "tiny" is for tests.
        seconds: How long training and captioning are measured each; a slow device takes longer.
        images: How many are embedded.

    Returns:
        `(measured, costs)`: the device and what was measured on it, and the cost of each stage.
    """
    device = pick_device(settings.device)
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory() as folder:
        parts = _parts(settings, shape, Path(folder) / "parts")
        chosen = replace(settings, chosen={**settings.chosen, **parts}, grid=False)
        samples: dict[str, str] = {}
        measured: dict[str, _Measurements] = {}  # made-up images are measured once for all tables
        for trained_on in dict.fromkeys(TABLES[table].trained_on for table in settings.tables):
            source, rows = _sample(settings, trained_on, Path(folder) / trained_on, images)
            if source not in measured:
                measured[source] = _Measurements(chosen, rows, Path(folder) / trained_on, device, seconds)
            samples[trained_on] = source
            costs += _costs(chosen, trained_on, measured[source])
    models = {name: path if path == settings.choices[name] else "random weights" for name, path in parts.items()}
    return {**describe_device(device), "models": models, "images": samples}, costs


def estimate_text(measured: tuple[dict[str, Any], list[Cost]]) -> str:
    """Show the costs as a table for the terminal."""
    device, costs = measured
    costs = [*costs, Cost("all", sum(cost.hours for cost in costs), sum(cost.disk for cost in costs))]
    width = max(len(cost.stage) for cost in costs)
    lines = [f"{cost.stage:<{width}}  {cost.hours:9.2f} h  {cost.disk / 1e9:8.2f} GB" for cost in costs]
    name = ", ".join(str(value) for key, value in device.items() if key not in ("models", "images"))
    used = [f"{key}: {value}" for kind in ("models", "images") for key, value in device[kind].items()]
    return "\n".join([f"Estimated on this device ({name}) by a part of each stage.", "; ".join(used) + ".", *lines])


def _costs(settings: Settings, trained_on: str, measured: "_Measurements") -> list[Cost]:
    """Scale what was measured to the stages of one training set."""
    size, costs = SIZES[trained_on], []
    if settings.source == "train":
        embedding, bytes_of_image = measured.embedding
        images = size.train_images + size.validation_images
        costs.append(Cost(f"embed {trained_on}", embedding.hours(images), images * bytes_of_image))
        for variant, training in measured.trainings.items():
            hours = settings.seeds * training.hours(size, stages.SAVE_STEPS)
            costs.append(Cost(f"train {variant} on {trained_on}", hours, settings.seeds * training.disk))
    for table in settings.tables:
        if TABLES[table].trained_on != trained_on:
            continue
        size, scoring = SIZES[table], _scoring(table, settings.tokenizer, settings.spice_home)
        for variant, captioning in measured.captionings.items():
            hours = captioning.hours(size.test_images)
            scored = 1 if settings.source == "results" else len(REPORTED_DECODINGS)
            hours += scored * scoring.hours(size.test_images * (size.references + 1))
            costs.append(Cost(f"evaluate {variant} on {table}", settings.seeds * hours, 2e7))
    return costs


class _Measurements:
    """What the parts of each stage take on a sample of images; measured when first asked for."""

    def __init__(self, settings: Settings, rows: Dataset, folder: Path, device: torch.device, seconds: float):
        self.settings, self.rows, self.folder, self.device = settings, rows, folder, device
        self.measured_seconds = seconds
        self.held_out = len(rows) // 6
        self.embeddings = folder / "embeddings"

    @cached_property
    def embedding(self) -> tuple[Line, float]:
        """The embedding of images, and the bytes of each."""
        settings, clip = self.settings, self.settings.choices["clip"]
        workers = _workers(settings, self.device, most=8)

        def work(images: int):
            data = {
                "train": self.rows.select(range(self.held_out, images)),
                "validation": self.rows.select(range(self.held_out)),
            }
            shutil.rmtree(self.embeddings, ignore_errors=True)
            stages.embed_once(replace(settings, workers=workers), clip, data, self.embeddings)

        work(self.held_out + 1)
        numbers = len(self.rows) // 3, len(self.rows)  # the difference leaves out what starting costs
        few, many = (_seconds(partial(work, images), self.device) for images in numbers)
        each = max(many - few, 1e-9) / (numbers[1] - numbers[0])
        return Line(max(0.0, few - numbers[0] * each), each), _bytes(self.embeddings) / len(self.rows)

    def _trained(self, variant: str) -> Path:
        return self.folder / f"captioner-{variant}"

    def _train(self, variant: str, steps: int, **options) -> tuple[float, dict[str, float]]:
        """Train for so many steps, and return the seconds of all and what `Trainer` measured."""
        options = {
            "max_steps": steps,
            "warmup_steps": 0,
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
            **options,
        }
        shutil.rmtree(self._trained(variant), ignore_errors=True)
        choices = choices_of_training(self.settings.choices, variant)
        arguments = stages.training_arguments(
            replace(self.settings, training=options),
            Captioner(None, variant, 0, choices),
            self.embeddings,
            self._trained(variant),
        )
        scores: dict[str, float] = {}
        return _seconds(lambda: scores.update(run_training(*arguments)), self.device), scores

    @cached_property
    def trainings(self) -> dict[str, TrainingCost]:
        """The training of each variant."""
        _ = self.embedding  # leaves what they are trained on
        return {variant: self._training(variant) for variant in self.settings.variants}

    def _training(self, variant: str) -> TrainingCost:
        self._train(variant, 1)  # what only the first of a process takes
        wall, few = self._train(variant, FEW_STEPS)
        more = self._repeat(few["train_runtime"], FEW_STEPS)
        _, many = self._train(variant, FEW_STEPS + more)
        _, saved = self._train(variant, FEW_STEPS, save_strategy="steps", save_steps=FEW_STEPS)
        step = max(many["train_runtime"] - few["train_runtime"], 1e-9) / more
        evaluating = many.get("eval_runtime", 0.0)
        return TrainingCost(
            start=max(0.0, wall - FEW_STEPS * step - evaluating),
            step=step,
            evaluated=evaluating / self.held_out,
            checkpoint=max(0.0, saved["train_runtime"] - few["train_runtime"]),
            disk=_bytes(self._trained(variant)),
        )

    def _repeat(self, seconds: float, units: int) -> int:
        """Return how many more units to measure, so that a fast device is measured over more of them."""
        wanted = math.ceil(self.measured_seconds * units / max(seconds, 1e-9))
        return min(max(wanted, units), MOST_REPEATED * units)

    @cached_property
    def captionings(self) -> dict[str, Line]:
        """Captioning by each variant."""
        if self.settings.source == "results":
            return {variant: Line(0, 0) for variant in self.settings.variants}
        if self.settings.source == "train":
            _ = self.trainings  # leave their captioners
        if self.settings.source == "official-weights":  # random captioners of their size caption as fast
            _ = self.embedding
            for variant in self.settings.variants:
                self._train(variant, 1)
        return {variant: self._captioning(variant) for variant in self.settings.variants}

    def _captioning(self, variant: str) -> Line:
        """Measure all reported decodings together, reading and encoding of the images included."""
        lines, captioner = [], self._trained(variant)
        if self.settings.source == "checkpoint":
            captioner = Path(self.settings.path or "").expanduser()
        workers = _workers(self.settings, self.device)
        for decoding in REPORTED_DECODINGS:

            def work(number: int, decoding: str = decoding):
                model, processor = stages.load_captioner(captioner, self.settings)
                model.generation_config.eos_token_id = None
                captions = caption_images(
                    model,
                    processor,
                    [self.rows[row % len(self.rows)]["image"]["path"] for row in range(number)],
                    batch_size=self.settings.batch_size,
                    num_workers=workers,
                    progress=False,
                    max_new_tokens=DECODED_TOKENS[decoding],
                    **decoding_arguments(decoding),
                )
                assert not any(caption.error for caption in captions)

            work(1)
            first = self.settings.batch_size
            few = _seconds(partial(work, first), self.device)
            more = self._repeat(few, first)
            more = math.ceil(more / first) * first
            each = max(_seconds(partial(work, first + more), self.device) - few, 1e-9) / more
            lines.append(Line(max(0.0, few - first * each), each))
        return Line(sum(line.start for line in lines), sum(line.each for line in lines))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _bytes(folder: Path) -> float:
    return float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def _workers(settings: Settings, device: torch.device, most: int = 4) -> int:
    return default_workers(None, most, device=device) if settings.workers is None else settings.workers


# -- what is measured on


def _sample(settings: Settings, trained_on: str, folder: Path, images: int) -> tuple[str, Dataset]:
    """Return training images with captions, of the publisher's files where they are there, and what they are."""
    if settings.data is not None and TABLES[trained_on].train_images:
        split = PublishedSplit(trained_on, "train", settings.data)
        if not split.missing() and len(split.rows) >= images:
            rows = evenly_spread(split.rows, images)
            return f"{images} training images of {trained_on}", rows.cast_column("image", Image(decode=False))
    captions = _captions(5 * images)
    columns = {
        "image_id": list(range(images)),
        "image": write_jpegs(folder, images),
        "captions": [captions[row : row + 5] for row in range(0, 5 * images, 5)],
    }
    return "made up, of COCO's size", Dataset.from_dict(columns).cast_column("image", Image(decode=False))


def _captions(number: int) -> list[str]:
    """Make up captions of COCO's lengths."""
    rng = random.Random(0)
    lengths = [min(LONGEST_WORDS, 6 + int(rng.expovariate(1 / (CAPTION_WORDS - 6)))) for _ in range(number)]
    return [" ".join(rng.choice(WORDS) for _ in range(length)) + "." for length in lengths]


def _parts(settings: Settings, shape: str, folder: Path) -> dict[str, str]:
    """Return folders of the models: those that are chosen as folders, otherwise random ones of the shape."""
    vision_config, text_config = SHAPES[shape]()
    parts = {name: settings.choices[name] for name in ("clip", "language-model")}
    torch.manual_seed(0)
    if not Path(parts["clip"]).is_dir():
        parts["clip"] = str(folder / "clip")
        CLIPVisionModelWithProjection(vision_config).save_pretrained(parts["clip"])
        CLIPImageProcessorPil().save_pretrained(parts["clip"])
    if not Path(parts["language-model"]).is_dir():
        parts["language-model"] = str(folder / "gpt2")
        tokenizer = train_tokenizer(_captions(1000), 300)  # a token for each word, as nearly all of GPT-2's are
        text_config.bos_token_id = text_config.eos_token_id = tokenizer.eos_token_id
        AutoModelForCausalLM.from_config(text_config).save_pretrained(parts["language-model"])
        tokenizer.save_pretrained(parts["language-model"])
    return parts


@lru_cache
def _scoring(table: str, tokenizer: str | None, spice_home: str | None) -> Line:
    """Measure scoring for each text, tokenizing included; without Java by what runs without it."""
    protocol = TABLES[table].protocol
    tokenizer = tokenizer or protocol.tokenizer
    metrics = default_metrics(protocol, tokenizer, spice_home)
    try:
        check_requirements(metrics, tokenizer, spice_home)
    except JavaError:
        tokenizer = "python"
        metrics = default_metrics(protocol, tokenizer)
    captions = _captions(SCORED[1])
    references = [[captions[(row + place) % SCORED[1]] for place in range(5)] for row in range(SCORED[1])]
    work = partial(score_captions, metrics=metrics, tokenizer=tokenizer, spice_home=spice_home)
    few, many = (_seconds(partial(work, captions[:n], references[:n]), torch.device("cpu")) for n in SCORED)
    each = max(many - few, 1e-9) / ((SCORED[1] - SCORED[0]) * 6)
    return Line(max(0.0, few - SCORED[0] * 6 * each), each)
