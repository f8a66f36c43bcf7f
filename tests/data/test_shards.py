"""Tar shards: images of several formats, samples without an image, and truncated archives."""

import io
import json
import os
import tarfile

import pytest
from clipcap_hf.data import embed, load_captions
from PIL import Image


def write_shard(path, samples):
    """Write samples, each given by a key and the extensions of its files."""
    with tarfile.open(path, "w") as tar:
        for key, extensions in samples:
            for extension in extensions:
                content = io.BytesIO()
                if extension in ("txt", "note"):
                    content.write(f"text of {key}".encode())
                else:
                    Image.new("RGB", (8, 8), "red").save(content, {"jpg": "JPEG"}.get(extension, extension))
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = content.tell()
                content.seek(0)
                tar.addfile(info, content)
    return path


@pytest.mark.parametrize("extensions", [("jpg", "png"), ("png", "jpg"), ("jpg", "png", "webp")])
def test_each_shard_has_images_of_its_own_format(tmp_path, extensions):
    for number, extension in enumerate(extensions):
        samples = [(f"{number}{index:04d}", (extension, "txt")) for index in range(7)]
        write_shard(tmp_path / f"{number}.tar", samples)
    rows = list(load_captions("webdataset", tmp_path, split="train"))
    assert len(rows) == 7 * len(extensions)
    assert all(row["image"].size == (8, 8) and row["captions"] == [f"text of {row['image_id']}"] for row in rows)


def test_formats_mixed_after_the_first_samples(tmp_path):
    samples = [(f"{index:04d}", ("jpg" if index < 6 else "png", "txt")) for index in range(9)]
    write_shard(tmp_path / "0.tar", samples)
    assert all(row["image"] is not None for row in load_captions("webdataset", tmp_path, split="train"))


def test_samples_without_an_image_are_named(tmp_path, make_model, processor, caplog):
    write_shard(tmp_path / "0.tar", [(f"{i:04d}", ("jpg", "txt") if i not in (6, 8) else ("txt",)) for i in range(9)])
    data = load_captions("webdataset", tmp_path, split="train")
    out = tmp_path / "out"
    assert len(embed(make_model(), data, out, processor, num_workers=0, progress=False)) == 7
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [(record["image_id"], record["error"]) for record in failed] == [
        ("0006", "there is no image"),
        ("0008", "there is no image"),
    ]
    assert "2 images could not be embedded" in caplog.text


@pytest.mark.parametrize("members", [4, 10, 13])
def test_an_archive_cut_between_members_is_refused(tmp_path, caplog, members):
    shard = write_shard(tmp_path / "0.tar", [(f"{index:04d}", ("jpg", "txt")) for index in range(8)])
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[members].offset
    os.truncate(shard, end)
    with pytest.raises(ValueError, match="0.tar has no end mark: it is truncated"):
        load_captions("webdataset", tmp_path)
    assert len(list(load_captions("webdataset", tmp_path, split="train", missing="skip"))) == members // 2
    assert "The rest is read" in caplog.text


def test_damaged_headers_are_not_the_end_of_an_archive(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [(f"{index:04d}", ("jpg", "txt")) for index in range(8)])
    with tarfile.open(shard) as tar:
        offsets = [member.offset for member in tar.getmembers()]
    whole = shard.read_bytes()
    for number, offset in enumerate(offsets):
        shard.write_bytes(whole[: offset + 100] + b"\xff" + whole[offset + 101 :])
        with pytest.raises(ValueError, match="0.tar is not a tar archive, or is damaged"):
            load_captions("webdataset", tmp_path)
        shard.write_bytes(whole[:offset] + bytes(512) + whole[offset + 512 :])
        with pytest.raises(ValueError, match="0.tar is (not a tar archive, or is )?damaged"):
            load_captions("webdataset", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0000.txt", b"caf\xe9", "0.tar is not a tar archive, or is damaged: '0000.txt'.*utf-8"),
        ("0000.json", b'{"caption": "a', "0.tar is not a tar archive, or is damaged: '0000.json': Unterminated"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path, name, content, message):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=message):
        load_captions("webdataset", tmp_path)


