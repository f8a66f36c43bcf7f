"""How the captioner does on held-out images: scores for `Trainer`, captions before and after, sample files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import write_text
from ..metrics import score_captions
from ..model.processing_clipcap import ClipCapProcessor
from ..pictures import draw_captions
from .arguments import CaptioningArguments
from .rows import evenly_spread, spread_rows
from .trainer import ClipCapTrainer


BEFORE_FILE = "captions_before.json"
MOST_BEFORE = 64  # images captioned before training: an untrained captioner writes long captions


def caption_metrics(
    processor: ClipCapProcessor, references: list[list[str]], tokenizer: str = "python"
) -> Callable[..., dict[str, float]]:
    """Return `compute_metrics` for `Trainer`: CIDEr, BLEU-4 and ROUGE-L (times 100, as papers print them), and words."""

    def compute(prediction) -> dict[str, float]:
        captions = decode_captions(processor, prediction.predictions)
        if len(captions) != len(references):
            raise ValueError(f"There are {len(captions)} captions for {len(references)} images.")
        return {
            **score(captions, references, tokenizer),
            "words": round(float(np.mean([len(caption.split()) for caption in captions])), 2),
        }

    return compute


def score(captions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str) -> dict[str, float]:
    """Return CIDEr, BLEU-4 and ROUGE-L, times 100."""
    scores = score_captions(list(captions), list(references), ("bleu", "rouge_l", "cider"), tokenizer, per_image=False)
    return {name: round(100 * float(scores[name]), 2) for name in ("cider", "bleu_4", "rouge_l")}


def decode_captions(processor: ClipCapProcessor, predictions: np.ndarray) -> list[str]:
    """Return the texts of what `Trainer.predict` returns with `predict_with_generate`."""
    predictions = np.where(predictions < 0, processor.tokenizer.pad_token_id, predictions)  # Trainer pads with -100
    return [text.strip() for text in processor.batch_decode(predictions, skip_special_tokens=True)]


@dataclass
class HeldOut:
    """Captions and scores of held-out images.

    Args:
        captions (`list[str]`): One caption per image, or none where evaluation does not caption.
        metrics (`dict`): `eval_loss`, `eval_cider` and so on.
    """

    captions: list[str]
    metrics: dict[str, float]


def look(trainer: ClipCapTrainer, rows) -> HeldOut:
    """Caption and score rows without a trace in the log, which would be drawn as a spike at the last step."""
    compute_metrics = trainer.compute_metrics
    if compute_metrics is not None and len(rows) != len(trainer.eval_dataset):
        trainer.compute_metrics = None
    try:
        output = trainer.predict(rows, metric_key_prefix="eval")
    finally:
        trainer.compute_metrics = compute_metrics
    captions = []
    if trainer.args.predict_with_generate:
        captions = decode_captions(trainer.processing_class, output.predictions)
    return HeldOut(captions, output.metrics)


def look_before(trainer: ClipCapTrainer, evaluation) -> HeldOut:
    """Caption some held-out images before training. A resumed run reads what its first start wrote."""
    path = Path(trainer.args.output_dir) / BEFORE_FILE
    if path.is_file() and trainer.args.resume:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return HeldOut(stored["captions"], stored["metrics"])
    before = look(trainer, evenly_spread(evaluation, MOST_BEFORE))
    if trainer.is_world_process_zero():
        stored = {"captions": before.captions, "metrics": before.metrics}
        write_text(path, json.dumps(stored, indent=1, ensure_ascii=False))
    return before


def write_samples(args: CaptioningArguments, evaluation, captions: list[str]) -> list[str]:
    """Write evenly spread samples as `samples.json`, with pictures also as `samples.png`; return the names written."""
    if not captions or not args.num_samples:
        return []
    out = Path(args.output_dir)
    picked = spread_rows(len(captions), args.num_samples)
    rows = evaluation.select(picked)
    references = list(rows["captions"])
    chosen = [captions[row] for row in picked]
    samples = [{"caption": caption, "references": texts} for caption, texts in zip(chosen, references)]
    write_text(out / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False))
    if "image" not in rows.column_names or not isinstance(rows[0]["image"], Image.Image):
        return ["samples.json"]
    pictures = [{"image": image, "captions": texts} for image, texts in zip(rows["image"], references)]
    draw_captions(out / "samples.png", {"evaluation": pictures}, {"evaluation": chosen})
    return ["samples.json", "samples.png"]
