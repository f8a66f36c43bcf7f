"""Count how often `clipcap_hf.drawings.looks_drawn` takes a drawing for a photograph, and the other way round.

    python examples/embedded/tell_drawings.py dataset_flickr8k.json Flicker8k_Dataset/

The drawings are the embedded emoji of training and validation, the photographs those of Flickr8k's validation split
(`dataset_flickr8k.json` is Karpathy's file).
"""

import argparse
import json
from pathlib import Path

from clipcap_hf.data import load_emoji
from clipcap_hf.drawings import looks_drawn
from clipcap_hf.model.images_clipcap import load_image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("karpathy", type=Path, help="dataset_flickr8k.json")
    parser.add_argument("images", type=Path, help="folder of the photographs")
    arguments = parser.parse_args()

    for split in ("train", "validation"):
        drawings = load_emoji(split)["image"]
        drawn = [looks_drawn(load_image(image)) for image in drawings]
        print(f"emoji, {split}: {sum(drawn)} of {len(drawn)} look drawn ({sum(drawn) / len(drawn):.1%})")
    rows = [row for row in json.loads(arguments.karpathy.read_text())["images"] if row["split"] == "val"]
    drawn = [looks_drawn(load_image(arguments.images / row["filename"])) for row in rows]
    print(f"Flickr8k, validation: {sum(drawn)} of {len(drawn)} look drawn ({sum(drawn) / len(drawn):.1%})")


if __name__ == "__main__":
    main()
