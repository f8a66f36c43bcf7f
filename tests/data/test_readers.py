"""Each format in its published layout, in small files written here."""

import io
import json
import logging
import tarfile

import datasets
import pandas
import pytest
from clipcap_hf.data import caption_features, load_captions, warn_of_overlap
from clipcap_hf.data.schema import MAX_CAPTION_LENGTH, clean_caption
from PIL import Image


def jpeg(colour="red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    """`write(path, content)`: a dictionary or list as JSON, text as it is, a colour's picture for image names."""

    def write(name, content="red"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".jpg", ".png")):
            path.write_bytes(jpeg(content))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
        return path

    return write


def karpathy_image(filename, split, *captions, imgid=0, **more):
    sentences = [
        {"tokens": str(raw).split(), "raw": raw, "imgid": imgid, "sentid": number}
        for number, raw in enumerate(captions)
    ]
    sentids = [sentence["sentid"] for sentence in sentences]
    return {"sentids": sentids, "imgid": imgid, "sentences": sentences, "split": split, "filename": filename, **more}


def coco_file(captions_of, file_names, **more):
    images = [
        {"license": 3, "file_name": name, "coco_url": "http://example.org/x.jpg", "height": 30, "width": 40, "id": i}
        | {"date_captured": "2013-11-14 11:18:45", "flickr_url": "http://flickr.example/x.jpg"} | more.get(i, {})
        for i, name in file_names.items()
    ]  # fmt: skip
    annotations = [
        {"image_id": i, "id": 100 * i + number, "caption": caption}
        for i, captions in captions_of.items()
        for number, caption in enumerate(captions)
    ]
    return {"info": {"year": 2014}, "images": images, "licenses": [], "annotations": annotations}


def test_karpathy_coco(tmp_path, write, caplog):
    write("train2014/COCO_train2014_000000000009.jpg")
    write("val2014/COCO_val2014_000000000042.jpg")
    write("val2014/COCO_val2014_000000000073.jpg")
    names = {"train": "COCO_train2014_000000000009.jpg", "val": "COCO_val2014_0000000000%d.jpg"}
    images = [
        karpathy_image(names["train"], "train", "A dog.", "A dog on\u2028grass ", filepath="train2014", cocoid=9),
        karpathy_image(names["val"] % 42, "restval", "A shoe.", filepath="val2014", cocoid=42, imgid=1),
        karpathy_image(names["val"] % 73, "test", "A motorcycle.", " \n", filepath="val2014", cocoid=73, imgid=2),
    ]
    file = write("dataset_coco.json", {"images": images, "dataset": "coco"})
    data = load_captions("karpathy", file)
    assert {name: data[name]["image_id"][:] for name in data} == {"train": [9, 42], "test": [73]}
    assert data["train"]["captions"][:] == [["A dog.", "A dog on grass"], ["A shoe."]]
    assert data["train"].features == caption_features()
    assert data["train"][0]["image"].size == (40, 30)
    assert "1 captions are empty" in caplog.text and "image 73" in caplog.text
    assert load_captions("karpathy", file, split="test")["split"][:] == ["test"]
    with pytest.raises(ValueError, match="no split 'val'; it has 'train', 'test'"):
        load_captions("karpathy", file, split="val")


def test_reading_decodes_no_image(tmp_path, write):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    file = write("dataset_flickr8k.json", {"images": [karpathy_image("broken.jpg", "val", "A boat.")]})
    assert load_captions("karpathy", file, split="val")["captions"][:] == [["A boat."]]


