"""Measure each stage, captioning compared with a naive way, how cost grows, and captioning of a folder."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from tqdm.auto import tqdm

from ..captioning import caption_files
from ..model.processing_clipcap import load_image
from ..processes import cores, default_workers, reading_threads
from .captioners import make_captioner, write_jpegs
from .limits import decode_flops, matmul_flops, read_bytes, seconds, weights_read
from .naive import naive_beams, naive_greedy


WRITTEN_BY = "clipcap benchmark"


def measure_speed(
    language_model: str = "gpt2",
    batch_sizes: Sequence[int] = (1, 64),
    beam_batch_sizes: Sequence[int] = (32,),
    num_beams: int = 5,
    new_tokens: Sequence[int] = (10, 20),
    repeats: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile_mode: str | None = None,
    files: int = 2000,
    scale: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Measure captioning with random weights at real sizes: ViT-B/32, an MLP with 10 prefix vectors, a language model.

    The alternatives take turns, so that other work on the machine slows all of them. Each figure is a median with
    minimum and maximum.

    Args:
        language_model (`str`): Shape of the language model: `"gpt2"` (small) or `"smollm2"` (SmolLM2-135M).
        batch_sizes (`Sequence[int]`): Batch sizes of greedy decoding, in images.
        beam_batch_sizes (`Sequence[int]`): Batch sizes of beam search, in images.
        num_beams (`int`): Number of beams.
        new_tokens (`Sequence[int]`): Tokens per caption; no caption ends earlier.
        repeats (`int`): Rounds of measurement.
        device (`str`): Device of the models.
        dtype (`torch.dtype`): Type of their weights.
        compile_mode (`str`, *optional*): Mode of `torch.compile` for decoding with a static cache.
        files (`int`): Number of JPEG files in the folder to caption; 0 skips this measurement.
        scale (`bool`): Also measure how cost grows with prefix, caption, batch and beams.
        progress (`bool`): Show a progress bar on standard error.

    Returns:
        `dict`: The report, for [`report_table`] and [`draw_report`].
    """
    place = torch.device(device)
    model, processor = make_captioner(language_model, device, dtype)
    naive, _ = make_captioner(language_model, device, dtype, prepack=False)
    decoding = {}
    if compile_mode:
        compile_config: Any = transformers.CompileConfig(mode=compile_mode)
        compile_config._compile_all_devices = True  # otherwise a CPU is skipped
        decoding = {"cache_implementation": "static", "compile_config": compile_config}
    limits = {"matmul_flops": matmul_flops(place, dtype), "read_bytes": read_bytes(place, dtype)}
    report: dict[str, Any] = {
        "written_by": WRITTEN_BY,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else f"{device}, {cores()} cores",
        "language_model": language_model,
        "dtype": str(dtype).removeprefix("torch."),
        "compile_mode": compile_mode,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "limits": limits,
    }
    with tempfile.TemporaryDirectory() as folder, tqdm(total=4, desc="Measuring", disable=not progress) as bar:
        paths = write_jpegs(Path(folder), max(files, 32))
        report["stages"] = _stages(model, processor, paths[:32], repeats, place)
        bar.update()
        report["captioning"] = _captioning(
            model, naive, batch_sizes, beam_batch_sizes, num_beams, new_tokens, repeats, place, limits, decoding
        )
        bar.update()
        report["files"] = _files(model, processor, paths, max(new_tokens), report, place) if files else None
        bar.update()
        report["peak_memory_bytes"] = _peak_memory(place)
        report["scale"] = _scale(language_model, device, dtype, repeats) if scale else []
        bar.update()
    return report


def _peak_memory(place: torch.device) -> int:
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place)
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def _spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _take_turns(
    alternatives: Mapping[Any, Callable[[], Any]], repeats: int, place: torch.device
) -> dict[Any, list[float]]:
    """Measure the seconds of each alternative in each round, after a first round that is not counted."""
    times: dict[Any, list[float]] = {name: [] for name in alternatives}
    for turn in range(repeats + 1):
        for name, run in alternatives.items():
            taken = seconds(run, place)
            if turn:
                times[name].append(taken)
    return times


# -- stages


def _stages(model, processor, paths: list[str], repeats: int, place: torch.device) -> list[dict]:
    images = [load_image(path) for path in paths]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(place, model.dtype)
    rows = pixels.contiguous(memory_format=torch.channels_last)
    embeds = torch.randn(len(paths), model.config.clip_embed_dim, device=place, dtype=model.dtype)
    tokens = torch.randint(10, 100, (len(paths), 20))
    stages = {
        "read and decode JPEG": (lambda: [load_image(path) for path in paths], len(paths)),
        "resize and normalise": (
            lambda: [processor.image_processor(image, return_tensors="pt") for image in images],
            len(paths),
        ),
        "encode, batch 1": (lambda: model.get_clip_embeds(pixels[:1]), 1),
        "encode, batch 32": (lambda: model.get_clip_embeds(rows), len(paths)),
        "map to the prefix": (lambda: model.get_image_features(clip_embeds=embeds), len(paths)),
        "write 20 tokens, batch 32": (lambda: model.generate(clip_embeds=embeds, max_new_tokens=20), len(paths)),
        "tokens to text": (lambda: processor.batch_decode(tokens), len(paths)),
    }
    with torch.inference_mode():
        times = _take_turns({name: run for name, (run, _) in stages.items()}, repeats, place)
    return [
        {"stage": name, "images_per_second": _spread(stages[name][1] / t for t in taken)}
        for name, taken in times.items()
    ]


# -- captioning and the naive way


