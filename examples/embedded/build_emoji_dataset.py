"""Build the emoji captioning data set that ships with ``clipcap_hf``.

The script downloads the emoji artwork and the CLDR names as npm packages at pinned versions, renders every emoji at
128x128 pixels, derives captions in English and Japanese, splits the rows so that word *combinations* (``new_caption``)
or a whole *design* (``new_design``) are unseen in training, and writes parquet files, a dataset card and the licences.

The result depends only on the pinned packages and on the versions of Pillow and resvg: no random numbers are used.

Requirements: the ``npm`` command, and ``pip install datasets pillow resvg_py tqdm``.

Examples
--------
.. code-block:: bash

    python examples/embedded/build_emoji_dataset.py --output build/emoji
    python examples/embedded/build_emoji_dataset.py --sources downloads --output build/emoji --workers 2
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import datasets
import resvg_py
from PIL import Image
from tqdm import tqdm


logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[2] / "clipcap_hf" / "assets" / "emoji"

NAMES_PACKAGE = "emojibase-data@17.0.0"
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
HELD_OUT_DESIGN = "twemoji"
TRAIN_DESIGNS = [design for design in PACKAGES if design != HELD_OUT_DESIGN]
SPLITS = ["train", "validation", "new_design", "new_caption"]

# What each package states in its package.json.
DESIGN_LICENCES = {
    "noto": "Apache-2.0",
    "noto-v1": "Apache-2.0",
    "fxemoji": "Apache-2.0",
    "fluent-flat": "MIT",
    "fluent-3d": "MIT",
    "twemoji": "CC-BY-4.0",
}
MIT_HOLDERS = {
    "microsoft-fluent-emoji": "Copyright (c) Microsoft Corporation.",
    "lobehub-fluent-emoji": "Copyright (c) 2023 LobeHub",
}

# Shares of the man/woman families and of the remaining skin-tone concepts whose members are held out.
GENDER_SHARES = {"new_caption": 0.20, "validation": 0.06}
TONE_SHARES = {"new_caption": 0.25, "validation": 0.06}
HELD_OUT_TONES = 2

SIZE = 128
TONES = {
    1: "light skin tone",
    2: "medium-light skin tone",
    3: "medium skin tone",
    4: "medium-dark skin tone",
    5: "dark skin tone",
}
# emojibase group numbers: smileys, people, and the components that are left out.
GROUP_SMILEYS, GROUP_PEOPLE, GROUP_COMPONENTS = 0, 1, 2
SHORTCODE_SETS = ["emojibase", "iamcal", "github", "joypixels", "cldr"]
# Words that make a formal Unicode character name technical or misleading: "white" means drawn as an outline.
FORMAL_WORDS = {"black", "white", "medium", "negative", "squared", "circled", "ideograph", "katakana", "cjk", "emoji"}
FORMAL_WORDS |= {"pointing", "pistol", "upwards", "downwards", "leftwards", "rightwards", "anticlockwise", "clockwise"}
FORMAL_WORDS |= {"oclock", "mens", "womens", "tile"}
SHORT_WORDS = {"a", "of", "on", "in", "up", "to", "no", "ok", "tv", "at", "by"}

# Two designs are published without a table of characters and are matched by name. These are pictures that they hold
# under names of their own.
OWN_NAMES = {
    "noto-v1": {
        "flag: China": "flag-for-china",
        "flag: France": "flag-for-france",
        "flag: Germany": "flag-for-germany",
        "flag: Italy": "flag-for-italy",
        "flag: Japan": "flag-for-japan",
        "flag: Russia": "flag-for-russia",
        "flag: South Korea": "flag-for-south-korea",
        "flag: Spain": "flag-for-spain",
        "flag: United Kingdom": "flag-for-united-kingdom",
        "flag: United States": "flag-for-united-states",
        "keycap: #": "keycap-pound",
        "keycap: *": "keycap-asterisk",
        "UP! button": "up-exclamation-button",
    },
    "fxemoji": {
        "flag: China": "chineseflag",
        "flag: France": "franceflag",
        "flag: Italy": "italianflag",
        "flag: Japan": "japanflag",
        "flag: Russia": "russianflag",
        "flag: South Korea": "koreaflag",
        "flag: Spain": "spanishflag",
        "flag: United Kingdom": "greatbritainflag",
        "cat face": "cat",
        "cat": "catside",
        "dog face": "dog",
        "dog": "dogside",
        "mouse face": "mouse",
        "mouse": "mouseside",
        "pig face": "pig",
        "pig": "pigside",
        "tiger face": "tiger",
        "tiger": "tigerside",
    },
}
# The same name stands for another picture in these older sets, or the picture cannot be recognised on white. Found by
# looking at every match by name next to the picture of noto.
WRONG_PICTURES = {
    "noto-v1": {"cricket", "men with bunny ears", "water pistol"},
    "fxemoji": {
        "construction",
        "cricket",
        "fog",
        "game die",
        "keyboard",
        "kiss",
        "laptop",
        "light rail",
        "sunglasses",
        "tram car",
        "water pistol",
        "window",
    },
}
# Microsoft said that it could not open its 3D drawings of these, which show trademarks such as Clippy.
NOT_OPEN = {"paperclip", "video game", "technologist", "man technologist", "woman technologist"}
# Shortcodes made of ordinary words that are slang or keywords rather than names.
NOT_NAMES = {
    *("accept", "airplane arriving", "airplane small", "arrow double down", "arrow double up", "arrow down small"),
    *("arrow forward", "arrow left hook", "arrow right hook", "arrow up small", "bamboo", "basketball man"),
    *("basketball woman", "blond haired", "blue car", "business suit levitating", "calendar spiral", "city dusk"),
    *("city sunrise", "closed lock with key", "cloud tornado", "cloudy", "clubs", "cold sweat", "compression"),
    *("controller", "cricket bat ball", "curly haired", "date", "disappointed relieved", "dizzy eyes", "double helix"),
    *("down", "earth africa", "earth americas", "earth asia", "earth europe", "face palm", "feet", "first place"),
    *("fist oncoming", "fist raised", "flag black", "flag white", "flags", "flipper", "frame photo", "gift heart"),
    *("golf", "grey exclamation", "grey question", "hearts", "high brightness", "hourglass flowing sand"),
    *("ideograph advantage", "kissing heart", "knocked out", "lock", "loud sound", "low brightness"),
    *("lower left ballpoint pen", "lower left crayon", "lower left fountain pen", "lower left paintbrush"),
    *("man with chinese cap", "man wrestling", "medal military", "medal sports", "mouse three button", "mute"),
    *("nail care", "newspaper roll", "no good", "no good man", "no good woman", "no mouth", "no sound"),
    *("notepad spiral", "octagonal sign", "ok woman", "parking", "pen ballpoint", "pen fountain", "point down"),
    *("point forward", "point left", "point right", "pour", "quiet sound", "recycle", "red haired", "repeat one"),
    *("rewind", "rice scene", "roll eyes", "sassy man", "sassy woman", "scream cat", "second place"),
    *("sleeping accommodation", "sleeping bed", "smile cat", "smiley cat", "smirk cat", "smoking", "sound", "stars"),
    *("stuck out tongue", "stuck out tongue closed eyes", "stuck out tongue winking eye", "sunglasses cool"),
    *("sweat smile", "third place", "thunder cloud rain", "tornado cloud", "track previous", "underage", "unlock"),
    *("weight lifting", "weight lifting man", "weight lifting woman", "white check mark", "white frowning face"),
    *("white haired", "white sun cloud", "white sun rain cloud", "white sun small cloud", "woman wrestling"),
    *("abcd", "bangbang", "busstop", "capital abcd", "disco", "fuelpump", "hotsprings", "koko", "moneybag"),
    *("permanent paper sign", "tada", "tophat", "woman with bunny ears"),
}

TWEMOJI_NOTICE = """\
Twemoji graphics

