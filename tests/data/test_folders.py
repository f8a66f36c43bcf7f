"""Folders of images: the images that are read, their splits and captions, warnings and errors."""

import json
import os

import pytest
from clipcap_hf.data import load_captions
from PIL import Image


@pytest.fixture
def make(tmp_path):
    """`make({"a.jpg": None, "metadata.csv": "..."})` writes images (None) and text files, and returns the folder."""

    def make(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                Image.new("RGB", (4, 4)).save(path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path

    return make


def lines(*pairs):
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in pairs)


def captions_by_id(data):
    return {split: dict(zip(rows["image_id"], rows["captions"])) for split, rows in data.items()}


@pytest.mark.parametrize(
    "names",
    [
        ["train.jpg", "test_1.jpg", "valid-2.jpg", "a.jpg"],
        ["my train set/1.jpg", "test-drive/2.jpg", "3.jpg"],
        ["photos/train/1.jpg", "photos/test/2.jpg", "photos/3.jpg"],
        ["validation-of-tickets.jpg", "eval.jpg", "dev.jpg"],
    ],
)
def test_names_do_not_decide_which_images_exist(make, names):
    root = make({**dict.fromkeys(names), "metadata.jsonl": lines(*((name, f"of {name}") for name in names))})
    assert captions_by_id(load_captions("imagefolder", root)) == {"train": {name: [f"of {name}"] for name in names}}


def test_top_level_folders_named_as_splits_are_splits(make):
    names = ["train/1.jpg", "val/1.jpg", "test/deep/1.jpg", "other/1.jpg"]
    root = make({**dict.fromkeys(names), "metadata.jsonl": lines(*((name, name) for name in names))})
    found = captions_by_id(load_captions("imagefolder", root))
    assert {split: list(rows) for split, rows in found.items()} == {
        "train": ["train/1.jpg", "other/1.jpg"],
        "validation": ["val/1.jpg"],
        "test": ["test/deep/1.jpg"],
    }


def test_images_without_a_row_are_an_error(make, caplog):
    root = make({**dict.fromkeys(["a.jpg", "b.jpg", "sub/c.png"]), "metadata.jsonl": lines(("a.jpg", "a"))})
    with pytest.raises(ValueError, match=r"2 images in .* have no caption: b.jpg, sub/c.png\..*missing='skip'"):
        load_captions("imagefolder", root)
    assert len(load_captions("imagefolder", root, split="train", missing="skip")) == 1
    assert "2 images" in caplog.text


@pytest.mark.parametrize(("row", "file"), [("caf\u00e9.jpg", "cafe\u0301.jpg"), ("a\u0308/1.jpg", "a\u0308/1.jpg")])
def test_accents_may_be_one_character_or_two(make, row, file):
    """File systems and editors differ in this, and archives carry the names of one system to another."""
    for name, listed in ((file, row), (row, file)):
        root = make({name: None, "metadata.jsonl": lines((listed, "a cup"))})
        data = load_captions("imagefolder", root, split="train")
        assert data["captions"][:] == [["a cup"]] and data[0]["image"].size == (4, 4)
        (root / name).unlink()


def test_names_that_differ_in_accents_alone_are_two_images(make):
    root = make({"caf\u00e9.jpg": None, "cafe\u0301.jpg": None, "metadata.jsonl": lines(("cafe\u0301.jpg", "a"))})
    with pytest.raises(ValueError, match="1 images in .* have no caption: caf\u00e9.jpg"):
        load_captions("imagefolder", root)
    make({"metadata.jsonl": lines(("cafe\u0301.jpg", "a"), ("caf\u00e9.jpg", "b"))})
    assert len(load_captions("imagefolder", root, split="train")) == 2


@pytest.mark.parametrize(
    ("row", "file"), [("sub\\1.jpg", "sub/1.jpg"), ("1.JPG", "1.jpg"), ("https://a.b/1.jpg", "1.jpg")]
)
def test_rows_that_miss_their_file_are_named_beside_it(make, row, file):
    root = make({file: None, "metadata.jsonl": lines((row, "a"))})
    with pytest.raises(ValueError, match=f"no caption: {file}, while 1 rows name files that do not exist: ") as error:
        load_captions("imagefolder", root)
    assert os.path.normpath(row) in str(error.value)


@pytest.mark.parametrize("files", [{"metadata.jsonl"}, {"1.txt", "2.txt"}])
def test_linked_folders_are_read(make, tmp_path_factory, files):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    root = make({"0.jpg": None, "0.txt": "zero", "metadata.jsonl": lines(("0.jpg", "zero"))})
    contents = {"metadata.jsonl": lines(("1.jpg", "one"), ("2.jpg", "two")), "1.txt": "one", "2.txt": "two"}
    for name in files:
        (elsewhere / name).write_text(contents[name])
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (4, 4)).save(elsewhere / name)
    if "1.txt" in files:
        (root / "metadata.jsonl").unlink()
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "back").symlink_to(root, target_is_directory=True)  # a circle
    assert captions_by_id(load_captions("imagefolder", root)) == {
        "train": {"0.jpg": ["zero"], "linked/1.jpg": ["one"], "linked/2.jpg": ["two"]}
    }


