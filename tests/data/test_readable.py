"""Images that cannot be read are left out, named and counted, in data sets and streams; none starts a program."""

import io
import json
import os
import tarfile

import pytest
from clipcap_hf.captioning import caption_images, embed_images
from clipcap_hf.cli import main
from clipcap_hf.data import embed, load_captions
from clipcap_hf.data.readable import drop_unreadable, readable_stream, undecoded
from clipcap_hf.evaluation.evaluation_set import EvaluationSet
from clipcap_hf.metrics.clip import _open, check_images
from clipcap_hf.training.rows import EpochRows
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import EpsImagePlugin, Image
from transformers import CLIPVisionModelWithProjection, GPT2LMHeadModel, pipeline


FEATURES = Features({"image": ImageFeature(), "captions": List(Value("string"))})


def encoded(image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def rows_of(contents: list[bytes]) -> Dataset:
    """Make a data set that holds its images."""
    stored = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(contents)]
    return Dataset.from_dict({"image": stored, "captions": [["a"]] * len(stored)}, features=FEATURES)


@pytest.fixture
def contents(images) -> list[bytes]:
    """Eight encoded images, of which the third and the sixth are truncated."""
    whole = [encoded(image) for image in images]
    return [content[:-60] if number in (2, 5) else content for number, content in enumerate(whole)]


def test_rows_are_left_out_and_named(contents, tmp_path, caplog):
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    data = Dataset.from_dict({"image": list(map(str, paths)), "captions": [["a"]] * 8}, features=FEATURES)
    kept = drop_unreadable(data, "training")
    assert [os.path.basename(image["path"]) for image in undecoded(kept)["image"]] == [
        f"{number}.png" for number in (0, 1, 3, 4, 6, 7)
    ]
    assert "2 images of the training data cannot be read and are left out:" in caplog.text
    assert f"{paths[2]}, {paths[5]}" in caplog.text and "truncated" in caplog.text
    caplog.clear()
    assert drop_unreadable(kept, "training") is kept and not caplog.text
    with pytest.raises(ValueError, match="No image of the evaluation data can be read.*2.png"):
        drop_unreadable(data.select([2, 5]), "evaluation")


def test_rows_of_a_stream_are_left_out_and_named(contents, caplog):
    stream = rows_of(contents).to_iterable_dataset(num_shards=2)
    kept = list(readable_stream(stream, "training"))
    assert [row["image"].size for row in kept] == [(48 + 4 * number, 40) for number in (0, 1, 3, 4, 6, 7)]
    assert "The training data: the image 2.png is left out (2.png: not a readable image" in caplog.text
    assert "5.png is left out" in caplog.text and "2 rows left out so far" in caplog.text


@pytest.fixture
def parts(tmp_path, clip_config, text_config, image_processor, tokenizer) -> list[str]:
    CLIPVisionModelWithProjection(clip_config).save_pretrained(tmp_path / "tower")
    image_processor.save_pretrained(tmp_path / "tower")
    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return ["--vision", str(tmp_path / "tower"), "--text", str(tmp_path / "gpt2"), "--prefix_length", "2"]


def test_training_on_shards_goes_on_without_broken_images_and_rows_without_captions(tmp_path, parts, contents, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, content in enumerate(contents):
            text = b"" if number == 7 else f"caption {number}".encode()
            for suffix, part in (("png", content), ("txt", text)):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    command = ["train", *parts, "--data", str(tmp_path / "0.tar"), "--data_format", "webdataset", "--streaming"]
    command += ["--max_steps", "2", "--per_device_train_batch_size", "5", "--eval_split", "none", "--use_cpu"]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", "0"]) == 0
    assert "the image 002 is left out (002.png: not a readable image" in caplog.text
    assert "the image 005 is left out" in caplog.text and "2 rows left out so far" in caplog.text
    assert "the image 007 is left out (it has no caption); 1 rows left out so far" in caplog.text


def test_training_says_before_it_starts_what_it_trains_on(tmp_path, parts, contents, caplog):
    (tmp_path / "images").mkdir()
    rows = []
    for number, content in enumerate(contents):
        (tmp_path / "images" / f"{number}.png").write_bytes(content)
        rows.append({"file_name": f"{number}.png", "captions": ["one", "two"]})
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["train", *parts, "--data", str(tmp_path / "images"), "--embed_once", "False", "--eval_split", "none"]
    command += ["--num_train_epochs", "1", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--dataloader_num_workers", "0"]) == 0
    lines = caplog.text.splitlines()
    places = [
        next(number for number, line in enumerate(lines) if text in line)
        for text in (
            "2 images of the training data cannot be read",
            "Training data: 6 images with 12 captions",
            "step 1",
        )
    ]
    assert places == sorted(places)


# -- no other programs


@pytest.fixture
def drawing(tmp_path, monkeypatch) -> bytes:
    """PostScript, with a `gs` first on PATH that leaves a mark."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    return encoded(Image.new("RGB", (64, 64)), "EPS")


@pytest.mark.skipif(os.name != "posix", reason="the program is a shell script")
def test_postscript_starts_nothing_in_any_path(tmp_path, drawing, make_model, processor, images):
    data = rows_of([drawing, encoded(images[0])])
    (tmp_path / "drawing.png").write_bytes(drawing)
    model = make_model()
    for image in ({"bytes": drawing, "path": "x.png"}, drawing, tmp_path / "drawing.png"):
        with pytest.raises(ValueError, match="not a readable image"):
            _open(image)
    with pytest.raises(ValueError, match="not a readable image"):
        _open(check_images(data["image"], 2)[0])
    first, second = caption_images(model, processor, data["image"], progress=False)
    assert first.error and second.captions
    with pytest.raises(ValueError, match="not a readable image"):
        embed_images(model, processor, data["image"], progress=False)
    with pytest.raises(ValueError, match="not a readable image"):
        pipeline("image-captioning", model=model, processor=processor)(data["image"])
    assert len(embed(model, data, tmp_path / "embeds", processor, num_workers=0, progress=False)) == 1
    assert len(drop_unreadable(data, "training")) == 1
    assert len(list(readable_stream(data.to_iterable_dataset(), "training"))) == 1
    assert EpochRows(undecoded(data))[0]["image"].size == images[0].size
    own = EvaluationSet([0, 1], [["a"], ["b"]], images=data["image"])
    assert own.image_digests and own.stored_images[0]["bytes"] == drawing
    assert own.take([0]).stored_images[0]["bytes"] == drawing
    assert not (tmp_path / "started").exists()
    with pytest.raises(OSError):
        data[0]["image"]  # as `datasets` itself reads images
    assert (tmp_path / "started").exists(), "the test could not have failed"


def test_names_that_are_not_utf_8_cannot_be_in_a_data_set(tmp_path, images):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        images[0].save(tmp_path / name)
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    (tmp_path / name).with_suffix(".txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"caf\\udce9.png' is not UTF-8.*rename the file"):
        load_captions("imagefolder", tmp_path)