def _captioning(model, naive, batch_sizes, beam_batch_sizes, num_beams, new_tokens, repeats, place, limits, decoding):
    rows = []
    for tokens in new_tokens:
        for beams, batches in ((1, batch_sizes), (num_beams, beam_batch_sizes)):
            ways = _ways_to_caption(model, naive, batches, beams, tokens, place, decoding)
            times = _take_turns(ways, repeats, place)
            rows += [
                _captioning_row(model, limits, size, beams, tokens, times[size], times["naive"]) for size in batches
            ]
    return rows


def _ways_to_caption(model, naive, batches, beams: int, tokens: int, place: torch.device, decoding: dict) -> dict:
    """Prepare the naive way for one image, and ours for batches of each size."""

    def embeds(images: int) -> torch.Tensor:
        return torch.randn(images, model.config.clip_embed_dim, device=place, dtype=model.dtype)

    def batched(clip_embeds: torch.Tensor) -> Callable[[], Any]:
        return lambda: model.generate(clip_embeds=clip_embeds, max_new_tokens=tokens, num_beams=beams, **decoding)

    def one_by_one(one: torch.Tensor) -> Callable[[], Any]:
        return lambda: naive_greedy(naive, one, tokens) if beams == 1 else naive_beams(naive, one, tokens, beams)

    return {**{size: batched(embeds(size)) for size in batches}, "naive": one_by_one(embeds(1))}


def _captioning_row(
    model, limits, batch: int, beams: int, tokens: int, taken: list[float], naive: list[float]
) -> dict:
    per_caption = [seconds / batch for seconds in taken]
    return {
        "beams": beams,
        "new_tokens": tokens,
        "batch": batch,
        "captions_per_second": _spread(1 / seconds for seconds in per_caption),
        "tokens_per_second": tokens / statistics.median(per_caption),
        "naive_captions_per_second": _spread(1 / seconds for seconds in naive),
        "ratio": _spread(slow / fast for slow, fast in zip(naive, per_caption)),
        **_share_of_limit(model, limits, batch, beams, tokens, statistics.median(taken)),
    }


def _share_of_limit(model, limits: dict, batch: int, beams: int, tokens: int, taken: float) -> dict[str, Any]:
    """Compare the time with its lower bound, set by memory bandwidth or matmul speed."""
    reading = tokens * weights_read(model) / limits["read_bytes"]
    head = 2 * model.get_output_embeddings().weight.numel()
    prompt = batch * model.config.prefix_length * (decode_flops(model) - head) + batch * head
    multiplying = (prompt + batch * beams * (tokens - 1) * decode_flops(model)) / limits["matmul_flops"]
    limit, least = max(("memory", reading), ("matmul", multiplying), key=lambda pair: pair[1])
    return {"limit": limit, "share_of_limit": least / taken}


# -- growth


def _scale(language_model: str, device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Measure milliseconds per caption, one setting changed at a time."""
    base = {"prefix_length": 10, "new_tokens": 10, "batch": 8, "num_beams": 1}
    series = {
        "new_tokens": (5, 10, 20, 40),
        "batch": (1, 4, 16, 64),
        "num_beams": (1, 2, 5, 10),
        "prefix_length": (10, 20, 40, 80),
    }
    rows = []
    model, _ = make_captioner(language_model, device, dtype)
    for name, values in series.items():
        ways: dict[int, Callable[[], Any]] = {}
        for value in values:
            setting = {**base, name: value}
            if name == "prefix_length":  # another mapping network on the same language model
                config = {"prefix_length": value, "language_model": model.language_model}
                model, _ = make_captioner(language_model, device, dtype, **config)
            embeds = torch.randn(setting["batch"], model.config.clip_embed_dim, device=device, dtype=dtype)
            ways[value] = partial(
                model.generate,
                clip_embeds=embeds,
                max_new_tokens=setting["new_tokens"],
                num_beams=setting["num_beams"],
            )
        times = _take_turns(ways, max(1, repeats - 1), torch.device(device))
        for value, taken in times.items():
            batch = value if name == "batch" else base["batch"]
            rows.append({"setting": name, "value": value, "ms_per_caption": _spread(1000 * t / batch for t in taken)})
    return rows


# -- a folder of files


def _files(model, processor, paths: list[str], tokens: int, report: dict, place: torch.device) -> dict[str, Any]:
    """Caption files as `clipcap caption` does, and compare with the stages."""
    workers = default_workers(len(paths), device=place)
    process = psutil.Process()
    started = time.perf_counter()
    first = early = None
    for number, _ in enumerate(
        caption_files(model, processor, paths, num_workers=workers, progress=False, max_new_tokens=tokens), start=1
    ):
        if first is None:
            first = time.perf_counter() - started
        if number == max(1, len(paths) // 4):
            early = process.memory_info().rss
    taken = time.perf_counter() - started
    stages = {row["stage"]: row["images_per_second"]["median"] for row in report["stages"]}
    model_time = 1 / stages["encode, batch 32"] + 1 / stages["write 20 tokens, batch 32"] * tokens / 20
    reading_time = 1 / stages["read and decode JPEG"] + 1 / stages["resize and normalise"]
    # On a CPU workers and model share the cores, so the bound is what the cores can do together.
    bound = 1 / max(model_time, reading_time / (workers or reading_threads()))
    shared = 1 / (model_time + reading_time / cores()) if place.type == "cpu" else bound
    return {
        "files": len(paths),
        "workers": workers,
        "images_per_second": len(paths) / taken,
        "slowest_stage_images_per_second": bound,
        "bound_images_per_second": shared,
        "share_of_bound": len(paths) / taken / shared,
        "seconds_to_first_caption": first,
        "memory_growth_bytes": process.memory_info().rss - early,
    }
