"""Score `photo-mini` and two baselines on the animal photographs of gcompris-qt-data, which no model was trained on.

    apt-get download gcompris-qt-data && dpkg-deb -x gcompris-qt-data_*.deb build/gcompris
    python examples/embedded/score_photo_mini.py build/gcompris/usr/share/gcompris-qt/rcc

The 24 photographs are in Qt resource files. Their file names are the references ("A polar bear.").
"""

import argparse
import io
import json
import struct
import zlib
from pathlib import Path

import torch
from clipcap_hf import PHOTO_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.metrics import score_captions
from PIL import Image
from train_photo_mini import everyday_names, imagenet_names, to_caption


ANIMALS = ("explore_farm_animals.rcc", "explore_world_animals.rcc")


def read_qt_resources(path: Path) -> dict[str, bytes]:
    """Return the files in a Qt resource file (format versions 1 to 3, with or without zlib), by path."""
    content = path.read_bytes()
    version, tree, data, names = struct.unpack(">4xIIII", content[:20])
    node_size = 14 if version < 2 else 22
    files = {}

    def visit(index: int, folder: str):
        start = tree + index * node_size
        name_offset, flags = struct.unpack(">IH", content[start : start + 6])
        (length,) = struct.unpack(">H", content[names + name_offset : names + name_offset + 2])
        text = names + name_offset + 6  # after the length and a hash
        name = content[text : text + 2 * length].decode("utf-16-be") if index else ""
        if flags & 2:  # a folder
            count, first = struct.unpack(">II", content[start + 6 : start + 14])
            for child in range(first, first + count):
                visit(child, f"{folder}{name}/")
            return
        (offset,) = struct.unpack(">I", content[start + 10 : start + 14])
        (size,) = struct.unpack(">I", content[data + offset : data + offset + 4])
        payload = content[data + offset + 4 : data + offset + 4 + size]
        files[folder + name] = zlib.decompress(payload[4:]) if flags & 1 else payload

    visit(0, "")
    return files


def load_animals(folder: Path) -> tuple[list[Image.Image], list[str]]:
    images, captions = [], []
    for name in ANIMALS:
        for path, content in sorted(read_qt_resources(folder / name).items()):
            if path.endswith(".webp"):
                images.append(Image.open(io.BytesIO(content)))
                captions.append(to_caption(Path(path).stem.replace("_", " ")))
    return images, captions


def score_animals(model, processor, folder: Path) -> dict[str, dict[str, float]]:
    """Score the captioner, the caption retrieved by embedding and the likeliest class, by exact match and CIDEr."""
    images, references = load_animals(folder)
    embeds = embed_images(model, processor, images, progress=False)
    of_classes = everyday_names()
    nearest = (embeds @ model.vision_tower.class_embeds.T.float()).argmax(1).tolist()
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        likeliest = model.vision_tower.network(pixel_values).argmax(1).tolist()
    systems = {
        "photo-mini": caption_embeds(model, processor, embeds, progress=False),
        "nearest class name": [to_caption(of_classes[index]) for index in nearest],
        "likeliest class, everyday name": [to_caption(of_classes[index]) for index in likeliest],
        "likeliest class, ImageNet's name": [to_caption(imagenet_names()[index]) for index in likeliest],
    }
    scores = {}
    for name, captions in systems.items():
        found = score_captions(
            captions, [[text] for text in references], metrics=("exact_match", "cider"), tokenizer="python"
        )
        scores[name] = {metric: float(found[metric]) for metric in ("exact_match", "cider")}
    scores["captions"] = dict(zip(references, systems["photo-mini"]))
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the .rcc files")
    parser.add_argument("--model", default=PHOTO_MINI)
    arguments = parser.parse_args()
    model = ClipCapForConditionalGeneration.from_pretrained(arguments.model).eval()
    processor = ClipCapProcessor.from_pretrained(arguments.model)
    print(json.dumps(score_animals(model, processor, arguments.folder), indent=1))


if __name__ == "__main__":
    main()
