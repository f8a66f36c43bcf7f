"""Score `photo-mini` and baselines on Flickr8k's photographs, which no part of it was trained on.

    python examples/embedded/score_photo_mini.py dataset_flickr8k.json Flicker8k_Dataset/ --captions captions.json

`dataset_flickr8k.json` is Karpathy's file, `captions.json` the texts that photo-mini was trained on. The baselines are
the best single sentence for all photographs among the twenty that photo-mini writes most often, and the caption of the
training image whose made-up embedding is nearest. `--other` names another captioner to compare with.
"""

import argparse
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from clipcap_hf import PHOTO_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.files import write_text
from clipcap_hf.metrics import score_captions
from photo_captions import DetectorNoise, clean
from PIL import Image
from torch.nn import functional as F
from train_photo_mini import class_weights


BATCH = 100


def load_split(karpathy: Path, split: str) -> tuple[list[str], list[list[str]]]:
    """Return the file names of a split, and the captions of each."""
    images = [image for image in json.loads(karpathy.read_text())["images"] if image["split"] == split]
    return [image["filename"] for image in images], [
        [sentence["raw"] for sentence in image["sentences"]] for image in images
    ]


def embed_files(model, processor, paths: list[Path]) -> torch.Tensor:
    parts = []
    for start in range(0, len(paths), BATCH):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
        parts.append(embed_images(model, processor, images, progress=False).float())
    return torch.cat(parts)


def nearest_captions(embeds: torch.Tensor, texts: list[list[str]], tower) -> list[str]:
    """Return the first caption of the training image with the nearest made-up embedding, for each photograph."""
    noise = DetectorNoise(texts, class_weights(tower), tower.config.score_threshold)
    known = F.normalize(noise.embed(np.arange(len(texts))), dim=-1)
    return [clean(texts[place][0]) for place in (F.normalize(embeds, dim=-1) @ known.T).argmax(1).tolist()]


def score(captions: list[str], references: list[list[str]], tokenizer: str) -> dict[str, float]:
    found = score_captions(captions, references, metrics=("bleu", "cider"), tokenizer=tokenizer)
    return {"BLEU-4": round(100 * float(found["bleu_4"]), 1), "CIDEr": round(100 * float(found["cider"]), 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("karpathy", type=Path, help="dataset_flickr8k.json")
    parser.add_argument("images", type=Path, help="folder of the photographs")
    parser.add_argument("--captions", type=Path, required=True, help="texts that photo-mini was trained on")
    parser.add_argument("--split", default="test")
    parser.add_argument("--number", type=int, help="of photographs, the first of the split (default: all)")
    parser.add_argument("--model", default=PHOTO_MINI)
    parser.add_argument("--other", help="another captioner of photographs")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--tokenizer", default="ptb", help="ptb (needs Java) or python")
    parser.add_argument("--out", type=Path, help="JSON file for the captions of all systems")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    names, references = (part[: arguments.number] for part in load_split(arguments.karpathy, arguments.split))
    paths = [arguments.images / name for name in names]
    model = ClipCapForConditionalGeneration.from_pretrained(arguments.model).eval()
    processor = ClipCapProcessor.from_pretrained(arguments.model)
    embeds = embed_files(model, processor, paths)
    captions = caption_embeds(model, processor, embeds, num_beams=arguments.beams, progress=False)
    systems = {
        "photo-mini": captions,
        "photo-mini, greedy": caption_embeds(model, processor, embeds, num_beams=1, progress=False),
        "nearest training caption": nearest_captions(
            embeds, list(json.loads(arguments.captions.read_text()).values()), model.vision_tower
        ),
    }
    if arguments.other:
        other = ClipCapForConditionalGeneration.from_pretrained(arguments.other).eval()
        other_processor = ClipCapProcessor.from_pretrained(arguments.other)
        systems[arguments.other] = caption_embeds(
            other, other_processor, embed_files(other, other_processor, paths), progress=False
        )
    sentences = [text for text, _ in Counter(captions).most_common(20)]
    best = max(sentences, key=lambda text: score([text] * len(names), references, "python")["CIDEr"])
    systems[f"always {best!r}"] = [best] * len(names)
    scores = {name: score(texts, references, arguments.tokenizer) for name, texts in systems.items()}
    print(json.dumps({"photographs": len(names), "different captions": len(set(captions)), **scores}, indent=1))
    if arguments.out:
        rows = [
            {"image": name, **{key: texts[row] for key, texts in systems.items()}} for row, name in enumerate(names)
        ]
        write_text(arguments.out, json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