@pytest.mark.parametrize("ids", [("cat", "cat"), ("", "")])
def test_images_with_the_same_id_are_not_joined(make, ids):
    rows = "".join(f"{number}.jpg,{number},{image_id}\n" for number, image_id in enumerate(ids))
    root = make({"0.jpg": None, "1.jpg": None, "metadata.csv": "file_name,text,label\n" + rows})
    with pytest.raises(ValueError, match=f"0.jpg and 1.jpg have the same id '{ids[0]}'"):
        load_captions("imagefolder", root, id_column="label", missing="skip")


def test_csv_is_text(make):
    texts = ["None", "N/A", "nan", "12", "1e5", "true", "007", "2021-01-01", 'a "b", c', "two\nlines"]
    rows = "".join('{}.jpg,"{}"\n'.format(number, text.replace('"', '""')) for number, text in enumerate(texts))
    root = make({**{f"{number}.jpg": None for number in range(len(texts))}, "metadata.csv": "file_name,text\n" + rows})
    found = load_captions("imagefolder", root, split="train")["captions"]
    assert [captions[0] for captions in found] == [*texts[:-1], "two lines"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "metadata.csv",
            "file_name,text\na.jpg,caf\xe9\n".encode("latin-1"),
            r"Line 2 of .*metadata.csv is not UTF-8",
        ),
        ("metadata.jsonl", '{"file_name": "a.jpg",\n"text": "x"}', r"Line 1 of .*metadata.jsonl is not a JSON object"),
        ("metadata.jsonl", '[\n{"file_name": "a.jpg", "text": "x"}]', r"Line 1 of .* is a JSON array; write one"),
        ("metadata.jsonl", '[{"file_name": "a.jpg", "text": "x"}]', r"Line 1 of .* not a JSON object, but a list"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": 5}', r"Line 1 of .*'text' must be text, but is 5 \(int\)"),
        ("metadata.jsonl", '{"file_name": 5, "text": "x"}', r"Line 1 of .* names no image"),
        ("metadata.csv", "file_name,text\na.jpg,a cat, asleep\n", r"Line 2 of .* has 3 fields, but the header has 2"),
        (
            "metadata.csv",
            "file_name,words\na.jpg,x\n",
            r"no column known for captions; the columns are file_name",
        ),
        ("metadata.csv", "image,text\na.jpg,x\n", r"no column 'file_name'; the columns are image, text"),
        ("metadata.csv", "", r"metadata.csv has no rows"),
        ("metadata.csv", "file_name,text,text\na.jpg,x,y\n", r"metadata.csv has several columns 'text'"),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "text": "x", "text": "y"}',
            r"Line 1 of .*it has several fields 'text'",
        ),
        ("metadata.jsonl", '{"file_name": "b.jpg", "text": "x"}', r"1 images in .* have no caption: a.jpg"),
        ("notes.md", "x", r"no captions in a known form: metadata.jsonl"),
    ],
)
def test_wrong_metadata(make, name, content, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_captions("imagefolder", make({"a.jpg": None, name: content}))


def test_text_files_beside_images(make, caplog):
    files = {"train/1.jpg": None, "train/1.txt": "a dog\na brown dog\n", "test/2.png": None, "test/2.txt": "None"}
    root = make(files)
    expected = {"test": {"test/2.png": ["None"]}, "train": {"train/1.jpg": ["a dog", "a brown dog"]}}
    assert captions_by_id(load_captions("imagefolder", root)) == expected
    make({"3.jpg": None})
    with pytest.raises(ValueError, match="1 images in .* have no caption: 3.jpg"):
        load_captions("imagefolder", root)
    assert captions_by_id(load_captions("imagefolder", root, missing="skip")) == expected
    stream = load_captions("imagefolder", root, split="train", missing="skip", streaming=True)
    assert [row["captions"] for row in stream] == [["a dog", "a brown dog"]]


TOKENS = "".join(f"{name}.jpg#{number}\ta {name} , {number} .\n" for name in "abcd" for number in range(2))


@pytest.mark.parametrize("kind", ["flickr8k", "imagefolder"])
def test_flickr8k_tokens_with_the_official_splits(make, kind, caplog):
    files = {f"Flicker8k_Dataset/{name}.jpg": None for name in "abcd"} | {"Flickr8k.token.txt": TOKENS}
    files["Flickr8k.token.txt"] += "2258277193_586949ec62.jpg.1#0\tpeople waiting\n"
    lists = {"Flickr_8k.trainImages.txt": "a.jpg\n", "Flickr_8k.devImages.txt": "b.jpg\n"}
    root = make({**files, **lists, "Flickr_8k.testImages.txt": "c.jpg\n"})
    assert captions_by_id(load_captions(kind, root)) == {
        "train": {"a.jpg": ["a a , 0 .", "a a , 1 ."]},
        "validation": {"b.jpg": ["a b , 0 .", "a b , 1 ."]},
        "test": {"c.jpg": ["a c , 0 .", "a c , 1 ."]},
    }
    assert "1 images are in no split list" in caplog.text


def test_flickr8k_captions_txt(make):
    text = 'image,caption\na.jpg,a dog\na.jpg,"a dog, asleep"\nb.jpg,a cat, awake\n'
    root = make({"Images/a.jpg": None, "Images/b.jpg": None, "captions.txt": text})
    expected = {"train": {"a.jpg": ["a dog", "a dog, asleep"], "b.jpg": ["a cat, awake"]}}
    assert captions_by_id(load_captions("imagefolder", root)) == expected
    assert captions_by_id(load_captions("flickr8k", root / "captions.txt", images=root / "Images")) == expected
    (root / "Images" / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images .* b.jpg"):
        load_captions("flickr8k", root)
    (root / "captions.txt").write_text("image;caption\n")
    with pytest.raises(ValueError, match="Line 1 of .*captions.txt is not `name.jpg#0`"):
        load_captions("flickr8k", root)


def test_flickr8k_names_that_two_folders_have(make):
    root = make({"a/1.jpg": None, "b/1.jpg": None, "captions.txt": "image,caption\n1.jpg,a dog\n"})
    with pytest.raises(ValueError, match=r"names 1.jpg, but .* has several: a/1.jpg, b/1.jpg"):
        load_captions("flickr8k", root)


def test_a_subfolder_that_cannot_be_read_is_an_error(make, monkeypatch):
    """Root can read everything, so the test simulates the refusal of the system."""
    root = make({"a.jpg": None, "a.txt": "a", "closed/b.jpg": None})
    scandir = os.scandir

    def refusing(path="."):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="closed: the folder cannot be read .Permission denied"):
        load_captions("imagefolder", root)