def test_karpathy_flickr(tmp_path, write):
    """Flickr8k and Flickr30k have neither `filepath` nor `cocoid`."""
    images = [
        karpathy_image("1000092795.jpg", "train", "Two men", imgid=0),
        karpathy_image("10002456.jpg", "val", "Men", imgid=1),
    ]
    file = write("dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    for image in images:
        write(f"flickr30k-images/{image['filename']}")
    data = load_captions("karpathy", file, images=tmp_path / "flickr30k-images")
    assert (data["train"]["image_id"][:], data["validation"]["image_id"][:]) == ([0], [1])


def test_coco(tmp_path, write, caplog):
    captions = {9: ["A dog.", "A cat."], 25: ["A cow."], 77: ["of an image that is not listed"]}
    names = {9: "COCO_val2014_000000000009.jpg", 25: "000000000025.jpg"}
    file = write("annotations/captions_val2014.json", coco_file(captions, names))
    write("val2014/COCO_val2014_000000000009.jpg")
    write("000000000025.jpg")
    data = load_captions("coco", file, images=tmp_path)
    assert data["validation"]["captions"][:] == [["A dog.", "A cat."], ["A cow."]]
    assert "1 captions belong to images that it does not list" in caplog.text
    assert list(load_captions("coco", {"minival": file}, images=tmp_path)) == ["minival"]


def test_images_to_be_captioned(tmp_path, write):
    """COCO's image_info_test2014.json and the test file of nocaps have no captions."""
    images = coco_file({}, {1: "a.jpg"}, **{})
    del images["annotations"]
    write("a.jpg")
    data = load_captions("coco", write("image_info_test2014.json", images), split="test")
    assert data["captions"][:] == [[]]


def test_stair(tmp_path, write):
    write("train2014/COCO_train2014_000000000009.jpg")
    content = coco_file({9: ["灰色の\u3000犬。", "犬がいる\u0085芝生"]}, {9: "COCO_train2014_000000000009.jpg"})
    data = load_captions("stair", write("stair_captions_v1.2_train.json", content), images=tmp_path, split="train")
    assert data["captions"][:] == [["灰色の\u3000犬。", "犬がいる 芝生"]]


def test_nocaps(tmp_path, write):
    names = {0: "0013ea2087020901.jpg", 1: "003d3b821a9e5fc4.jpg"}
    content = coco_file({0: ["A fish."], 1: ["A harp."]}, names)
    for image, domain in zip(content["images"], ("in-domain", "out-domain")):
        image |= {"open_images_id": image["file_name"][:-4], "domain": domain}
        write(f"images/{image['file_name']}")
    file = write("nocaps_val_4500_captions.json", content)
    data = load_captions("nocaps", file, images=tmp_path / "images", split="val")
    assert data["domain"][:] == ["in-domain", "out-domain"]
    assert data.features == caption_features(domain=True)


def test_official_train_caption(tmp_path, write):
    write("train2014/COCO_train2014_000000522418.jpg")
    write("val2014/COCO_val2014_000000318219.jpg")
    content = [
        {"image_id": "318219", "id": 48, "caption": "A boy"},
        {"image_id": "522418", "id": 67, "caption": "A woman"},
        {"image_id": "318219", "id": 126, "caption": "A young boy"},
    ]
    data = load_captions("official", write("train_caption.json", content), images=tmp_path, split="train")
    assert data["image_id"][:] == [318219, 522418]
    assert data["captions"][:] == [["A boy", "A young boy"], ["A woman"]]


@pytest.mark.parametrize("header", ["", "caption\turl\n"])
def test_conceptual_captions(tmp_path, write, caplog, header):
    lines = (
        'a very typical\x0bstation\thttp://x.example/1.jpg\nsierra "looked\thttps://x.example/2\r\ngone\thttp://x/3\n'
    )
    file = write("Train_GCC-training.tsv", header + lines)
    write("cc/00000/000000000.jpg")
    write("cc/00000/000000001.png")
    data = load_captions("conceptual", file, images=tmp_path / "cc", split="train")
    assert data["image_id"][:] == [0, 1]
    assert data["captions"][:] == [["a very typical station"], ['sierra "looked']]
    assert "1 of the 3 images" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images .* 2\.jpg"):
        load_captions("conceptual", file, images=tmp_path / "cc", missing="error")


def test_conceptual_12m_has_the_url_first(tmp_path, write):
    write("0.jpg")
    file = write("cc12m.tsv", "https://x.example/1.jpg\ta cat\n")
    assert load_captions("conceptual", file, split="train")["captions"][:] == [["a cat"]]


def test_conceptual_rows_that_belong_to_other_captions(tmp_path, write):
    """`img2dataset` writes the caption next to the image: a different one shows that the numbers are not rows."""
    write("cc/000000000.jpg")
    write("cc/000000000.txt", "another caption")
    file = write("train.tsv", "a cat\thttp://x.example/1.jpg\n")
    with pytest.raises(ValueError, match="'another caption'.*'a cat'"):
        load_captions("conceptual", file, images=tmp_path / "cc")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder(tmp_path, write, kind):
    if kind == "csv" and datasets.__version__ < "5" and pandas.__version__ >= "3":
        pytest.skip("datasets 4.0 cannot read metadata.csv by pandas 3")
    for name in ("train/1.jpg", "train/2.jpg", "test/3.jpg"):
        write(f"folder/{name}")
    rows = {"train": [("1.jpg", "a dog"), ("1.jpg", "a brown dog"), ("2.jpg", "a cat")], "test": [("3.jpg", "a cow")]}
    for split, pairs in rows.items():
        if kind == "jsonl":
            lines = [json.dumps({"file_name": name, "text": text}) for name, text in pairs]
        else:
            lines = ["file_name,text", *(f"{name},{text}" for name, text in pairs)]
        write(f"folder/{split}/metadata.{kind}", "\n".join(lines) + "\n")
    data = load_captions("imagefolder", tmp_path / "folder", cache_dir=tmp_path / "cache")
    assert data["train"]["captions"][:] == [["a dog", "a brown dog"], ["a cat"]]
    assert data["test"]["image_id"][:] == ["test/3.jpg"]
    assert data["train"].features == caption_features(int_ids=False)
    (tmp_path / "folder" / "train" / "2.jpg").unlink()
    kwargs = {"split": "train", "cache_dir": tmp_path / "cache"}
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images .*2\.jpg"):
        load_captions("imagefolder", tmp_path / "folder", **kwargs)
    assert len(load_captions("imagefolder", tmp_path / "folder", missing="skip", **kwargs)) == 1


@pytest.fixture
def shards(tmp_path):
    """Two shards as `img2dataset` writes them; the fields of some samples are null."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for index in range(7):
                key = f"{shard:05d}{index:04d}"
                record = {
                    "caption": f"json {key}",
                    "key": key,
                    "error_message": None if index < 6 else "late",
                    "exif": "{}",
                }
                parts = {"jpg": jpeg(), "txt": f"text {key}".encode(), "json": json.dumps(record).encode()}
                for extension, content in parts.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return tmp_path


def test_webdataset_is_streamed(shards):
    data = load_captions("webdataset", shards, split="train")
    assert data.num_shards == 2
    rows = list(data)
    assert [row["image_id"] for row in rows] == [f"{s:05d}{i:04d}" for s in range(2) for i in range(7)]
    assert rows[8]["captions"] == ["text 000010001"] and rows[8]["image"].size == (40, 30)
    data = load_captions("webdataset", str(shards / "*1.tar"), split="train", caption_column="json.caption")
    assert [row["captions"] for row in data][:1] == [["json 000010000"]]


def test_hub_columns(tmp_path):
    from datasets import Dataset, Features, Image, Value

    rows = {
        "picture": [{"bytes": jpeg(), "path": None}] * 3,
        "first": ["a dog", "a cow", ""],
        "second": ["the dog", None, None],
        "number": [4, 5, 6],
    }
    features = Features(
        {"picture": Image(), "first": Value("string"), "second": Value("string"), "number": Value("int64")}
    )
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    options = {"caption_column": ["first", "second"], "id_column": "number", "cache_dir": tmp_path / "cache"}
    data = load_captions("hub", tmp_path / "data", split="train", **options)
    assert data["captions"][:] == [["a dog", "the dog"], ["a cow"]]
    assert data["image_id"][:] == [4, 5] and data[0]["image"].size == (40, 30)
    stream = load_captions("hub", tmp_path / "data", split="train", streaming=True, **options)
    assert [row["captions"] for row in stream] == [["a dog", "the dog"], ["a cow"]]
    with pytest.raises(ValueError, match="no column 'text'; the columns are picture .Image., first .string."):
        load_captions("hub", tmp_path / "data", caption_column="text", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="'picture' .* does not hold captions"):
        load_captions("hub", tmp_path / "data", caption_column="picture", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="'number' .* does not hold images"):
        load_captions(
            "hub", tmp_path / "data", image_column="number", caption_column="first", cache_dir=tmp_path / "cache"
        )
    with pytest.raises(ValueError, match="known for captions; the columns are"):
        load_captions("hub", tmp_path / "data", cache_dir=tmp_path / "cache")


def test_caption_a_row_is_grouped_by_id(tmp_path):
    from datasets import Dataset, Image

    rows = {"image": [{"bytes": jpeg(), "path": None}] * 3, "caption": ["a", "b", "c"], "img": [7, 8, 7]}
    Dataset.from_dict(rows).cast_column("image", Image()).save_to_disk(tmp_path / "saved")
    data = load_captions("hub", tmp_path / "saved", split="train", id_column="img")
    assert dict(zip(data["image_id"], data["captions"])) == {7: ["a", "c"], 8: ["b"]}


def saved_rows(folder, **columns):
    from datasets import Dataset, Image

    Dataset.from_dict(columns).cast_column("image", Image()).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([1, 1, 2], "images in rows 0 and 1 of .* differ, but have the same id 1"),
        (["cat", "dog", "cat"], "images in rows 0 and 2 of .* differ, but have the same id 'cat'"),
        ([1, None, 2], "Row 1 of .* has no id"),
        ([None, None, None], "'key' of .* holds neither text nor whole numbers"),
        ([0.5, 1.0, 2.0], "'key' of .* holds neither text nor whole numbers"),
        ([["a"], ["b"], ["c"]], "'key' of .* holds neither text nor whole numbers"),
    ],
)
def test_columns_that_are_no_ids(tmp_path, ids, complaint):
    """Rows with the same id become one image, so a wrong column would make images vanish."""
    pictures = [{"bytes": jpeg() + bytes(number), "path": None} for number in range(3)]
    saved = saved_rows(tmp_path / "saved", image=pictures, caption=["a", "b", "c"], key=ids)
    with pytest.raises(ValueError, match=complaint):
        load_captions("hub", saved, split="train", id_column="key")


def test_ids_of_a_table_of_paths(tmp_path, write):
    names = [str(write(f"{number}.jpg")) for number in (0, 1, 0)]
    table = write("table.csv", "image,caption,label\n" + "".join(f"{name},of {name},dog\n" for name in names))
    options = {"data_files": str(table), "split": "train", "cache_dir": tmp_path / "cache"}
    data = load_captions("hub", "csv", id_column="image", **options)
    assert dict(zip(data["image_id"], data["captions"])) == {
        names[0]: [f"of {names[0]}"] * 2,
        names[1]: [f"of {names[1]}"],
    }
    with pytest.raises(ValueError, match="images in rows 0 and 1 of csv differ, but have the same id 'dog'"):
        load_captions("hub", "csv", id_column="label", **options)
    held = saved_rows(tmp_path / "held", image=[{"bytes": jpeg(), "path": None}], caption=["a"])
    with pytest.raises(ValueError, match="Row 0 of .* has no id"):
        load_captions("hub", held, split="train", id_column="image")


@pytest.mark.parametrize("name", ["captions.csv", "train.parquet"])
def test_a_single_file_in_place_of_a_folder(tmp_path, name):
    (tmp_path / name).write_text("image,caption\na.jpg,a\n")
    with pytest.raises(ValueError, match=f"{name} is a single file, .* pass its folder"):
        load_captions("hub", tmp_path / name)


def test_clean_caption():
    separators = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
    assert clean_caption(f" a{separators}b{separators}") == "a b"
    assert len(clean_caption("".join(f"x{separator}" for separator in separators)).splitlines()) == 1
    assert clean_caption("x" * (MAX_CAPTION_LENGTH + 1)) is clean_caption("\u2028 ") is clean_caption(None) is None
    clean_caption("half a pair: \ud83d").encode("utf-8")
    for wrong in (3, 2.5, ["a"], {"raw": "a"}, b"a"):
        with pytest.raises(ValueError, match="row 5.*column of the captions"):
            clean_caption(wrong, "row 5")


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "not a JSON file, or is incomplete"),
        ([], "does not have the layout.*images.*a list"),
        ({"annotations": []}, "holds annotations"),
        ({"images": [{"file": "a.jpg"}]}, "Entry 0 .* no 'filename'; it has file"),
        ({"images": [karpathy_image("a.jpg", "train", 5)]}, "must be a string.*image 0.*int"),
        ({"images": [karpathy_image("a.jpg", "train", "x"), karpathy_image("a.jpg", "train", "y")]}, "same image id"),
        ({"images": []}, "dataset.json lists no images"),
        ({"images": [karpathy_image("a.jpg", "", "x")]}, "Entry 0 of .*dataset.json: split must be a name"),
        ({"images": [karpathy_image("a.jpg", "tr/ain", "x")]}, "Entry 0 of .*dataset.json: split must be a name"),
        (
            {"images": [karpathy_image("b.jpg", "train", "x"), karpathy_image("a.jpg", "train", "y")]},
            "1 of the 2 images",
        ),
    ],
)
def test_wrong_annotation_files(tmp_path, write, content, complaint):
    write("a.jpg")
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        load_captions("karpathy", write("dataset.json", content))


def test_a_folder_in_place_of_an_annotation_file(tmp_path):
    with pytest.raises(ValueError, match="annotation file .* is not a file, but a folder"):
        load_captions("coco", tmp_path)


def test_wrong_arguments(tmp_path, write):
    file = write("train.json", coco_file({1: ["x"]}, {1: "a.jpg"}))
    with pytest.raises(ValueError, match="Unknown reader 'voc'; choose one of 'karpathy'"):
        load_captions("voc", file)
    with pytest.raises(FileNotFoundError, match="annotation file"):
        load_captions("coco", tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="folder of images"):
        load_captions("coco", file, images=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="1 of the 1 images"):
        load_captions("coco", file, missing="skip")
    with pytest.raises(ValueError, match="'error' or 'skip'"):
        load_captions("coco", file, missing="ignore")
    with pytest.raises(ValueError, match="'caption_column'"):
        load_captions("coco", file, caption_column="text")
    with pytest.raises(FileNotFoundError, match="tar shards"):
        load_captions("webdataset", tmp_path)


def test_overlap_is_counted(tmp_path, write, caplog):
    write("a.jpg"), write("b.jpg"), write("c.jpg")
    images = [
        karpathy_image("a.jpg", "train", "x", imgid=0),
        karpathy_image("b.jpg", "train", "x", imgid=1),
        karpathy_image("a.jpg", "test", "x", imgid=2),
        karpathy_image("c.jpg", "test", "x", imgid=3),
    ]
    with caplog.at_level(logging.WARNING):
        data = load_captions("karpathy", write("dataset.json", {"images": images}))
    assert "1 images are in both 'train' and 'test'" in caplog.text
    assert warn_of_overlap(data) == {("train", "test"): 1}
    assert warn_of_overlap({"train": data["train"], "other": data["test"].select([1])}) == {}


def test_images_of_an_unusual_split_are_counted(write, caplog):
    for name in "abc":
        write(f"{name}.jpg")
    splits = {"a": "train", "b": "trbin", "c": "restval"}
    images = [
        karpathy_image(f"{name}.jpg", split, "A shoe.", imgid=i) for i, (name, split) in enumerate(splits.items())
    ]
    file = write("dataset.json", {"images": images, "dataset": "coco"})
    assert len(load_captions("karpathy", file, split="train")) == 2  # restval of COCO is training data
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "1 images of the split 'trbin' were left out" in warning
