"""Compare `clipcap_hf.data.embed` with a loop over single images: `python examples/measurements/embedding_speed.py`.

A ViT-B/32 with random weights embeds JPEGs of 640x480 that are made here. The loop computes in float32; `embed` in
float32 and, if the device is faster with them, in 16 bits, which is its default. All are timed in turns, and medians
are reported.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import clipcap_hf  # noqa: F401  (first: it lets transformers import torchvision)
import numpy as np
import torch
from clipcap_hf.data import embed
from clipcap_hf.data.embed import Encoder
from datasets import Dataset, Image, disable_progress_bars
from PIL import Image as PILImage
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection


def make_images(folder: Path, count: int) -> list[str]:
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        # Smooth colours with some noise give files as large as photographs.
        coarse = PILImage.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        noisy = np.asarray(coarse, dtype=np.int16) + random.integers(-12, 13, (480, 640, 3), dtype=np.int16)
        paths.append(str(folder / f"{number}.jpg"))
        PILImage.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=85)
    return paths


def one_at_a_time(tower, image_processor, paths: list[str]) -> torch.Tensor:
    embeds = []
    with torch.no_grad():
        for path in paths:
            pixel_values = image_processor(PILImage.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
            embeds.append(tower(pixel_values.to(tower.device)).image_embeds.cpu())
    return torch.cat(embeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, help="default: by the number of cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    disable_progress_bars()
    logging.disable(logging.WARNING)

    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=32)).to(arguments.device).eval()
    image_processor = CLIPImageProcessorPil()
    dtypes = {torch.float32, Encoder(tower).dtype}
    rates = {"one at a time": [], **{dtype: [] for dtype in sorted(dtypes, key=str)}}
    similarity = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_images(Path(folder), arguments.images)
        data = Dataset.from_dict({"image": paths}).cast_column("image", Image())
        for number in range(arguments.rounds):
            start = time.perf_counter()
            expected = one_at_a_time(tower, image_processor, paths)
            rates["one at a time"].append(len(paths) / (time.perf_counter() - start))
            for dtype in dtypes:
                start = time.perf_counter()
                embedded = embed(
                    tower,
                    data,
                    f"{folder}/{number}-{dtype}",
                    image_processor,
                    batch_size=arguments.batch_size,
                    num_workers=arguments.workers,
                    dtype=dtype,
                    progress=False,
                )
                rates[dtype].append(len(paths) / (time.perf_counter() - start))
                found = torch.tensor(embedded["clip_embeds"][:])
                similarity[dtype] = torch.cosine_similarity(found, expected).min()
    slow = rates.pop("one at a time")
    print(f"one at a time: {statistics.median(slow):.1f} images/s ({', '.join(f'{rate:.1f}' for rate in slow)})")
    for dtype, values in rates.items():
        ratio = statistics.median(new / old for new, old in zip(values, slow))
        print(
            f"embed in {dtype}: {statistics.median(values):.1f} images/s "
            f"({', '.join(f'{rate:.1f}' for rate in values)}), {ratio:.2f} times as fast; "
            f"lowest cosine similarity with the loop's embeddings {similarity[dtype]:.6f}"
        )


if __name__ == "__main__":
    main()
