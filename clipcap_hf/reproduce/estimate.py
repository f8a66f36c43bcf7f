"""The cost of a reproduction on this device: a few steps of each stage at real sizes, with random weights."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, Image

from ..benchmark.captioners import make_captioner, write_jpegs
from ..data import embed
from ..metrics import JavaError, check_requirements, score_captions
from ..training.collator import CaptioningCollator
from .choices import REPORTED_DECODINGS, lengths_of
from .claims import TABLES, VARIANTS
from .record import describe_device
from .settings import Settings
from .stages import PAPER_BATCH, decoding_arguments, pick_device


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
CAPTION_TOKENS = 12  # of a caption of COCO with its full stop, on average; the longest of a batch has about twice
LONGEST_TOKENS = 22
EMBEDDED = (32, 96)  # images: the difference of two runs leaves out what starting costs
STEPS = (2, 8)  # training steps that warm up, and that are measured
CAPTIONED = 32
SCORED = 200


@dataclass(frozen=True)
class Cost:
    """The cost of a stage: hours, and bytes that stay on the disk."""

    stage: str
    hours: float
    disk: float


def estimate(settings: Settings, shape: str = "gpt2") -> tuple[dict, list[Cost]]:
    """Measure this device, and add up the stages of the settings.

    Args:
        settings: Tables, variants, seeds, device and precision; no file is read.
        shape: Of the captioner, see `clipcap_hf.benchmark`; "tiny" is for tests.

    Returns:
        `(device, costs)`: a description of the device, and the cost of each stage.
    """
    device = pick_device(settings.device)
    dtype = getattr(torch, settings.dtype)
    per_image = _seconds_to_embed(settings, shape, device, dtype)
    per_reference = _seconds_to_score()
    costs, embedded = [], set()
    for table in settings.tables:
        trained_on = TABLES[table].trained_on
        size = SIZES[trained_on]
        if settings.source == "train" and trained_on not in embedded:
            embedded.add(trained_on)
            images = size.train_images + size.validation_images
            captions = size.captions * 60  # bytes of a caption with its offsets
            costs.append(Cost(f"embed {trained_on}", images * per_image / 3600, images * 4 * 512 + captions))
            for variant in settings.variants:
                per_step, disk = _seconds_of_a_step(settings, shape, variant, device, dtype)
                steps = size.captions * EPOCHS / PAPER_BATCH
                hours = settings.seeds * steps * per_step / 3600
                costs.append(Cost(f"train {variant} on {trained_on}", hours, settings.seeds * disk))
        for variant in settings.variants:
            per_caption = _seconds_to_caption(settings, shape, variant, device, dtype)
            seconds = SIZES[table].test_images * (per_caption + len(REPORTED_DECODINGS) * per_image)
            scoring = (
                len(REPORTED_DECODINGS) * SIZES[table].test_images * (SIZES[table].references + 1) * per_reference
            )
            costs.append(Cost(f"evaluate {variant} on {table}", settings.seeds * (seconds + scoring) / 3600, 2e7))
    return describe_device(device), costs


def estimate_text(measured: tuple[dict, list[Cost]]) -> str:
    """Show the costs as a table for the terminal."""
    device, costs = measured
    costs = [*costs, Cost("all", sum(cost.hours for cost in costs), sum(cost.disk for cost in costs))]
    width = max(len(cost.stage) for cost in costs)
    lines = [f"{cost.stage:<{width}}  {cost.hours:9.2f} h  {cost.disk / 1e9:8.2f} GB" for cost in costs]
    name = ", ".join(str(value) for value in device.values())
    return "\n".join([f"Estimated on this device ({name}) by a few steps with random weights:", *lines])


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _seconds_to_embed(settings: Settings, shape: str, device: torch.device, dtype: torch.dtype) -> float:
    """Measure the seconds per image by the stage itself, on JPEG files of COCO's size."""
    model, processor = make_captioner(shape, str(device))
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder) / "images", max(EMBEDDED))
        for number in EMBEDDED:
            rows = Dataset.from_dict({"image": paths[:number]}).cast_column("image", Image())
            work = lambda rows=rows, number=number: embed(  # noqa: E731
                model,
                rows,
                Path(folder) / f"embeddings-{number}",
                processor,
                batch_size=settings.batch_size,
                num_workers=settings.workers or 0,
                dtype=dtype,
                progress=False,
            )
            taken.append(_seconds(work, device))
    per_image = max(taken[1] - taken[0], 1e-9) / (EMBEDDED[1] - EMBEDDED[0])
    return per_image