def test_a_pointer_in_place_of_a_shard(tmp_path):
    (tmp_path / "0.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match="0.tar is a Git LFS pointer.*git lfs pull"):
        load_captions("webdataset", tmp_path)


def write_files(path, files):
    """Write files, each given by its name and content."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png():
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "png")
    return content.getvalue()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "extensions",
    [
        [("jpg", "txt"), ("png", "txt")],
        [("png", "txt"), ("txt",)],
        [("txt",), ("webp", "txt"), ("jpg", "txt")],
        [("jpg", "txt", "note"), ("jpg", "txt")],
    ],
)
def test_the_first_samples_differ_in_their_files(tmp_path, monkeypatch, extensions, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    of_each = [extensions[index % len(extensions)] for index in range(7)]
    write_shard(tmp_path / "0.tar", [(f"{index:04d}", each) for index, each in enumerate(of_each)])
    data = load_captions("webdataset", tmp_path, split="train", streaming=streaming)
    found = {row["image_id"]: (row["captions"], row["image"] is not None) for row in data}
    assert list(found.values()) == [([f"text of {i:04d}"], len(each) > 1) for i, each in enumerate(of_each)]


def test_samples_without_a_caption_among_the_first(tmp_path, caplog):
    write_shard(tmp_path / "0.tar", [(f"{i:04d}", ("jpg", "txt") if i else ("jpg",)) for i in range(4)])
    rows = list(load_captions("webdataset", tmp_path, split="train"))
    assert [row["image_id"] for row in rows] == ["0001", "0002", "0003"]
    assert "the image 0000 is left out (it has no caption); 1 rows left out so far" in caplog.text


def test_json_of_all_samples_decides_its_type(tmp_path):
    records = [{"error": None}, {"score": 1}, {"score": 0.5, "tags": ["a"]}, {"size": {"width": 3}}]
    for number, record in enumerate(records):
        text = json.dumps({"caption": f"text {number}", **record}).encode()
        write_files(tmp_path / f"{number}.tar", [(f"{number}.png", png()), (f"{number}.json", text)])
    rows = list(load_captions("webdataset", tmp_path, split="train"))
    assert [row["captions"] for row in rows] == [[f"text {number}"] for number in range(4)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("0.json", b'{"caption": "a"}'), ("1.json", b'{"caption": ["a", "b"]}')], "0.tar is .*damaged: .*json"),
        ([("0.jpg", b""), ("1.jpg", b""), ("0.txt", b"a"), ("1.txt", b"b")], "0.tar.*sample '0' do not follow"),
        ([("0.cls", b"3"), ("1.cls", b"dog")], "0.tar.*'1.cls': invalid literal"),
        ([(f"photo.{i}.jpg", b"") for i in range(200)], "0.tar.*all that follows the first dot"),
        ([("0.npy", b"no numbers"), ("0.txt", b"a")], "0.tar.*'0.npy'"),
        ([("0.jpg", b""), ("0.txt", b"\xff\xfea\0")], "0.tar.*'0.txt'"),
    ],
)
def test_samples_that_cannot_be_told_apart_or_read(tmp_path, files, message):
    write_files(tmp_path / "0.tar", files)
    with pytest.raises(ValueError, match=message):
        load_captions("webdataset", tmp_path)


def test_columns_of_one_type_in_each_shard(tmp_path):
    for number, caption in enumerate(["a", ["b"]]):
        text = json.dumps({"caption": caption}).encode()
        write_files(tmp_path / f"{number}.tar", [(f"{number}.png", png()), (f"{number}.json", text)])
    with pytest.raises(ValueError, match="1.tar"):
        load_captions("webdataset", tmp_path)


def test_names_that_webdataset_hides_are_counted(tmp_path, caplog):
    image = png()
    files = [("__0.png", image), ("__0.txt", b"a"), ("1.png", image), ("1.txt", b"b")]
    write_files(tmp_path / "0.tar", files)
    assert len(list(load_captions("webdataset", tmp_path, split="train"))) == 1
    assert "0.tar: 2 files are left out, since WebDataset hides names in __: '__0.png'" in caplog.text


def test_shards_of_several_splits_by_a_dictionary(tmp_path):
    for name, extension in (("a", "jpg"), ("b", "png")):
        write_shard(tmp_path / f"{name}.tar", [(f"{name}{index}", (extension, "txt")) for index in range(6)])
    files = {"train": str(tmp_path / "a.tar"), "test": [str(tmp_path / "b.tar")]}
    splits = load_captions("webdataset", files)
    assert {name: sum(row["image"] is not None for row in rows) for name, rows in splits.items()} == {
        "train": 6,
        "test": 6,
    }


def test_a_mark_of_the_byte_order_is_no_part_of_a_caption(tmp_path):
    write_files(tmp_path / "0.tar", [("0.png", png()), ("0.txt", b"\xef\xbb\xbfa red heart\r\n")])
    assert [row["captions"] for row in load_captions("webdataset", tmp_path, split="train")] == [["a red heart"]]