Copyright Twitter, Inc. and other contributors (https://github.com/jdecked/twemoji).
Licensed under the Creative Commons Attribution 4.0 International licence (CC-BY-4.0):
https://creativecommons.org/licenses/by/4.0/legalcode

Changes: the vector graphics, as packed in @iconify-json/twemoji, were rendered at 128x128 pixels on a white background
and compressed as WebP. They are found in the rows whose "design" is "twemoji".
"""

CARD = """\
---
language:
- en
- ja
license:
- apache-2.0
- mit
- cc-by-4.0
pretty_name: Emoji captions
size_categories:
- 10K<n<100K
task_categories:
- image-to-text
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
  - split: new_design
    path: new_design.parquet
  - split: new_caption
    path: new_caption.parquet
---

# Emoji captions

A small image captioning data set: {rows} pictures of {concepts} emoji in six designs, with names in English and
Japanese. Use it to try, teach and test captioning models. It answers two questions more cleanly than a larger data
set: does a model describe known things in an unknown *design*, and does it find *captions* that it has never read,
made of words that it knows?

```python
from clipcap_hf.data import load_emoji

emoji = load_emoji()  # English
emoji_ja = load_emoji("new_caption", language="ja")
```

## Columns

| column | type | content |
|---|---|---|
| `image` | image | 128x128 pixels, RGB, on white |
| `captions` | list of strings | the CLDR name in lower case, then alternative names |
| `captions_ja` | list of strings | the Japanese CLDR name (Japanese has no alternative names) |
| `keywords`, `keywords_ja` | list of strings | CLDR keywords; a skin-tone variant has those of its base emoji |
| `name` | string | the English CLDR name as CLDR writes it |
| `emoji` | string | the characters |
| `design` | string | `noto`, `noto-v1`, `fxemoji`, `fluent-flat`, `fluent-3d` or `twemoji` |
| `split` | string | the name of the split |

{several} of the {concepts} emoji have two or more English references. Apart from the CLDR name they come from the chat
shortcodes (emojibase, iamcal, GitHub, JoyPixels, CLDR) and the formal Unicode character names, as far as these are
readable names of one emoji; skin-tone variants and flags also have the CLDR name reworded without its colon ("woman
farmer with light skin tone", "flag of japan").

## Splits

| design | train | validation | new_design | new_caption |
|---|---:|---:|---:|---:|
{counts}

- `new_caption` holds combinations of words that never occur together in `train`. For about 20 % of the activities and
  roles that have both a man and a woman variant, one of the two is held out with all its skin tones; for about 25 % of
  the other emoji with skin tones, two of the five tones are held out. Every word of every held-out caption (first
  English reference) occurs in the captions of `train`, and no held-out caption occurs among the references of `train`.
- `validation` holds out another 6 % of both kinds by the same rules.
- `new_design` shows the design `twemoji`, which `train` does not contain, under captions that `train` does contain.
  {held_out} Twemoji are left out because their caption is held out, and {undrawn} because no training design has them.
- `train` is the rest of the five other designs.

The choice depends on a hash of the names only.

## How it was built

`examples/embedded/build_emoji_dataset.py` in the `clipcap_hf` repository builds every file of this folder from npm
packages at pinned versions. SVG is rendered with resvg, 3D pictures are reduced from 256x256 pixels with a Lanczos
filter, and all are stored as WebP of quality {quality}. Base emoji, gender variants and variants with one skin tone
are included; couples with two different tones, regional indicators and components are not. Twemoji has base emoji
only.

Pictures of `noto-v1` and `fxemoji` are matched by name. All matches without skin tone were compared with `noto`
by eye, and the script excludes the wrong ones by name. The older designs draw some gender-neutral emoji as a man or as
a woman.

The 3D package also holds drawings that are not part of Microsoft's MIT-licensed Fluent Emoji (country flags, most
couples and families). Only emoji that the flat set contains, which is taken from that repository, are used, and the
ones that Microsoft said it could not open are left out (paperclip, video game, technologists). Country flags are
therefore few: those of ten countries in `noto-v1`, some of them in `fxemoji`, and these ten in `twemoji`.

## Licences

| rows or columns | source | licence |
|---|---|---|
| `noto` | Noto Emoji, Google (@iconify-json/noto 1.2.9) | Apache-2.0 |
| `noto-v1` | Noto Emoji (v1), Google (@iconify-json/noto-v1 1.2.5) | Apache-2.0 |
| `fxemoji` | Firefox OS Emoji, Mozilla (@iconify-json/fxemoji 1.2.2) | Apache-2.0 |
| `fluent-flat` | Fluent Emoji, Microsoft (@iconify-json/fluent-emoji-flat 1.2.6) | MIT |
| `fluent-3d` | Fluent Emoji, Microsoft, packed by LobeHub (@lobehub/fluent-emoji-3d 1.1.0) | MIT |
| `twemoji` | Twemoji, Twitter and contributors (@iconify-json/twemoji 1.2.5) | CC-BY-4.0 |
| names and keywords | emojibase-data 17.0.0, Miles Johnson | MIT |
| names and keywords | CLDR and Unicode Character Database, Unicode, Inc. | Unicode-3.0 |

All pictures were changed: they were rasterised or reduced, put on white, and compressed. The texts and notices are in
`LICENSES/`.
"""


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")

    names = fetch(NAMES_PACKAGE, args.sources)
    packages = {design: fetch(package, args.sources) for design, package in PACKAGES.items()}

    concepts = read_concepts(names)
    pictures = match_pictures(concepts, packages, names)
    rows, left_out = plan_rows(concepts, pictures, hold_out(concepts))
    check_splits(rows)

    encode = partial(encode_picture, quality=args.quality)
    with Pool(args.workers) as pool:
        images = list(tqdm(pool.imap(encode, [row["picture"] for row in rows], chunksize=64), total=len(rows)))
    write_parquet(rows, images, args.output)
    write_licences(packages, names, args.output)
    write_card(rows, left_out, args.quality, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder to write to (default: %(default)s)")
    parser.add_argument(
        "--sources",
        type=Path,
        default=Path.home() / ".cache" / "clipcap_hf" / "emoji-sources",
        help="folder that keeps the npm packages; what is already there, packed or unpacked, is not downloaded again",
    )
    parser.add_argument("--quality", type=int, default=75, help="WebP quality (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="number of rendering processes (default: %(default)s)")
    return parser.parse_args()


# --- Sources -----------------------------------------------------------------------------------------------------


def fetch(package: str, sources: Path) -> Path:
    """Return the unpacked folder of an npm package, downloading and unpacking it when needed."""
    name, version = package.rsplit("@", 1)
    stem = f"{name.lstrip('@').replace('/', '-')}-{version}"
    folder = sources / stem
    if not (folder / "package" / "package.json").exists():
        archive = sources / f"{stem}.tgz"
        if not archive.exists():
            logger.info("Downloading %s", package)
            sources.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", package, "--pack-destination", str(sources), "--silent"], check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"


def read_json(package: Path, name: str):
    return json.loads((package / name).read_text(encoding="utf-8"))


# --- Names -------------------------------------------------------------------------------------------------------


@dataclass
class Concept:
    """One emoji, a skin-tone variant being a concept of its own."""

    hexcode: str
    emoji: str
    label: str
    label_ja: str
    keywords: list[str]
    keywords_ja: list[str]
    base_label: str
    group: int
    tone: int | None = None
    references: list[str] = field(default_factory=list)


def read_concepts(package: Path) -> list[Concept]:
    """Read the base emoji and their single-tone variants, in emojibase order."""
    japanese = {}
    for entry in read_json(package, "ja/data.json"):
        for variant in [entry, *entry.get("skins", [])]:
            japanese[variant["hexcode"]] = variant

    concepts = []
    # Regional indicators carry no group.
    english = read_json(package, "en/data.json")
    bases = [entry for entry in english if entry.get("group", GROUP_COMPONENTS) != GROUP_COMPONENTS]
    alternatives = alternative_names(package, bases)
    for entry in bases:
        # A couple with two different tones carries a list instead of a number.
        toned = [skin for skin in entry.get("skins", []) if isinstance(skin.get("tone"), int)]
        for variant in [entry, *toned]:
            tone = variant.get("tone") if variant is not entry else None
            suffix = f": {TONES[tone]}" if tone else ""
            references = [variant["label"].lower()]
            references += [f"{name}{suffix}" for name in alternatives[entry["hexcode"]]]
            references += rewordings(variant["label"].lower())
            concepts.append(
                Concept(
                    hexcode=variant["hexcode"],
                    emoji=variant["emoji"],
                    label=variant["label"],
                    label_ja=japanese[variant["hexcode"]]["label"],
                    keywords=entry.get("tags", []),
                    keywords_ja=japanese[entry["hexcode"]].get("tags", []),
                    base_label=entry["label"],
                    group=entry["group"],
                    tone=tone,
                    references=references,
                )
            )
    return concepts


def alternative_names(package: Path, bases: list[dict]) -> dict[str, list[str]]:
    """Turn the chat shortcodes of every emoji into readable alternative names."""
    shortcode_sets = [read_json(package, f"en/shortcodes/{name}.json") for name in SHORTCODE_SETS]
    labels = {plain(entry["label"]) for entry in bases}
    unicode_names = read_json(package, "meta/unicode-names.json")
    # Words of real names only: this drops codes such as "jp", abbreviations and misspellings. The tags of flags are
    # country codes.
    texts = [*unicode_names.values(), *(entry["label"] for entry in bases)]
    texts += [tag for entry in bases if not entry["label"].startswith("flag:") for tag in entry.get("tags", [])]
    vocabulary = {word for text in texts for word in plain(text).split() if len(word) > 2 or word in SHORT_WORDS}

    candidates: dict[str, list[str]] = {}
    for entry in bases:
        names: dict[str, None] = {}
        for shortcodes in shortcode_sets:
            codes = shortcodes.get(entry["hexcode"], [])
            for code in [codes] if isinstance(codes, str) else codes:
                name = re.sub(r"[_-]+", " ", code).strip()
                if is_full_name(name, entry, vocabulary) and plain(name) not in labels:
                    names[name] = None
        # The formal character name of a sequence only lists its parts.
        codepoint = entry["hexcode"].replace("-FE0F", "")
        formal = plain(unicode_names.get(codepoint, "")) if "-" not in codepoint else ""
        is_plain = len(formal.split()) > 1 and not FORMAL_WORDS & set(formal.split())
        if is_plain and is_full_name(formal, entry, vocabulary) and formal not in labels:
            names[formal] = None
        candidates[entry["hexcode"]] = list(names)
    # A name that two emoji share says nothing about which one is shown.
    uses = Counter(name for names in candidates.values() for name in names)
    return {hexcode: [name for name in names if uses[name] == 1] for hexcode, names in candidates.items()}


def rewordings(label: str) -> list[str]:
    """Write the labels that use a colon as plain phrases."""
    if match := re.fullmatch(r"([^:,]+): ([a-z-]+ skin tone)", label):
        return [f"{match[1]} with {match[2]}"]
    if match := re.fullmatch(r"flag: (.+)", label):
        return [f"flag of {match[1]}"]
    return []


def is_full_name(name: str, entry: dict, vocabulary: set[str]) -> bool:
    words = name.split()
    label_words = plain(entry["label"]).split()
    if entry["label"].startswith("flag:") or not words or not all(word in vocabulary for word in words):
        return False
    if name in NOT_NAMES or re.search(r"\d|\bpointing\b", name):
        return False
    # A part of the label, such as "rolling eyes", is a keyword rather than a name; so is a single word for a person,
    # a hand or a face ("relieved", "clap").
    if set(words) < set(label_words):
        return False
    return len(words) > 1 or (entry["group"] not in (GROUP_SMILEYS, GROUP_PEOPLE) and len(name) > 3)


def plain(text: str) -> str:
    """Lower-case words without accents and punctuation."""
    text = unicodedata.normalize("NFKD", text.lower().replace("’", ""))
    text = "".join(char for char in text if not unicodedata.combining(char))
    return " ".join(re.findall(r"[a-z0-9]+", text))


# --- Splits ------------------------------------------------------------------------------------------------------


def hold_out(concepts: list[Concept]) -> dict[str, str]:
    """Choose the split of every held-out label; the labels that are not returned belong to train.

    First, one gender of some man/woman families is held out with all its skin tones. Then two of the five skin tones
    of some of the other concepts are held out.
    """
    variants: dict[str, list[Concept]] = {}
    for concept in concepts:
        variants.setdefault(concept.base_label, []).append(concept)

    splits = {}
    families = gender_families(variants)
    for family, share in families.items():
        split = pick_split(f"gender/{family}", GENDER_SHARES)
        if split:
            held_out = sorted(share)[int(stable_fraction(f"which/{family}") * len(share))]
            splits.update({concept.label: split for concept in variants[held_out]})
    # Both members of a touched family are left alone from here on, so that the words stay in train.
    touched = {label for members in families.values() if splits.keys() & set(members) for label in members}
    for label, members in variants.items():
        split = pick_split(f"tone/{label}", TONE_SHARES)
        if split and label not in touched and len(members) == 1 + len(TONES):
            toned = sorted(members[1:], key=lambda concept: stable_fraction(f"tone/{concept.label}"))
            splits.update({concept.label: split for concept in toned[:HELD_OUT_TONES]})
    return splits


def gender_families(variants: Iterable[str]) -> dict[str, list[str]]:
    """Group the labels that differ only in "man"/"woman" (or "men"/"women") at the start."""
    families: dict[str, list[str]] = {}
    for label in variants:
        match = re.fullmatch(r"(?:wo)?m[ae]n\b(.+)", label)
        if match:
            families.setdefault(match[1].strip(": "), []).append(label)
    return {family: labels for family, labels in families.items() if len(labels) == 2}


def pick_split(key: str, shares: dict[str, float]) -> str | None:
    fraction = stable_fraction(key)
    for split, share in shares.items():
        if fraction < share:
            return split
        fraction -= share
    return None


def stable_fraction(key: str) -> float:
    """Map a text to [0, 1), always in the same way."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def check_splits(rows: list[dict]) -> None:
    """Fail unless the held-out captions are new combinations of words that train does contain."""
    captions = {split: {row["captions"][0] for row in rows if row["split"] == split} for split in SPLITS}
    references = {caption for row in rows if row["split"] == "train" for caption in row["captions"]}
    words = {word for row in rows if row["split"] == "train" for word in plain(row["captions"][0]).split()}
    for split in ("new_caption", "validation"):
        if seen := captions[split] & references:
            raise ValueError(f"Captions of '{split}' occur in train: {sorted(seen)}")
        if missing := {word for caption in captions[split] for word in plain(caption).split()} - words:
            raise ValueError(f"Words of '{split}' do not occur in train: {sorted(missing)}")
    if both := captions["new_caption"] & captions["validation"]:
        raise ValueError(f"Captions are in 'new_caption' and in 'validation': {sorted(both)}")
    if unseen := captions["new_design"] - captions["train"]:
        raise ValueError(f"Captions of 'new_design' do not occur in train: {sorted(unseen)}")


# --- Pictures ----------------------------------------------------------------------------------------------------


def match_pictures(
    concepts: list[Concept], packages: dict[str, Path], names: Path
) -> dict[str, dict[str, str | Path]]:
    """Find the picture of every concept in every design: a path to a file, or the text of an SVG."""
    unicode_names = read_json(names, "meta/unicode-names.json")
    pictures: dict[str, dict[str, str | Path]] = {}
    for design in PACKAGES:
        if design == "fluent-3d":
            files = {hex_key(path.stem): path for path in (packages[design] / "assets").glob("*.webp")}
            # The package also holds drawings that are not part of the MIT-licensed Fluent repository (such as country
            # flags). The flat set is taken from that repository, so its emoji tell which ones are.
            found = {
                concept.label: files[hex_key(concept.hexcode)]
                for concept in concepts
                if concept.label in pictures["fluent-flat"]
                and hex_key(concept.hexcode) in files
                and concept.base_label not in NOT_OPEN
            }
        else:
            icons = read_json(packages[design], "icons.json")
            characters = {hex_key(code): icon for code, icon in read_json(packages[design], "chars.json").items()}
            known = icons["icons"].keys() | icons.get("aliases", {}).keys()
            # The names in fxemoji are written without separators.
            by_name = {name.replace("-", ""): name for name in sorted(known)}
            found = {}
            for concept in concepts:
                icon = characters.get(hex_key(concept.hexcode))
                if icon is None and concept.label not in WRONG_PICTURES.get(design, set()):
                    own_names = OWN_NAMES.get(design, {})
                    icon = own_names.get(concept.label) or match_by_name(concept, by_name, unicode_names)
                if icon is not None:
                    found[concept.label] = to_svg(icons, icon)
        pictures[design] = found
    return pictures


def match_by_name(concept: Concept, by_name: dict[str, str], unicode_names: dict[str, str]) -> str | None:
    # The older sets know an emoji by its CLDR name or by its Unicode character name.
    for name in (concept.label, unicode_names.get(concept.hexcode.replace("-FE0F", ""), "")):
        icon = by_name.get(plain(name.replace("'", "")).replace(" ", ""))
        # Signs are lost in the comparison: "keycap: #" must not become a plain "keycap".
        if icon and not re.search(r"[#*!]", name):
            return icon
    return None


def hex_key(hexcode: str) -> str:
    """Drop the variation selectors, which the sources write or leave out."""
    return hexcode.lower().replace("-fe0f", "")


def to_svg(icons: dict, name: str) -> str:
    """Write an Iconify icon as SVG, following aliases and their horizontal flips."""
    flip = False
    while name in icons.get("aliases", {}):
        alias = icons["aliases"][name]
        if unknown := alias.keys() - {"parent", "hFlip", "hidden"}:
            raise ValueError(f"Icon '{name}' uses unsupported properties: {sorted(unknown)}")
        flip ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = f'<g transform="translate({width} 0) scale(-1 1)">{icon["body"]}</g>' if flip else icon["body"]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}">{body}</svg>'
    )


