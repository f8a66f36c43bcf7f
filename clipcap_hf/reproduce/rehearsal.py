"""A rehearsal: made-up data in the publishers' very forms and small models, for every stage of every table."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ..assets import EMOJI_MINI
from ..data import load_captions, load_emoji
from ..evaluation import BENCHMARKS
from ..evaluation.sets import find_published_files
from ..files import write_text
from ..metrics import JavaError, check_requirements
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from ..processes import process_state
from .settings import Settings


COCO = {"train": 60, "restval": 20, "val": 20, "test": 30}
CONCEPTUAL = {"train": 60, "validation": 30}
DOMAINS = ("in-domain", "near-domain", "out-domain")
NOCAPS = 12  # images of each domain
#: The recipe's shape with fewer steps; a rate that teaches a small random model something.
TRAINING = {
    "num_train_epochs": 4,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "save_steps": 5,
}
PHRASES = ("A drawing of {}.", "{}.", "This is {}.", "A small picture that shows {}.", "Here we see {}.")


def rehearsal_settings(settings: Settings, pictures: str | None = None) -> Settings:
    """Build the data and the models in the folder of the run, and return settings that use them.

    Args:
        settings: Of the real run; tables, variants, seeds and choices are kept.
        pictures: A folder with Flickr8k's files; by default the embedded emoji are used.
    """
    out = Path(settings.out)
    data, models = out / "data", out / "models"
    if process_state().is_main_process:
        if not (data / "made").is_file():
            shutil.rmtree(data, ignore_errors=True)
            build_data(data, _flickr8k(pictures) if pictures else _emoji())
            write_text(data / "made", "by clipcap reproduce --rehearse\n")
        if not (models / "made").is_file():
            shutil.rmtree(models, ignore_errors=True)
            build_models(models)
            write_text(models / "made", "by clipcap reproduce --rehearse\n")
    process_state().wait_for_everyone()
    chosen = {"clip": str(models / "clip"), "language-model": str(models / "gpt2")}
    values = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    return Settings(
        **{
            **values,
            "data": str(data),
            "chosen": {**chosen, **settings.chosen},
            "training": {**TRAINING, **settings.training},
            "tokenizer": settings.tokenizer or _tokenizer(),
            "allow_subset": True,
            "rehearsal": True,
            "workers": 0 if settings.workers is None else settings.workers,
        }
    )


def _tokenizer() -> str | None:
    """Return None, the benchmark's own tokenizer, where Java can run it."""
    try:
        check_requirements(["bleu", "meteor"], "ptb")
    except JavaError:
        return "python"
    return None


# -- data


#: Pictures with their captions: a function that writes the picture to a path, and the captions.
Pictures = Iterator[tuple[Callable[[Path], Any], list[str]]]


def _emoji() -> Pictures:
    for row in load_emoji("train").select(range(0, 11_000, 30)):
        # COCO has five captions per image.
        names = (row["captions"] * len(PHRASES))[: len(PHRASES)]
        captions = [_sentence(phrase, name) for phrase, name in zip(PHRASES, names)]
        yield partial(_write_jpeg, row["image"]), captions


def _sentence(phrase: str, name: str) -> str:
    text = phrase.format(name)
    return text[0].upper() + text[1:]


def _write_jpeg(image, path: Path):
    image.convert("RGB").save(_existing(path), "JPEG", quality=90)


def _flickr8k(root: str) -> Pictures:
    kind, annotations, images = find_published_files(BENCHMARKS["flickr8k"], root, "train")
    from datasets import Image

    for row in load_captions(kind, annotations, images=images, split="train").cast_column(
        "image", Image(decode=False)
    ):
        yield partial(_copy, row["image"]["path"]), row["captions"]


def _copy(source: str, path: Path):
    shutil.copyfile(source, _existing(path))


def _existing(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def build_data(root: Path, pictures: Pictures):
    """Write COCO with Karpathy's split, Conceptual Captions and nocaps, as their publishers do."""
    _build_coco(root / "coco", pictures)
    for split, folder, name in (
        ("train", "training", "Train_GCC-training.tsv"),
        ("validation", "validation", "Validation_GCC-1.1.0-Validation.tsv"),
    ):
        _build_conceptual(root / "conceptual-captions", folder, name, CONCEPTUAL[split], pictures)
    _build_nocaps(root / "nocaps", pictures)


def _build_coco(root: Path, pictures: Pictures):
    images: list[dict[str, Any]] = []
    sentence_id = 0
    for split, count in COCO.items():
        folder = "train2014" if split == "train" else "val2014"
        for _ in range(count):
            save, captions = next(pictures)
            coco_id = 9 + 7 * len(images)
            filename = f"COCO_{folder}_{coco_id:012d}.jpg"
            save(root / folder / filename)
            ids = list(range(sentence_id, sentence_id + len(captions)))
            sentence_id += len(captions)
            sentences = [
                {"tokens": text.lower().rstrip(".").split(), "raw": text, "imgid": len(images), "sentid": number}
                for number, text in zip(ids, captions)
            ]
            images.append(
                {
                    "filepath": folder,
                    "sentids": ids,
                    "filename": filename,
                    "imgid": len(images),
                    "split": split,
                    "sentences": sentences,
                    "cocoid": coco_id,
                }
            )
    write_text(root / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))


def _build_conceptual(root: Path, folder: str, name: str, count: int, pictures: Pictures):
    lines = []
    for number in range(count):
        save, captions = next(pictures)
        lines.append(f"{captions[0].lower().rstrip('.')}\thttp://example.org/{number}.jpg\n")
        if number % 10 != 3 or folder == "validation":  # images vanish from the web
            save(root / folder / f"{number:09d}.jpg")
    write_text(root / name, "".join(lines))


def _build_nocaps(root: Path, pictures: Pictures):
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(NOCAPS * len(DOMAINS)):
        save, captions = next(pictures)
        name = f"{number:016x}.jpg"
        save(root / "val" / name)
        images.append({"id": number, "file_name": name, "open_images_id": name[:-4], "domain": DOMAINS[number % 3]})
        for text in captions * 2:  # ten captions per image
            annotations.append({"id": len(annotations), "image_id": number, "caption": text})
    write_text(
        root / "nocaps_val_4500_captions.json",
        json.dumps({"licenses": [], "info": {}, "images": images, "annotations": annotations}),
    )


# -- models


def build_models(folder: Path):
    """Write the embedded image tower as the CLIP, and a small random GPT-2 as the language model."""
    captioner = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI)
    processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    captioner.vision_tower.save_pretrained(folder / "clip")
    processor.image_processor.save_pretrained(folder / "clip")
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    vocabulary = captioner.config.text_config.vocab_size
    GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_embd=64, n_layer=2, n_head=4, n_positions=128, **ends)
    ).save_pretrained(folder / "gpt2")
    processor.tokenizer.save_pretrained(folder / "gpt2")
