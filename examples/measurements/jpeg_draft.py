"""Measure what decoding large JPEG files at a smaller size saves, and what it does to embeddings.

python examples/measurements/jpeg_draft.py FOLDER

JPEG decoders can give a half, a quarter or an eighth of the size for less work (`--reduce-jpeg`). FOLDER holds
photographs; those that are at least twice as large as the size asked for in both directions are read in both ways,
cropped to 224 pixels and embedded by the EfficientNet-Lite0 in `photo-mini`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import clipcap_hf
import torch
from clipcap_hf import ClipCapForConditionalGeneration
from clipcap_hf.model.images_clipcap import load_image
from PIL import Image
from transformers import CLIPImageProcessorPil


SIZE = 224


def cpu_seconds(function: Callable, repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        function()
        best = min(best, time.process_time() - began)
    return best


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=2, help="smallest decoded edge, in times 224 (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tower = ClipCapForConditionalGeneration.from_pretrained(clipcap_hf.PHOTO_MINI).eval().vision_tower
    processor = CLIPImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])

    def pixels(path: Path, draft: bool) -> torch.Tensor:
        image = load_image(path, enough=arguments.times * SIZE if draft else None)
        return processor(image, return_tensors="pt")["pixel_values"]

    def embed(pixel_values: torch.Tensor) -> torch.Tensor:
        return tower.classifier.forward_features(pixel_values).mean((2, 3))

    ratios, distances = [], []
    for path in sorted(arguments.folder.rglob("*.jp*g")):
        with Image.open(path) as image:
            large = min(image.size) >= 2 * arguments.times * SIZE
            size = image.size
        if not large:
            continue
        whole, draft = (cpu_seconds(lambda: pixels(path, draft)) for draft in (False, True))
        distance = 1 - torch.cosine_similarity(embed(pixels(path, False)), embed(pixels(path, True))).item()
        ratios.append(whole / draft)
        distances.append(distance)
        print(
            f"{path.name:<32}{size!s:>14}{1000 * whole:8.0f} ->{1000 * draft:5.0f} ms, cosine distance {distance:.1e}"
        )
    if not ratios:
        sys.exit(f"{arguments.folder} holds no JPEG file of {2 * arguments.times * SIZE} pixels or more.")
    print(
        f"{len(ratios)} photographs: reading and resizing {min(ratios):.1f} to {max(ratios):.1f} times as fast "
        f"(median {statistics.median(ratios):.1f}), cosine distance {statistics.median(distances):.1e} (median), "
        f"at most {max(distances):.1e}"
    )


if __name__ == "__main__":
    main()
