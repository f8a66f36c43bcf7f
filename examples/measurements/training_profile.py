"""Show where the time of a training step goes, part by part, and how near it is to what the machine can do.

python examples/measurements/training_profile.py --steps 5 --out training-profile.json

Sizes are real and weights random: GPT-2 small, embeddings of 512, 40 captions a step, five for each image, 11.5 tokens
on average. Each recipe is trained by `ClipCapTrainer` in three ways: a caption a row with padding, the same packed as
`clipcap train` does, and with all captions of an image together. torch's profiler times each operation, and what no
operation accounts for is Python's. The share of the limit compares the floating-point operations of a step with a
matrix product of GPT-2's size, timed before and after. On CPUs freed memory is kept, as `clipcap train` does.
"""

import argparse
import json
import tempfile
import time

import torch
from clipcap_hf import ClipCapTrainer
from clipcap_hf.benchmark.limits import matmul_flops, seconds
from clipcap_hf.files import write_text
from clipcap_hf.processes import keep_freed_memory
from random_captions import (
    CAPTIONS_PER_IMAGE,
    CAPTIONS_PER_STEP,
    RECIPES,
    random_captioner,
    random_captions,
    training_setup,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, set_seed


# The first part with a word that is in an operation's name takes its time.
PARTS = {
    "matrix products": ("addmm", "::mm", "bmm", "baddbmm", "linear_pointwise"),
    "attention": ("attention",),
    "embedding of tokens": ("embedding", "index_select"),
    "layer norm": ("layer_norm",),
    "activations": ("gelu", "tanh", "relu"),
    "dropout": ("dropout", "bernoulli", "random_"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "gradient norm": ("norm",),
    "optimizer": ("adam", "optimizer"),
    "additions, copies and masks": ("aten::",),
}


class Window(TrainerCallback):
    """Profile all steps but the first."""

    def __init__(self):
        activities = [ProfilerActivity.CPU]
        if torch.accelerator.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps == 0:
            self.profiler.start()
            self.started = time.perf_counter()
        self.steps += 1

    def on_train_end(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds = time.perf_counter() - self.started
        self.profiler.stop()


def part_of(operation: str) -> str | None:
    name = operation.lower()
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), None)


def parts_per_step(window: Window) -> dict[str, float]:
    """Sum the seconds of a step by part."""
    per_step = dict.fromkeys(PARTS, 0.0)
    steps = window.steps - 1
    for event in window.profiler.key_averages():
        if (part := part_of(event.key)) is not None:
            own = event.self_device_time_total if torch.accelerator.is_available() else event.self_cpu_time_total
            per_step[part] += own / 1e6 / steps
    per_step["Python and the rest"] = window.seconds / steps - sum(per_step.values())
    return per_step


def padding_share(batches: list[dict]) -> float:
    """Tell which share of all positions is padding."""
    padding = positions = 0
    for batch in batches:
        mask = batch["attention_mask"]
        positions += batch["input_ids"].numel()
        if mask.ndim == 2:
            padding += int((mask == 0).sum())
        else:  # padding sees only itself, and so does the first token of each image
            padding += int((mask.sum(-1) == 1).sum()) - len(batch["clip_embeds"])
    return padding / positions


def measure(recipe: dict, way: str, steps: int, bf16: bool) -> dict:
    set_seed(0)
    data = random_captions((steps + 1) * CAPTIONS_PER_STEP // CAPTIONS_PER_IMAGE)
    with tempfile.TemporaryDirectory() as folder:
        precision = {"bf16": bf16, "use_cpu": not torch.accelerator.is_available()}
        setup = training_setup(recipe, data, folder, way, **precision)
        window = Window()
        trainer = ClipCapTrainer(model=random_captioner(recipe), callbacks=[window], **setup)
        device, dtype = setup["args"].device, torch.bfloat16 if bf16 else torch.float32
        batches = list(trainer.get_train_dataloader())
        trainer.model.train()
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, batches[0]).backward()
        trainer.model.zero_grad()
        before = product_flops(device, dtype)
        trainer.train()
        peak = max(before, product_flops(device, dtype))
    per_step = window.seconds / (window.steps - 1)
    return {
        "seconds_per_step": per_step,
        "captions_per_second": CAPTIONS_PER_STEP / per_step,
        "parts": parts_per_step(window),
        "padding": padding_share(batches),
        "gflop_per_caption": counter.get_total_flops() / CAPTIONS_PER_STEP / 1e9,
        "share_of_matmul_limit": counter.get_total_flops() / per_step / peak,
    }


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure floating-point operations per second in a product of the size that a training step has."""
    left, right = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((1200, 768), (768, 3072)))
    left @ right
    best = min(seconds(lambda: [left @ right for _ in range(10)], device) for _ in range(3))
    return max(10 * 2 * 1200 * 768 * 3072 / best, matmul_flops(device, dtype))


def show(name: str, found: dict):
    print(
        f"\n{name}: {found['captions_per_second']:.1f} captions/s, {found['gflop_per_caption']:.1f} GFLOP a caption, "
        f"{found['share_of_matmul_limit']:.0%} of the matmul limit, {found['padding']:.1%} of positions are padding"
    )
    for part, taken in sorted(found["parts"].items(), key=lambda item: -item[1]):
        print(f"    {part:<30}{1000 * taken:>8.0f} ms{taken / found['seconds_per_step']:>8.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="profiled steps (default 5)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 (autocast)")
    parser.add_argument("--recipe", choices=list(RECIPES), help="measure one recipe only")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not torch.accelerator.is_available():
        keep_freed_memory()
    report = {"threads": torch.get_num_threads(), "torch": torch.__version__, "steps": arguments.steps, "rows": {}}
    for recipe in [arguments.recipe] if arguments.recipe else RECIPES:
        for way in ("padded", "packed", "together"):
            name = f"{recipe}, {way}"
            report["rows"][name] = measure(RECIPES[recipe], way, arguments.steps, arguments.bf16)
            show(name, report["rows"][name])
    if arguments.out:
        write_text(arguments.out, json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
