import io
import os
import re
import subprocess
import sys
from importlib.resources import files

import datasets
import pytest
from clipcap_hf.data import load_emoji
from PIL import Image


SPLITS = ["train", "validation", "new_design", "new_caption"]
TRAIN_DESIGNS = {"noto", "noto-v1", "fxemoji", "fluent-flat", "fluent-3d"}
ASSETS = files("clipcap_hf") / "assets" / "emoji"


@pytest.fixture(scope="module")
def emoji():
    return load_emoji()


@pytest.fixture(scope="module")
def emoji_ja():
    return load_emoji(language="ja")


@pytest.fixture(scope="module")
def card():
    return (ASSETS / "README.md").read_text(encoding="utf-8")


def first_captions(dataset):
    return {captions[0] for captions in dataset["captions"]}


def words(captions):
    return {word for caption in captions for word in re.findall(r"[^\W_]+", caption)}


@pytest.mark.parametrize("language", ["en", "ja"])
def test_features(emoji, emoji_ja, language):
    dataset_dict = emoji if language == "en" else emoji_ja
    text = datasets.Value("string")
    assert list(dataset_dict) == SPLITS
    for split, dataset in dataset_dict.items():
        assert dataset.features == datasets.Features(
            {
                "image": datasets.Image(),
                "captions": datasets.List(text),
                "keywords": datasets.List(text),
                "name": text,
                "emoji": text,
                "design": text,
                "split": text,
            }
        )
        assert set(dataset["split"]) == {split}
        assert dataset.split == split


def test_single_split_equals_part_of_all(emoji):
    dataset = load_emoji("validation")
    assert isinstance(dataset, datasets.Dataset)
    assert dataset["captions"][:] == emoji["validation"]["captions"][:]
    assert dataset["name"][:] == emoji["validation"]["name"][:]


def test_counts_match_card(emoji, card):
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", card, flags=re.MULTILINE)
    assert {row[0] for row in rows} == TRAIN_DESIGNS | {"twemoji"}
    for split, dataset in emoji.items():
        designs = list(dataset["design"])
        for row in rows:
            assert designs.count(row[0]) == int(row[1 + SPLITS.index(split)].replace(",", "")), (split, row[0])
        assert f"{len(dataset):,} rows" in load_emoji.__doc__


def test_every_row_has_text(emoji, emoji_ja):
    for split in SPLITS:
        english, japanese = emoji[split], emoji_ja[split]
        assert english["name"][:] == japanese["name"][:]
        for name, captions, captions_ja in zip(english["name"], english["captions"], japanese["captions"]):
            assert captions[0] == name.lower()
            assert captions == list(dict.fromkeys(captions)) == [caption.lower().strip() for caption in captions]
            assert captions_ja and all(captions_ja)
            assert captions_ja[0] != name


def test_known_rows(emoji, emoji_ja):
    index = list(emoji["train"]["name"]).index("woman farmer: dark skin tone")
    row, row_ja = emoji["train"][index], emoji_ja["train"][index]
    assert row["emoji"] == row_ja["emoji"] == "\U0001f469\U0001f3ff\u200d\U0001f33e"
    assert row["captions"] == [
        "woman farmer: dark skin tone",
        "female farmer: dark skin tone",
        "woman farmer with dark skin tone",
    ]
    assert "農" in row_ja["captions"][0]
    assert "rancher" in row["keywords"]


def test_half_of_the_concepts_have_several_references(emoji):
    references = {}
    for dataset in emoji.values():
        references.update(zip(dataset["name"], dataset["captions"]))
    assert sum(len(captions) > 1 for captions in references.values()) >= len(references) / 2


@pytest.mark.parametrize("split", ["validation", "new_caption"])
def test_held_out_captions_are_new_combinations(emoji, split):
    held_out, train = first_captions(emoji[split]), first_captions(emoji["train"])
    references = {caption for captions in emoji["train"]["captions"] for caption in captions}
    assert held_out and not held_out & references
    assert words(held_out) <= words(train)
    assert set(emoji[split]["design"]) <= TRAIN_DESIGNS


def test_held_out_splits_are_disjoint(emoji):
    assert not first_captions(emoji["validation"]) & first_captions(emoji["new_caption"])


def test_new_design_is_held_out_with_known_captions(emoji):
    assert set(emoji["new_design"]["design"]) == {"twemoji"}
    assert set(emoji["train"]["design"]) == TRAIN_DESIGNS
    assert first_captions(emoji["new_design"]) <= first_captions(emoji["train"])


def test_no_picture_is_shown_twice_for_a_name(emoji):
    for dataset in emoji.values():
        pairs = list(zip(dataset["design"], dataset["name"]))
        assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("split", SPLITS)
def test_images_decode(emoji, split):
    dataset = emoji[split]
    for image in dataset[:: max(len(dataset) // 100, 1)]["image"]:
        assert image.mode == "RGB" and image.size == (128, 128)
        image.load()
    # Every file is a WebP picture with something on it, in a size that only reading its header tells.
    for value in dataset.with_format("arrow")["image"].to_pylist()[::5]:
        with Image.open(io.BytesIO(value["bytes"])) as image:
            assert image.format == "WEBP" and image.size == (128, 128)


@pytest.mark.parametrize("design", sorted(TRAIN_DESIGNS))
def test_images_are_not_blank(emoji, design):
    dataset = emoji["train"]
    indices = [index for index, value in enumerate(dataset["design"]) if value == design]
    for image in dataset.select(indices[:: len(indices) // 40])["image"]:
        low, high = image.convert("L").getextrema()
        assert high - low > 20


def test_licence_files_are_shipped(card):
    names = {path.name for path in (ASSETS / "LICENSES").iterdir()}
    assert {"Apache-2.0.txt", "CC-BY-4.0-twemoji.txt", "MIT-emojibase.txt", "Unicode-3.0.txt"} <= names
    assert {"MIT-lobehub-fluent-emoji.txt", "MIT-microsoft-fluent-emoji.txt"} <= names
    assert "Twitter" in (ASSETS / "LICENSES" / "CC-BY-4.0-twemoji.txt").read_text(encoding="utf-8")
    for licence in ("apache-2.0", "mit", "cc-by-4.0"):
        assert f"\n- {licence}\n" in card.split("\n---\n")[0] + "\n"


@pytest.mark.parametrize("split", ["test", "", "Train"])
def test_unknown_split(split):
    with pytest.raises(ValueError, match="'train', 'validation', 'new_design', 'new_caption'"):
        load_emoji(split)


@pytest.mark.parametrize("language", ["fr", "", None])
def test_unknown_language(language):
    with pytest.raises(ValueError, match="'en', 'ja'"):
        load_emoji(language=language)


def test_import_is_lazy_and_loading_is_offline(tmp_path):
    # The parent package is imported first, so that only the imports of this module are checked.
    code = """
import os, sys
import clipcap_hf
imported = sys.modules.pop("datasets", None)
sys.modules["datasets"] = None
from clipcap_hf.data import load_emoji
del sys.modules["datasets"]
if imported:
    sys.modules["datasets"] = imported
load_emoji("validation")[0]
print(os.listdir(os.environ["HF_HOME"]))
"""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
