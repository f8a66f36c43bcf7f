"""Measure what to train, at which rate and how long, on 50, 300 and 3,000 images: the tables of the training guide.

    python examples/measurements/training_guide.py --out build/guide --images 50 300
    python examples/measurements/training_guide.py --out build/guide --no-drawings --photographs embeddings

The first command measures on drawings: the embedded emoji, with captions in a new style ("a drawing of red heart").
The second measures on photographs, from the folder that `clipcap embed` wrote for a data set with training and
validation splits (see `examples/measurements/small_parts.py`). Each row of the table is trained by `clipcap train`,
from

- an existing captioner: `emoji-mini` for drawings; for photographs `--existing`, such as `photo-mini` with embeddings
  of its tower, or `half`, one that is first trained on every other photograph, so that only the rest are new to it;
- the same, made to learn the words that all captions start with (`--caption-start ''`), for drawings;
- a new captioner with a language model that has seen text (`--texts photo-mini`: the one of `photo-mini`);
- a new captioner with a small GPT-2 that starts from random weights (`--widths`).

Of each run, the checkpoint with the lowest loss on held-out images is scored. Finished runs are kept, so an
interrupted measurement continues, and other sizes, rates and widths can be added. Writes `table.md`, `results.json`.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from clipcap_hf import EMOJI_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.cli import main as clipcap
from clipcap_hf.data import embed, load_embeddings, load_emoji
from datasets import DatasetDict, concatenate_datasets
from small_parts import make_language_model


PARTS = {
    "mapping network": ["--freeze_language_model", "True"],
    "LoRA": ["--lora_r", "8"],
    "everything": ["--freeze_language_model", "False"],
}
EPOCHS = {"drawings": {50: 30, 300: 12}, "photographs": {50: 10, 300: 6}}
HELD_OUT = {"drawings": 200, "photographs": 300}
COMMON = (
    "--use_cpu --num_samples 300 --disable_tqdm True --save_total_limit 1 "
    "--eval_strategy steps --eval_steps 0.125 --save_strategy steps --save_steps 0.125"
).split()
GROUP = ("data", "images", "start", "trained")


def drawings(images: int, out: Path):
    """Return embedded drawings with captions in a new style: some to train on, and some held out."""
    train, new = load_emoji("train").shuffle(0).select(range(images)), load_emoji("new_design").shuffle(0)
    data = DatasetDict({"train": train, "validation": new.select(range(HELD_OUT["drawings"]))})
    data = data.map(lambda row: {"captions": [f"a drawing of {row['captions'][0]}"]})
    model, processor = (
        part.from_pretrained(EMOJI_MINI) for part in (ClipCapForConditionalGeneration, ClipCapProcessor)
    )
    return embed(model, data.select_columns(["image", "captions"]), out, processor, progress=False)


def train(out: Path, data: Path, start: list[str], *options) -> dict:
    """Train a captioner, or find the result of an earlier run."""
    result = out / "result.json"
    if not result.is_file():
        begin = time.process_time()
        command = ["train", "--data", data, "--output_dir", out, *start, *COMMON, *options]
        if clipcap([str(part) for part in command]):
            raise SystemExit(f"Failed: clipcap {' '.join(map(str, command))}")
        state = json.loads((out / "trainer_state.json").read_text())
        scores = json.loads((out / "scores.json").read_text())
        samples = json.loads((out / "samples.json").read_text())
        best = next(entry for entry in state["log_history"] if entry["step"] == state["best_global_step"])
        found = {
            "best epoch": round(best["epoch"], 1),
            "epochs": round(state["epoch"]),
            "loss": round(scores["eval_loss"], 3),
            "CIDEr": round(scores["eval_cider"], 1),
            "BLEU-4": round(scores["eval_bleu_4"], 1),
            "exact": round(100 * sum(row["caption"] in row["references"] for row in samples) / len(samples), 1),
            "CPU s": round(time.process_time() - begin),
        }
        result.write_text(json.dumps(found))
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return json.loads(result.read_text())


def photographs(embeddings: str, existing: str, out: Path):
    """Return the photographs, the captioner to start from, and how many photographs are new to it."""
    data = load_embeddings(embeddings)
    held_out = data["validation"].select(range(HELD_OUT["photographs"]))
    if existing != "half":
        start = [] if existing == "none" else ["--model", existing]
        return DatasetDict({"train": data["train"], "validation": held_out}), start, len(data["train"])
    halves = [data["train"].select(range(first, len(data["train"]), 2)) for first in (0, 1)]
    text, folder, captioner = out / "photographs-text", out / "photographs-other-half", out / "photographs-captioner"
    if not folder.is_dir():
        make_language_model([text for texts in halves[0]["captions"] for text in texts], text, 192, 2, 3000, seed=0)
        DatasetDict({"train": halves[0], "validation": held_out}).save_to_disk(folder)
    start = ["--text", text, "--clip_embed_dim", len(held_out[0]["clip_embeds"]), "--prefix_length", 6]
    train(captioner, folder, start, "--learning_rate", 2e-3, "--num_train_epochs", 3, "--warmup_steps", 0.05)
    rows = concatenate_datasets([halves[1], halves[0]])
    return DatasetDict({"train": rows, "validation": held_out}), ["--model", captioner], len(halves[1])


def cells_of(name: str, captions: list[str], width: int, existing: list[str], text: Path, arguments):
    """List the rows of the table: where each starts, the options for that, and what is trained."""
    cells = []
    if existing:
        start = "existing" if name == "drawings" or arguments.existing == "half" else arguments.existing
        cells += [(start, existing, part) for part in arguments.parts]
    if name == "drawings" and "everything" in arguments.parts:
        cells.append(("existing, all words", [*existing, "--caption-start", ""], "everything"))
    new = ["--clip_embed_dim", width, "--prefix_length", 6]
    for known in arguments.texts:
        cells += [(f"new, text of {known}", ["--text", known, *new], part) for part in arguments.parts]
    for hidden in arguments.widths:
        folder = text.with_name(f"{text.name}-{hidden}")
        if not folder.is_dir():
            make_language_model(captions, folder, hidden, layers=2, vocabulary=3000, seed=0)
        cells.append((f"new, width {hidden}", ["--text", folder, *new], "everything"))
    return cells


def rows_of(name: str, data, existing: list[str], unseen: int, out: Path, arguments):
    """Train each kind of captioner on each number of images at each rate, and yield the rows of the table."""
    for images in arguments.images:
        subset = DatasetDict({"train": data["train"].select(range(images)), "validation": data["validation"]})
        folder = out / f"{name}-{images}"
        if not folder.is_dir():
            subset.save_to_disk(folder)
        captions = [caption for captions in subset["train"]["captions"] for caption in captions]
        width, known = len(subset["train"][0]["clip_embeds"]), existing if images <= unseen else []
        for start, options, part in cells_of(name, captions, width, known, out / f"{folder.name}-text", arguments):
            for rate in arguments.rates:
                row = {"data": name, "images": images, "start": start, "trained": part, "rate": rate}
                run = out / "runs" / "-".join(str(value).replace(", ", "-") for value in row.values())
                chosen = [*PARTS[part], "--learning_rate", rate, "--num_train_epochs", EPOCHS[name].get(images, 3)]
                yield {**row, **train(run, folder, options, *chosen)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, table.md and results.json")
    parser.add_argument("--photographs", help="embeddings of photographs, by clipcap embed (default: none)")
    parser.add_argument("--existing", default="half", help="captioner of photographs, half or none (default: half)")
    parser.add_argument("--images", type=int, nargs="+", default=[50, 300], help="default: %(default)s")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3, 3e-3], help="learning rates")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), help="trained parts, but of --widths")
    parser.add_argument("--texts", nargs="*", default=[], help="language models of new captioners that know text")
    parser.add_argument("--widths", type=int, nargs="*", default=[192], help="widths of new language models")
    parser.add_argument("--no-drawings", action="store_true", help="photographs only")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    found = []
    if not arguments.no_drawings:
        data = drawings(max(arguments.images), out / "drawings")
        found.append(("drawings", data, ["--model", "emoji-mini"], len(data["train"])))
    if arguments.photographs:
        found.append(("photographs", *photographs(arguments.photographs, arguments.existing, out)))
    table = out / "results.json"
    rows = json.loads(table.read_text()) if table.is_file() else []
    for name, data, existing, unseen in found:
        for row in rows_of(name, data, existing, unseen, out, arguments):
            if row not in rows:
                rows.append(row)
            table.write_text(json.dumps(rows, indent=1))
            write_table(rows, out / "table.md")


def write_table(rows: list[dict], path: Path):
    """Write a line per kind of captioner: loss, CIDEr and exact captions at each rate; the best epoch."""
    rates = sorted({row["rate"] for row in rows})
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    lines = ["| " + " | ".join([*GROUP, *(f"{rate:g}" for rate in rates), "best epoch", "CPU s"]) + " |"]
    lines.append("|" + "---|" * (len(GROUP) + len(rates) + 2))
    for group, runs in groups.items():
        best = min(runs, key=lambda run: run["loss"])
        cells = {run["rate"]: f"{run['loss']:.2f} / {run['CIDEr']:.0f} / {run['exact']:.0f} %" for run in runs}
        cells[best["rate"]] = f"**{cells[best['rate']]}**"
        found = [cells.get(rate, "") for rate in rates]
        ends = [f"{best['best epoch']:g} of {best['epochs']}", str(best["CPU s"])]
        lines.append("| " + " | ".join([*map(str, group), *found, *ends]) + " |")
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