def encode_picture(picture: str | Path, quality: int) -> bytes:
    """Render a picture on white and compress it as WebP."""
    if isinstance(picture, Path):
        image = Image.open(picture).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    else:
        png = resvg_py.svg_to_bytes(
            svg_string=picture, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
        )
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if image.size != (SIZE, SIZE):
        raise ValueError(f"Expected a picture of {SIZE}x{SIZE} pixels, got {image.size}")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


# --- Output ------------------------------------------------------------------------------------------------------


def plan_rows(
    concepts: list[Concept], pictures: dict[str, dict[str, str | Path]], splits: dict[str, str]
) -> tuple[list[dict], Counter]:
    """List the rows of all splits, and count the pictures of the held-out design that are not used."""
    drawn_for_train = {label for design in TRAIN_DESIGNS for label in pictures[design] if label not in splits}
    rows, left_out = [], Counter()
    for design in PACKAGES:
        for concept in concepts:
            if concept.label not in pictures[design]:
                continue
            split = splits.get(concept.label, "train")
            if design == HELD_OUT_DESIGN:
                if concept.tone is not None:
                    continue
                if split != "train":
                    left_out["caption held out"] += 1
                    continue
                if concept.label not in drawn_for_train:
                    left_out["caption in no training design"] += 1
                    continue
                split = "new_design"
            rows.append(
                {
                    "captions": concept.references,
                    "captions_ja": [concept.label_ja],
                    "keywords": concept.keywords,
                    "keywords_ja": concept.keywords_ja,
                    "name": concept.label,
                    "emoji": concept.emoji,
                    "design": design,
                    "split": split,
                    "picture": pictures[design][concept.label],
                }
            )
    return rows, left_out


