"""Fetch further drawings of what the embedded data set names, from open icon sets, to train `emoji-mini` on.

The embedded data set has five designs for training, and a sixth for the test. What a knife looks like in general is
better learned from more designers. An icon is taken if its name, without words for how it is drawn ("outline"), is
the name of an emoji in the training split, or another name that only one emoji has. So a caption that is held out gets
no drawing. Icons of one colour are drawn in a random one, and not taken for captions with a colour or skin tone.

    python examples/embedded/fetch_icons.py --output build/icons.parquet

downloads 22 npm packages at pinned versions (30 MB) and writes a file for `--further` of `train_emoji_tower.py`,
`continue_emoji_tower.py` and `train_emoji_mini.py`: 8,507 drawings of 2,652 captions, in 3 minutes. The icons are not
a part of clipcap_hf; their licences (`SETS`) allow to use and change them, some if their authors are named. Fluent
Emoji's are by the designers of two designs of the data set, so let another design play the unseen one.

Requirements: the ``npm`` command, and ``pip install resvg_py``.
"""

import argparse
import logging
import random
import re
from collections import Counter
from pathlib import Path

from build_emoji_dataset import TONES, encode_picture, fetch, plain, read_json, to_svg
from clipcap_hf.data import load_emoji
from clipcap_hf.files import whole_file
from datasets import Dataset, Features, Image, List, Value
from tqdm import tqdm


logger = logging.getLogger("fetch_icons")

# npm package (of @iconify-json), version, and the licence that its info.json must state.
COLOURED = {
    "fluent-emoji": ("1.2.7", "MIT"),
    "streamline-emojis": ("1.2.4", "CC-BY-4.0"),
    "icon-park": ("1.2.4", "Apache-2.0"),
    "streamline-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-plump-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-flex-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-kameleon-color": ("1.2.2", "CC-BY-4.0"),
}
ONE_COLOUR = {
    "fluent-emoji-high-contrast": ("1.2.6", "MIT"),
    "mdi": ("1.2.3", "Apache-2.0"),
    "fa6-solid": ("1.2.4", "CC-BY-4.0"),
    "game-icons": ("1.2.4", "CC-BY-3.0"),
    "ph": ("1.2.2", "MIT"),
    "tabler": ("1.2.41", "MIT"),
    "fluent": ("1.2.60", "MIT"),
    "material-symbols": ("1.2.98", "Apache-2.0"),
    "lucide-lab": ("1.2.3", "ISC"),
    "lucide": ("1.2.137", "ISC"),
    "hugeicons": ("1.2.35", "MIT"),
    "solar": ("1.2.13", "CC-BY-4.0"),
    "picon": ("1.2.0", "OFL-1.1"),
    "healthicons": ("1.2.13", "MIT"),
    "mingcute": ("1.2.8", "Apache-2.0"),
}
SETS = COLOURED | ONE_COLOUR
WITH_TONES = {"fluent-emoji"}  # its icons are named like "waving-hand-medium-dark"

# Words at the end of an icon's name that say how it is drawn.
DRAWN = set(
    "line linear outline outlined rounded round sharp fill filled solid bold duotone light thin broken".split()
)
DRAWN |= set("regular color flat variant alt".split())
# What a drawing in another colour would not show.
COLOUR_WORDS = set("red orange yellow green blue purple brown black white grey pink light dark tone".split())
COLOUR_WORDS |= set("heart square circle flag moon book".split())
PER_CAPTION = 2  # drawings of a caption from one set, which often are one drawing in two ways


def captions_by_name() -> dict[str, str]:
    """Return the training caption that each name of one emoji alone stands for."""
    references = sorted({tuple(captions) for captions in load_emoji("train")["captions"]})
    others = Counter(plain(name) for captions in references for name in set(captions[1:]))
    names = {plain(name): captions[0] for captions in references for name in captions[1:] if others[plain(name)] == 1}
    return names | {plain(captions[0]): captions[0] for captions in references}


def thing(icon: str, name: str) -> str:
    """Return what an icon of a set shows, by its name."""
    if name in WITH_TONES:
        is_toned = f"{icon} skin tone".endswith(tuple(f"-{tone}" for tone in TONES.values()))
        return plain(f"{icon} skin tone" if is_toned else icon)
    words = icon.split("-")
    while len(words) > 1 and (words[-1] in DRAWN or words[-1].isdecimal()):
        words.pop()
    return plain(" ".join(words))


def drawings(name: str, captions: dict[str, str], sources: Path, generator: random.Random) -> list[tuple[str, str]]:
    """Return the captions of a set's icons and their SVG."""
    version, licence = SETS[name]
    package = fetch(f"@iconify-json/{name}@{version}", sources)
    if (stated := read_json(package, "info.json")["license"]["spdx"]) != licence:
        raise ValueError(f"{name} is under {stated} now, not {licence}: is that an open licence?")
    icons = read_json(package, "icons.json")
    found: list[tuple[str, str]] = []
    per_caption: Counter = Counter()
    for icon in sorted(icons["icons"]):
        caption = captions.get(thing(icon, name))
        if caption is None or per_caption[caption] == PER_CAPTION:
            continue
        if name in ONE_COLOUR and COLOUR_WORDS & set(re.split(r"\W+", caption)):
            continue
        per_caption[caption] += 1
        colour = "#{:02x}{:02x}{:02x}".format(*(generator.randrange(200) for _ in range(3)))
        found.append((caption, to_svg(icons, icon).replace("currentColor", colour)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--sources", type=Path, default=Path.home() / ".cache" / "clipcap_hf" / "icon-sources")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    captions, generator = captions_by_name(), random.Random(0)
    rows: dict[str, list] = {"image": [], "captions": [], "design": []}
    for name in SETS:
        found = drawings(name, captions, args.sources, generator)
        for caption, svg in tqdm(found, desc=name, leave=False):
            rows["image"].append({"bytes": encode_picture(svg, quality=75), "path": None})
            rows["captions"].append([caption])
            rows["design"].append(name)
        logger.info("%s (%s): %d drawings of %d captions", name, SETS[name][1], len(found), len(dict(found)))
    features = Features({"image": Image(), "captions": List(Value("string")), "design": Value("string")})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(args.output) as scratch:
        Dataset.from_dict(rows, features=features).to_parquet(scratch)
    drawn = {caption for (caption,) in rows["captions"]}
    logger.info("%s: %d drawings of %d captions", args.output, len(rows["design"]), len(drawn))


if __name__ == "__main__":
    main()
