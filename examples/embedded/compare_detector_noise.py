"""Compare made-up embeddings of captions with the tower's embeddings of photographs, whose captions are not needed.

    python examples/embedded/compare_detector_noise.py dataset_flickr8k.json Flicker8k_Dataset/ \
        --captions captions.json

The figures of `DetectorNoise` were set by hand until the two columns looked alike where the photographs allow it:
Flickr8k shows more people and dogs than the images of COCO's captions. Validation photographs only.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from clipcap_hf import PHOTO_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
from photo_captions import CLASSES, SCENE_NAMES, DetectorNoise
from score_photo_mini import embed_files, load_split
from train_photo_mini import class_weights


def quartiles(values: torch.Tensor) -> str:
    return " / ".join(f"{value:.2f}" for value in np.quantile(values.numpy(), [0.25, 0.5, 0.75]))


def describe(embeds: torch.Tensor) -> dict[str, str]:
    """Describe embeddings (images, width): how much was found, how surely, and how large it is."""
    score, count, size = embeds[:, : 3 * len(CLASSES)].split(len(CLASSES), dim=1)
    scenes = embeds[:, 3 * len(CLASSES) :][:, : len(SCENE_NAMES)]
    person = score[:, 0] > 0
    others, place = score[:, 1:].sort(dim=1, descending=True)
    first, later = others[:, 0] > 0, others[:, 1:] > 0
    sizes = size[:, 1:].gather(1, place)
    known_dogs = embeds[score[:, CLASSES.index("dog")] > 0.4][:, 3 * len(CLASSES) :][:, : len(SCENE_NAMES)]
    return {
        "classes per image": f"{(score > 0).sum(1).float().mean():.2f}",
        "images without any": f"{(score.amax(1) == 0).float().mean():.1%}",
        "images with persons": f"{person.float().mean():.0%}",
        "persons: score, quartiles": quartiles(score[person, 0]),
        "persons: size, quartiles": quartiles(size[person, 0]),
        "persons: share of single ones": f"{(count[person, 0] < 0.3).float().mean():.0%}",
        "likeliest other thing: score": quartiles(others[first, 0]),
        "likeliest other thing: size": quartiles(sizes[first, 0]),
        "further things per image": f"{later.sum(1).float().mean():.2f}",
        "further things: score": quartiles(others[:, 1:][later]),
        "further things: size": quartiles(sizes[:, 1:][later]),
        "scenes per image": f"{(scenes > 0).sum(1).float().mean():.2f}",
        "scenes over 0.2 per image": f"{(scenes > 0.2).sum(1).float().mean():.2f}",
        "scenes over 0.2 per image with a sure dog": f"{(known_dogs > 0.2).sum(1).float().mean():.2f}",
        "share of green ground": quartiles(embeds[:, 3 * len(CLASSES) + len(SCENE_NAMES)]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("karpathy", type=Path, help="dataset_flickr8k.json")
    parser.add_argument("images", type=Path, help="folder of the photographs")
    parser.add_argument("--captions", type=Path, required=True, help="texts that photo-mini was trained on")
    arguments = parser.parse_args()

    model = ClipCapForConditionalGeneration.from_pretrained(PHOTO_MINI).eval()
    processor = ClipCapProcessor.from_pretrained(PHOTO_MINI)
    names, _ = load_split(arguments.karpathy, "val")
    photographs = describe(embed_files(model, processor, [arguments.images / name for name in names]))
    texts = list(json.loads(arguments.captions.read_text()).values())
    noise = DetectorNoise(texts, class_weights(model.vision_tower), model.vision_tower.config.score_threshold)
    made_up = describe(noise.embed(np.arange(len(texts))))
    print("| | made up | photographs |\n|---|---|---|")
    for name, value in made_up.items():
        print(f"| {name} | {value} | {photographs[name]} |")


if __name__ == "__main__":
    main()