def write_parquet(rows: list[dict], images: list[bytes], output: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "captions_ja": datasets.List(datasets.Value("string")),
            "keywords": datasets.List(datasets.Value("string")),
            "keywords_ja": datasets.List(datasets.Value("string")),
            "name": datasets.Value("string"),
            "emoji": datasets.Value("string"),
            "design": datasets.Value("string"),
            "split": datasets.Value("string"),
        }
    )
    output.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        columns = {name: [row[name] for row in rows if row["split"] == split] for name in features if name != "image"}
        columns["image"] = [
            {"bytes": image, "path": None} for row, image in zip(rows, images) if row["split"] == split
        ]
        path = output / f"{split}.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        logger.info("%s: %d rows, %.2f MB", path, len(columns["name"]), path.stat().st_size / 1e6)


def write_licences(packages: dict[str, Path], names: Path, output: Path) -> None:
    """Write the licence texts and an attribution notice for every source."""
    folder = output / "LICENSES"
    folder.mkdir(parents=True, exist_ok=True)
    # The packages of artwork only name their licences. These two texts are kept in the repository.
    for name in ("Apache-2.0.txt", "Unicode-3.0.txt"):
        (folder / name).write_bytes((ASSETS / "LICENSES" / name).read_bytes())
    mit = (names / "LICENSE").read_text(encoding="utf-8")
    (folder / "MIT-emojibase.txt").write_text(mit, encoding="utf-8")
    for name, holder in MIT_HOLDERS.items():
        text = re.sub(r"^Copyright .*$", holder, mit, count=1, flags=re.MULTILINE)
        (folder / f"MIT-{name}.txt").write_text(text, encoding="utf-8")
    (folder / "CC-BY-4.0-twemoji.txt").write_text(TWEMOJI_NOTICE, encoding="utf-8")

    # A changed licence must be looked at by a person before a new version is shipped.
    for design, package in packages.items():
        stated = read_json(package, "package.json")["license"]
        if stated != DESIGN_LICENCES[design]:
            raise ValueError(f"{PACKAGES[design]} is licensed under {stated}, not {DESIGN_LICENCES[design]}")


