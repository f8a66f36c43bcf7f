"""Measure captioning and training beside the official ClipCap code itself, in turns, in one process.

python examples/benchmark_official.py FOLDER --out official.json

FOLDER holds the official repository's `train.py` and `predict.py`, which you fetch yourself. Their classes, decoding
loops and training loop run as they are. Only what they import is replaced: pretrained GPT-2 by random weights of its
size, its tokenizer by one of whole words, the `AdamW` that transformers no longer has by torch's with its defaults
(eps 1e-6, no weight decay), the device "cuda:0" by this machine's, and saving by nothing. `clip`, `cog` and `skimage`,
which are not used, may be missing.

- Captioning: GPT-2 small, an MLP of 10 prefix vectors, from embeddings to tokens; no caption ends before its last
  token. The official code writes one caption at a time; ours a batch, with prepacked weights on a CPU, as `clipcap
  caption` does. Both are counted in captions per second.
- Training: embeddings of 512, 40 captions a step, five for each image, 11.5 tokens on average and at most 20. The
  official loop pads to the longest of all captions (about 37 tokens for COCO, so 20 favours it) and trains without the
  end token, so ours has one token more in each caption.

On Linux training is measured twice: with the C library as it is, and keeping freed memory (`keep_freed_memory`, as
`clipcap train` does), for both sides. Only the latter also measures packed rows without shared prefixes.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import pickle
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import clipcap_hf  # noqa: F401  (before transformers)
import torch
import transformers
from clipcap_hf import ClipCapTrainer, prepack_weights
from clipcap_hf.files import write_text
from clipcap_hf.processes import keep_freed_memory
from datasets import Dataset
from measurements.random_captions import (
    CAPTIONS_PER_IMAGE,
    CAPTIONS_PER_STEP,
    CLIP_DIM,
    RECIPES,
    random_captioner,
    random_captions,
    training_setup,
)
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, set_seed


# New tokens, beams and batch size of ours.
DECODING = ((10, 1, 64), (20, 1, 64), (10, 5, 32), (20, 5, 32))
TOGETHER = "references together"


# -- the official code


class Stopwatch(torch.optim.AdamW):
    """The optimizer of the official loop, with the defaults of the one that transformers had; it times whole steps."""

    ends: list[float] = []

    def __init__(self, params, lr: float):
        super().__init__(params, lr=lr, eps=1e-6, weight_decay=0.0, foreach=False)

    def step(self, closure=None):
        super().step(closure)
        Stopwatch.ends.append(now())


class RandomGPT2:
    """Stands for the pretrained GPT-2 small."""

    @staticmethod
    def from_pretrained(name: str) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config())


class Words:
    """Stands for GPT-2's tokenizer; "w17" is token 17."""

    @classmethod
    def from_pretrained(cls, name: str) -> "Words":
        return cls()

    def encode(self, text: str) -> list[int]:
        return [-1] if text == "." else [int(word[1:]) for word in text.split()]

    def decode(self, tokens) -> str:
        return " ".join(f"w{token}" for token in tokens)


class TorchOnThisMachine(types.ModuleType):
    """The module torch, where "cuda:0" is the device at hand and nothing is saved."""

    def __init__(self, device: torch.device):
        super().__init__("torch")
        self.here = device

    def device(self, name: str) -> torch.device:
        return self.here

    def save(self, *args, **kwargs):
        pass

    def __getattr__(self, name: str):
        return getattr(torch, name)