def _variant(settings: Settings, variant: str) -> dict:
    mapping_type, frozen, _ = VARIANTS[variant]
    prefix, clip = lengths_of(settings.choices) if mapping_type == "transformer" else (10, None)
    return {
        "mapping_type": mapping_type,
        "prefix_length": prefix,
        "clip_length": clip,
        "freeze_language_model": frozen,
    }


def _seconds_of_a_step(
    settings: Settings, shape: str, variant: str, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Measure the seconds of a training step on captions of COCO's lengths, and the bytes that a training leaves."""
    model, processor = make_captioner(shape, str(device), **_variant(settings, variant))
    model.train()
    batches = _batches(model, processor)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5)
    step = torch.compile(model) if settings.compile else model

    def run(number: int):
        for batch in (batches * number)[:number]:
            batch = {name: value.to(device) for name, value in batch.items()}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = step(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    run(STEPS[0])
    per_step = _seconds(lambda: run(STEPS[1]), device) / STEPS[1]
    weights = sum(weight.numel() for weight in model.parameters()) * 4
    moments = sum(weight.numel() for weight in trained) * 8
    return per_step, 2 * weights + moments  # a checkpoint with the optimizer, and the captioner


def _batches(model, processor) -> list[dict[str, torch.Tensor]]:
    """Make batches of 40 captions of 7 to 22 tokens with random embeddings."""
    collator = CaptioningCollator(processor, append_eos=False)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        lengths = 7 + torch.poisson(torch.full((PAPER_BATCH,), CAPTION_TOKENS - 7.0), generator=generator).long()
        rows = [
            {
                "clip_embeds": torch.randn(model.config.clip_embed_dim, generator=generator).tolist(),
                "captions": " ".join(f"w{word}" for word in range(1, 1 + min(int(length), LONGEST_TOKENS))),
            }
            for length in lengths
        ]
        batches.append(dict(collator(rows)))
    return batches


def _seconds_to_caption(
    settings: Settings, shape: str, variant: str, device: torch.device, dtype: torch.dtype
) -> float:
    """Measure the seconds per image of all reported decodings together, without encoding the image."""
    model, _ = make_captioner(shape, str(device), dtype, **_variant(settings, variant))
    embeds = torch.randn(CAPTIONED, model.config.clip_embed_dim, device=device, dtype=dtype)
    total = 0.0
    for decoding in REPORTED_DECODINGS:
        arguments = decoding_arguments(decoding)
        # Captions of random weights never end: the official search runs to its last token as well.
        work = lambda arguments=arguments: model.generate(  # noqa: E731
            clip_embeds=embeds, max_new_tokens=CAPTION_TOKENS, **arguments
        )
        work()
        total += _seconds(work, device) / CAPTIONED
    return total


def _seconds_to_score() -> float:
    """Measure the seconds per text of scoring, tokenizing included; without Java by what runs without it."""
    try:
        check_requirements(["bleu", "meteor"], "ptb")
        metrics, tokenizer = ["bleu", "meteor", "rouge_l", "cider"], "ptb"
    except JavaError:
        metrics, tokenizer = ["bleu", "rouge_l", "cider"], "python"
    words = "a man in the red hat rides an old bicycle on some wet street near two dogs and it rains".split()
    captions = [" ".join(words[(3 * row + place) % len(words)] for place in range(10)) for row in range(SCORED)]
    references = [[captions[(row + place) % SCORED] for place in range(5)] for row in range(SCORED)]
    taken = [
        _seconds(partial(score_captions, captions[:n], references[:n], metrics, tokenizer), torch.device("cpu"))
        for n in (SCORED // 10, SCORED)
    ]
    return max(taken[1] - taken[0], 1e-9) / ((SCORED - SCORED // 10) * 6)
