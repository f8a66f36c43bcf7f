"""Compare loading a checkpoint that leaves out its frozen parts with loading a full one.

python examples/measurements/loading_speed.py

ViT-B/32 and GPT-2 small with random weights are saved to a temporary folder (3 GB), as folders and as the Hub's cache
keeps them. Each load happens in a process of its own, forked when everything is imported, in turns. Parts from folders
are hashed the first time, by threads: where there is a second core, time by the clock is nearer to that of the first
thread than to all CPU time. Later, unchanged files are known again. Parts from the Hub are known by their commit.
"""

import argparse
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from clipcap_hf import ClipCapForConditionalGeneration
from clipcap_hf.processes import cores
from huggingface_hub import constants
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging


# What a load is called: the checkpoint's folder, and whether hashes are remembered from the load before.
KINDS = {
    "full": ("full", True),
    "mapper-only, parts in folders, first load": ("mapper-only", False),
    "later loads": ("mapper-only", True),
    "parts in the Hub's cache": ("mapper-only-hub", True),
}
COMMIT = "0" * 40
UNITS = ("CPU seconds", "CPU seconds of the first thread", "seconds", "peak MB")


def save_checkpoints(folder: Path, small: bool):
    vision, text = CLIPVisionConfig(patch_size=32), GPT2Config()
    if small:
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
        vision = CLIPVisionConfig(patch_size=32, **sizes)
        text = GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=4000)
    torch.manual_seed(0)
    parts = {"clip": CLIPVisionModelWithProjection(vision), "gpt2": GPT2LMHeadModel(text)}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        cached = folder / "cache" / f"models--parts--{name}"
        part.save_pretrained(cached / "snapshots" / COMMIT)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(COMMIT)

    def captioner(clip: str, gpt2: str, **where) -> ClipCapForConditionalGeneration:
        return ClipCapForConditionalGeneration.from_vision_text_pretrained(
            clip, gpt2, freeze_language_model=True, vision_kwargs=where, text_kwargs=where
        )

    model = captioner(str(folder / "clip"), str(folder / "gpt2"))
    model.save_pretrained(folder / "full")
    model.save_pretrained(folder / "mapper-only", save_frozen=False)
    model = captioner("parts/clip", "parts/gpt2", cache_dir=folder / "cache", local_files_only=True)
    model.save_pretrained(folder / "mapper-only-hub", save_frozen=False)


def in_fork(work: Callable, *arguments):
    """Run a function in a child of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, arguments)


def load(folder: Path, remembers: bool) -> list[float]:
    constants.HF_HOME = str(folder.parent / "home")  # not the user's
    if not remembers:
        shutil.rmtree(constants.HF_HOME, ignore_errors=True)
    start = time.process_time(), time.thread_time(), time.perf_counter()
    model = ClipCapForConditionalGeneration.from_pretrained(
        folder, cache_dir=folder.parent / "cache", local_files_only=True
    )
    end = time.process_time(), time.thread_time(), time.perf_counter()
    assert model.config.text_config.model_type == "gpt2"
    return [*(b - a for a, b in zip(start, end)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="parts of a tenth of the size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_fork(save_checkpoints, folder, args.small)
        time.sleep(3)  # hashes of files that are younger are not remembered
        rounds = [
            [in_fork(load, folder / checkpoint, remembers) for checkpoint, remembers in KINDS.values()]
            for _ in range(args.rounds)
        ]
    print(f"{cores()} cores, medians of {args.rounds} loads, beside full ones\n| | {' | '.join(KINDS)} |")
    print("|---" * (len(KINDS) + 1) + "|")
    for number, unit in enumerate(UNITS):
        full, *light = ([each[kind][number] for each in rounds] for kind in range(len(KINDS)))
        cells = [f"{statistics.median(full):.2f}"]
        for values in light:
            ratio = statistics.median(b / a for a, b in zip(full, values))
            cells.append(f"{statistics.median(values):.2f} ({ratio:.2f} times)")
        print(f"| {unit} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