def write_card(rows: list[dict], left_out: Counter, quality: int, output: Path) -> None:
    """Fill the numbers into the dataset card."""
    counts = Counter((row["design"], row["split"]) for row in rows)
    lines = []
    for design in PACKAGES:
        cells = " | ".join(f"{counts[design, split]:,}" for split in SPLITS)
        lines.append(f"| `{design}` | {cells} |")
    totals = " | ".join(f"**{sum(row['split'] == split for row in rows):,}**" for split in SPLITS)
    lines.append(f"| **all** | {totals} |")
    captions = {split: len({row["captions"][0] for row in rows if row["split"] == split}) for split in SPLITS}
    lines.append("| different captions | " + " | ".join(f"{captions[split]:,}" for split in SPLITS) + " |")

    concepts = {row["name"]: row["captions"] for row in rows}
    several = sum(len(references) > 1 for references in concepts.values())
    card = CARD.replace("{counts}", "\n".join(lines))
    card = card.replace("{rows}", f"{len(rows):,}").replace("{concepts}", f"{len(concepts):,}")
    card = card.replace("{several}", f"{several:,}").replace("{quality}", str(quality))
    card = card.replace("{held_out}", str(left_out["caption held out"]))
    card = card.replace("{undrawn}", str(left_out["caption in no training design"]))
    (output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
