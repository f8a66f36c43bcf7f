"""Evaluate on held-out images: scores for `Trainer`, captions before and after, sample files."""

import json
from collections.abc import Sequence
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


class CaptionMetrics:
    """`compute_metrics` for `Trainer`: CIDEr, BLEU-4 and ROUGE-L (times 100), and words.

    `captions` keeps those of the last evaluation.
    """

    def __init__(self, processor: ClipCapProcessor, references: list[list[str]], tokenizer: str = "python"):
        self.processor = processor
        self.references = references
        self.tokenizer = tokenizer
        self.captions: list[str] = []

    def __call__(self, prediction) -> dict[str, float]:
        captions = self.captions = decode_captions(self.processor, prediction.predictions)
        if len(captions) != len(self.references):
            raise ValueError(f"There are {len(captions)} captions for {len(self.references)} images.")
        return {
            **score(captions, self.references, self.tokenizer),
            "words": round(float(np.mean([len(caption.split()) for caption in captions])), 2),
        }


def score(captions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str) -> dict[str, float]:
    """Return CIDEr, BLEU-4 and ROUGE-L, times 100."""
    scores = score_captions(list(captions), list(references), ("bleu", "rouge_l", "cider"), tokenizer, per_image=False)
    return {name: round(100 * float(scores[name]), 2) for name in ("cider", "bleu_4", "rouge_l")}


def decode_captions(processor: ClipCapProcessor, predictions: np.ndarray) -> list[str]:
    """Decode the predictions that `Trainer.predict` returns with `predict_with_generate`."""
    predictions = np.where(predictions < 0, processor.tokenizer.pad_token_id, predictions)  # Trainer pads with -100
    return [text.strip() for text in processor.batch_decode(predictions, skip_special_tokens=True)]


@dataclass
class HeldOut:
    """Captions and scores of held-out images.

    Args:
        captions (`list[str]`): One caption per image, or none if evaluation does not caption.
        metrics (`dict`): `eval_loss`, `eval_cider` and so on.
    """

    captions: list[str]
    metrics: dict[str, float]


def look(trainer: ClipCapTrainer) -> HeldOut:
    """Caption and score the held-out images. Nothing is logged, which would draw a spike at the last step."""
    output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    captions = []
    if trainer.args.predict_with_generate:
        captions = decode_captions(trainer.processing_class, output.predictions)
    return HeldOut(captions, output.metrics)


def look_before(trainer: ClipCapTrainer) -> HeldOut:
    """Caption some held-out images before training. A resumed run reads the captions of its first start."""
    path = Path(trainer.args.output_dir) / BEFORE_FILE
    if path.is_file() and trainer.args.resume:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return HeldOut(stored["captions"], stored["metrics"])
    before = _predict_alone(trainer, evenly_spread(trainer.eval_dataset, MOST_BEFORE))
    if trainer.is_world_process_zero():
        stored = {"captions": before.captions, "metrics": before.metrics}
        write_text(path, json.dumps(stored, indent=1, ensure_ascii=False))
    return before


def _predict_alone(trainer: ClipCapTrainer, rows) -> HeldOut:
    """Caption rows in each process by itself.

    `Trainer.predict` before training would keep the model from being wrapped for distributed training.
    """
    args, model, collate = trainer.args, trainer.model, trainer.data_collator.for_evaluation()
    beams = {} if args.generation_num_beams is None else {"num_beams": args.generation_num_beams}
    captions: list[str] = []
    loss = 0.0
    model.eval()
    for start in range(0, len(rows), args.eval_batch_size):
        batch = [rows[row] for row in range(start, min(start + args.eval_batch_size, len(rows)))]
        batch_loss, generated, _ = trainer.prediction_step(
            model, collate(batch), prediction_loss_only=not args.predict_with_generate, **beams
        )
        loss += float(batch_loss) * len(batch) / len(rows)
        if args.predict_with_generate:
            captions += decode_captions(trainer.processing_class, generated.cpu().numpy())
    return HeldOut(captions, {"eval_loss": loss})


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
    draw_captions(out / "samples.png", {"held-out images": pictures}, {"held-out images": chosen})
    return ["samples.json", "samples.png"]
