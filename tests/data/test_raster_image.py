"""The image column: it decodes as that of `datasets`, but never hands a file to another program."""

import io
import json
import pickle
import tarfile
import zipfile

import pytest
from clipcap_hf.data import embed, load_captions
from clipcap_hf.data.raster_image import RasterImage
from clipcap_hf.data.readable import readable_stream
from datasets import Dataset, Features, Value, concatenate_datasets, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError


def encoded(image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def drawing(images) -> bytes:
    return encoded(images[0], "EPS")


def in_a_folder(folder, content):
    (folder / "0.png").write_bytes(content)
    (folder / "0.txt").write_text("a drawing")
    return load_captions("imagefolder", folder, split="train")


def in_a_stream(folder, content):
    in_a_folder(folder, content)
    return load_captions("imagefolder", folder, split="train", streaming=True)


def in_coco(folder, content):
    (folder / "0.png").write_bytes(content)
    images = [{"id": 1, "file_name": "0.png"}]
    text = json.dumps({"images": images, "annotations": [{"image_id": 1, "caption": "a drawing"}]})
    (folder / "captions_train2014.json").write_text(text)
    return load_captions("coco", folder / "captions_train2014.json", split="train")


def in_a_saved_data_set(folder, content):
    rows = {"image": [{"bytes": content, "path": "0.png"}], "text": ["a drawing"]}
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")
    return load_captions("hub", folder / "saved", split="train")


def in_a_shard(folder, content):
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name, part in (("0.png", content), ("0.txt", b"a drawing")):
            member = tarfile.TarInfo(name)
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))
    return load_captions("webdataset", folder / "0.tar", split="train")


def in_an_archive(folder, content):
    with zipfile.ZipFile(folder / "0.zip", "w") as archive:
        archive.writestr("0.png", content)
        archive.writestr("metadata.csv", "file_name,text\n0.png,a drawing\n")
    files = {"train": str(folder / "0.zip")}
    return load_captions("hub", "imagefolder", split="train", data_files=files, streaming=True)


WAYS = [in_a_folder, in_a_stream, in_coco, in_a_saved_data_set, in_a_shard, in_an_archive]


@pytest.mark.parametrize("read", WAYS)
def test_rows_open_raster_formats_only(tmp_path, images, drawing, monkeypatch, read):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: started.append(arguments))
    (tmp_path / "good").mkdir()
    row = next(iter(read(tmp_path / "good", encoded(images[0], "PNG"))))
    assert row["image"].tobytes() == images[0].tobytes() and row["captions"] == ["a drawing"]
    (tmp_path / "bad").mkdir()
    with pytest.raises(UnidentifiedImageError, match="0.png.*: not a readable image"):
        next(iter(read(tmp_path / "bad", drawing)))
    assert not started


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "I;16", "CMYK"])
def test_decodes_as_datasets_do(tmp_path, images, mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    picture = Image.new("I;16", (5, 4), 40_000) if mode == "I;16" else images[1].convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if mode in ("1", "I;16") else {"exif": exif}
    (tmp_path / "a.png").write_bytes(content := encoded(picture, kind, **options))
    for value in ({"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}):
        for feature in ({}, {"mode": "RGB"}):
            ours, theirs = (kind(**feature).decode_example(value) for kind in (RasterImage, ImageFeature))
            assert (ours.mode, ours.size, ours.tobytes()) == (theirs.mode, theirs.size, theirs.tobytes())


def test_what_users_do_with_data_sets_keeps_the_column(tmp_path, images):
    (tmp_path / "data").mkdir()
    ours = in_a_folder(tmp_path / "data", encoded(images[0], "PNG"))
    plain = ours.cast_column("image", ImageFeature())
    changed = {
        "select": ours.select([0]),
        "shuffle": ours.shuffle(seed=0),
        "filter": ours.filter(lambda captions: True, input_columns="captions"),
        "map": ours.map(lambda row: {"number": 1}),
        "pickle": pickle.loads(pickle.dumps(ours)),
        "joined": concatenate_datasets([ours, plain]),
    }
    for name, data in changed.items():
        assert type(data.features["image"]) is RasterImage, name
        assert data[0]["image"].size == images[0].size, name
    assert len(concatenate_datasets([plain, ours])) == 2
    ours.save_to_disk(tmp_path / "saved")  # read by people without this package
    assert '"_type": "Image"' in (tmp_path / "saved" / "dataset_info.json").read_text()
    assert type(load_from_disk(tmp_path / "saved").features["image"]) is ImageFeature
    assert ours.features == plain.features and plain.features == ours.features


def test_streams_of_archives_are_used_like_folders(tmp_path, images, make_model, processor, caplog):
    stream = in_an_archive(tmp_path, encoded(images[0], "PNG"))
    [row] = readable_stream(stream, "training")
    assert row["image"].tobytes() == images[0].tobytes()
    embedded = embed(make_model(), stream, tmp_path / "embeds", processor, num_workers=0, progress=False)
    assert embedded["captions"][:] == [["a drawing"]]
    [row] = readable_stream(in_a_folder(tmp_path, encoded(images[0], "PNG")).to_iterable_dataset(), "training")
    assert row["captions"] == ["a drawing"] and not caplog.text
