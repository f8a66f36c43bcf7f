"""Score `emoji-mini` on two designs that it was neither trained nor tested on, to choose how re-ranking works.

The embedded data set's test splits are not for choices, and its training designs are known to the tower. OpenMoji
and EmojiOne are neither: this fetches both from npm (7 MB), draws what the training split has captions for, without
skin tones, and prints how many captions are exact: of the nearest training drawing, of 10 beams, re-ranked without the
memory of training, and with it for several settings. The new captions of the validation split are scored beside them.

    python examples/embedded/score_outside_designs.py --captioner clipcap_hf/assets/emoji-mini

takes 10 minutes on two cores. Nothing of the drawings goes into the package or its weights: OpenMoji is under
CC-BY-SA-4.0, and EmojiOne was, in some releases.

Requirements: the ``npm`` command, and ``pip install resvg_py``.
"""

import argparse
import io
import logging
from pathlib import Path

import torch
from build_emoji_dataset import encode_picture, fetch, hex_key, plain, read_json, to_svg
from clipcap_hf import CaptionReranker, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.data import load_emoji
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm


logger = logging.getLogger("score_outside_designs")
DESIGNS = {"openmoji": "1.2.29", "emojione": "1.2.3"}
# The penalty on known captions, and the cosine that a new one needs; `None`: without the memory.
SETTINGS = [
    (0.02, None),
    (0.04, None),
    (0.04, 0.0),
    (0.04, 0.55),
    (0.02, 0.6),
    (0.04, 0.6),
    (0.02, 0.62),
    (0.04, 0.62),
]
SETTINGS += [(0.06, 0.62), (0.04, 0.65), (0.06, 0.65)]
BEAMS = 10


def drawings(design: str, captions: dict[str, str], sources: Path) -> tuple[list[Image.Image], list[str]]:
    """Draw a design's emoji, and return their captions."""
    package = fetch(f"@iconify-json/{design}@{DESIGNS[design]}", sources)
    icons, characters = read_json(package, "icons.json"), read_json(package, "chars.json")
    if characters:
        found = {hex_key(code): icon for code, icon in characters.items()}
    else:  # EmojiOne's package knows names only
        names = {plain(icon).replace(" ", ""): icon for icon in sorted(icons["icons"])}
        found = {code: names.get(plain(caption).replace(" ", "")) for code, caption in captions.items()}
    pairs = [(icon, captions[code]) for code, icon in found.items() if icon and code in captions]
    images = [
        Image.open(io.BytesIO(encode_picture(to_svg(icons, icon), quality=75)))
        for icon, _ in tqdm(pairs, desc=design, leave=False)
    ]
    return images, [caption for _, caption in pairs]


def percent(found: list[str], captions: list[str]) -> float:
    return 100 * sum(one == other for one, other in zip(found, captions)) / len(captions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captioner", type=Path, required=True, help="folder with a text tower and its memory")
    parser.add_argument("--sources", type=Path, default=Path.home() / ".cache" / "clipcap_hf" / "icon-sources")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = ClipCapForConditionalGeneration.from_pretrained(args.captioner).eval()
    processor = ClipCapProcessor.from_pretrained(args.captioner)
    train, validation = load_emoji("train"), load_emoji("validation")
    names = [captions[0] for captions in train["captions"]]
    codes = ("-".join(f"{ord(character):x}" for character in emoji) for emoji in train["emoji"])
    untoned = {hex_key(code): name for code, name in zip(codes, names) if "skin tone" not in name}

    def embed(images) -> torch.Tensor:
        return F.normalize(embed_images(model, processor, images), dim=-1)

    known = embed(train["image"])
    splits = {"validation": (embed(validation["image"]), [captions[0] for captions in validation["captions"]])}
    for design in DESIGNS:
        images, captions = drawings(design, untoned, args.sources)
        splits[design] = embed(images), captions
        nearest = [names[row] for row in (splits[design][0] @ known.T).argmax(1).tolist()]
        logger.info("%s, %d drawings: copying %.1f %%", design, len(captions), percent(nearest, captions))

    def score(what: str, rerank: CaptionReranker | None) -> None:
        scores = []
        for split, (embeds, captions) in splits.items():
            found = caption_embeds(model, processor, embeds, num_beams=BEAMS, rerank=rerank, progress=False)
            scores.append(f"{split} {percent(found, captions):.1f} %")
        logger.info("%s: %s", what, ", ".join(scores))

    reranker = CaptionReranker.from_pretrained(model, processor)
    memory = reranker.memory
    score(f"{BEAMS} beams", None)
    for penalty, min_cosine in SETTINGS:
        reranker.seen_penalty, reranker.memory = penalty, None if min_cosine is None else memory
        memory.min_cosine = min_cosine or 0.0
        what = "no memory" if min_cosine is None else f"new captions from a cosine of {min_cosine}"
        score(f"penalty {penalty}, {what}", reranker)


if __name__ == "__main__":
    main()