def load_official(folder: Path, name: str, device: torch.device) -> types.ModuleType:
    """Import `train.py` or `predict.py` with the replacements that the module's docstring lists."""
    path = folder / f"{name}.py"
    if not path.is_file():
        sys.exit(f"{path} is missing: FOLDER is where the official repository's train.py and predict.py are.")
    cog = types.ModuleType("cog")
    cog.Predictor, cog.Path, cog.input = object, str, lambda *args, **kwargs: lambda function: function
    skimage = types.ModuleType("skimage")
    skimage.io = types.ModuleType("skimage.io")
    stand_ins = {"clip": types.ModuleType("clip"), "cog": cog, "skimage": skimage, "skimage.io": skimage.io}
    found = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    transformers.AdamW = Stopwatch
    try:
        spec = importlib.util.spec_from_file_location(f"official_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del transformers.AdamW
        for stand_in, module_before in found.items():
            sys.modules.pop(stand_in)
            if module_before is not None:
                sys.modules[stand_in] = module_before
    module.GPT2LMHeadModel, module.GPT2Tokenizer, module.AdamW = RandomGPT2, Words, Stopwatch
    module.torch = TorchOnThisMachine(device)
    return module


def official_training(official, recipe: dict, data_file: Path, device: torch.device):
    """Return a function that trains through the data once and returns the seconds of each step but the first."""
    kind = official.ClipCaptionPrefix if recipe.get("freeze_language_model") else official.ClipCaptionModel
    length = recipe["prefix_length"]
    mapping = {"mlp": official.MappingType.MLP, "transformer": official.MappingType.Transformer}
    model = kind(length, clip_length=length, prefix_size=CLIP_DIM, mapping_type=mapping[recipe["mapping_type"]])
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = official.ClipCocoDataset(str(data_file), length)
    args = argparse.Namespace(bs=CAPTIONS_PER_STEP, epochs=1, save_every=1)

    def run() -> list[float]:
        Stopwatch.ends = []
        official.train(dataset, model, args, output_dir=str(data_file.parent))
        return differences(Stopwatch.ends)

    return run


# -- ours


class StepTimes(TrainerCallback):
    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(now())


def our_training(recipe: dict, data: Dataset, folder: str, way: str):
    """Return a function like that of `official_training`, for one of the ways of `training_setup`."""
    model, setup = random_captioner(recipe), training_setup(recipe, data, folder, way)

    def run() -> list[float]:
        times = StepTimes()
        ClipCapTrainer(model=model, callbacks=[times], **setup).train()
        return differences(times.ends)

    return run


# -- measuring


def now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def differences(ends: list[float]) -> list[float]:
    return [end - start for start, end in zip(ends, ends[1:])]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(name: str, official: list[float], ours: list[float]) -> dict:
    """Compare captions per second, measured in the same rounds."""
    return {
        "what": name,
        "official_captions_per_second": spread(official),
        "captions_per_second": spread(ours),
        "ratio": spread([fast / slow for fast, slow in zip(ours, official)]),
    }


def show(row: dict):
    ratio = row["ratio"]
    print(
        f"{row['what']:<62}{row['official_captions_per_second']['median']:>10.2f}"
        f"{row['captions_per_second']['median']:>10.2f}"
        f"{ratio['median']:>8.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        flush=True,
    )


def measure_decoding(official, rounds: int, device: torch.device) -> list[dict]:
    their_model = official.ClipCaptionModel(10).to(device).eval()
    model = random_captioner(RECIPES["MLP, GPT-2 tuned"])
    model = model.to(device).eval()
    prepack_weights(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    rows = []
    for tokens, beams, batch in DECODING:
        theirs, ours = [], []
        for turn in tqdm(range(rounds + 1), desc="Captioning", leave=False):
            one = torch.randn(1, CLIP_DIM, device=device)
            many = torch.randn(batch, CLIP_DIM, device=device)
            started = now()
            with torch.no_grad():
                embed = their_model.clip_project(one).reshape(1, 10, -1)
                generate = official.generate2 if beams == 1 else official.generate_beam
                generate(their_model, Words(), embed=embed, entry_length=tokens)
            between = now()
            model.generate(clip_embeds=many, max_new_tokens=tokens, num_beams=beams)
            ended = now()
            if turn:  # the first round is not counted
                theirs.append(1 / (between - started))
                ours.append(batch / (ended - between))
        name = "greedy" if beams == 1 else f"{beams} beams"
        rows.append(compare(f"{name}, {tokens} tokens, batches of {batch}", theirs, ours))
        show(rows[-1])
    return rows


def write_official_data(data: Dataset, folder: Path) -> Path:
    """Write the embeddings and captions in the official code's form of file."""
    captions = [
        {"image_id": index, "caption": caption, "clip_embedding": index}
        for index, group in enumerate(data["captions"])
        for caption in group
    ]
    path = folder / "official.pkl"
    path.write_bytes(pickle.dumps({"clip_embedding": torch.as_tensor(data["clip_embeds"][:]), "captions": captions}))
    return path


def measure_training(official, rounds: int, steps: int, device: torch.device, memory: str, ours: dict) -> list[dict]:
    """Compare training in each of `ours`: what the table calls it, and which way of `training_setup` it is."""
    rows = []
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            images = (steps + 1) * CAPTIONS_PER_STEP // CAPTIONS_PER_IMAGE  # the first step is not counted
            data = random_captions(images)
            data_file = write_official_data(data, Path(folder))
            ways = {
                "official": official_training(official, recipe, data_file, device),
                **{title: our_training(recipe, data, folder, way) for title, way in ours.items()},
            }
            speeds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in tqdm(range(rounds), desc="Training", leave=False):
                for way, run in ways.items():
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        taken = run()
                    speeds[way] += [CAPTIONS_PER_STEP / seconds for seconds in taken]
        for way in ours:
            rows.append(compare(f"{name}, {way}, memory {memory}", speeds["official"], speeds[way]))
            show(rows[-1])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the official train.py and predict.py")
    parser.add_argument("--only", choices=["captioning", "training"], help="measure one of the two")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in which both sides take turns (default 3)")
    parser.add_argument("--steps", type=int, default=2, help="training steps of each side in a round (default 2)")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    set_seed(0)
    transformers.utils.logging.set_verbosity_error()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    official = {name: load_official(arguments.folder, name, device) for name in ("predict", "train")}
    report = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": []}
    print(f"{'captions per second':<62}{'official':>10}{'ours':>10}{'ratio (min to max)':>25}")
    if arguments.only != "training":
        report["rows"] += measure_decoding(official["predict"], arguments.rounds, device)
    if arguments.only != "captioning":
        in_turns = official["train"], arguments.rounds, arguments.steps, device
        report["rows"] += measure_training(*in_turns, "as it is", {TOGETHER: "together"})
        if device.type == "cpu" and keep_freed_memory():
            report["rows"] += measure_training(*in_turns, "kept", {"packed": "packed", TOGETHER: "together"})
    if arguments.out:
        write_text(arguments.out, json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
