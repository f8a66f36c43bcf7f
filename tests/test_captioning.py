"""Captioning by several real processes, and on a real Ray cluster of one machine."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_files, caption_images
from clipcap_hf.cli.output import escape
from PIL import Image


SCRIPT = """
import json, os, sys
import clipcap_hf
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_files
from clipcap_hf.cli import main

folder, *paths = sys.argv[1:]
model = ClipCapForConditionalGeneration.from_pretrained(folder).eval()
processor = ClipCapProcessor.from_pretrained(folder)
found = {}
for size in (0, 1, 4, 5, 6, 11):
    results = caption_files(model, processor, paths[:size], batch_size=2, progress=False)
    found[size] = [[result.path, result.captions, result.error] for result in results]
with open(f"{folder}/found-{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
sys.exit(main(["caption", "--model", folder, "--batch-size", "2", "--device", "cpu", *paths[:5]]))
"""


def test_two_processes_caption_as_one(tmp_path, model_folder, images):
    paths = []
    for number in range(11):
        paths.append(str(tmp_path / f"{number:02d}.png"))
        images[number % len(images)].rotate(20 * number).save(paths[-1])
    Path(paths[6]).write_bytes(b"broken")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, tmp_path / "script.py", model_folder, *paths], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr

    model = ClipCapForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = ClipCapProcessor.from_pretrained(model_folder)
    expected = [
        [found.path, found.captions, found.error]
        for found in caption_files(model, processor, paths, batch_size=2, progress=False)
    ]
    assert len({captions[0] for _, captions, error in expected if not error}) > 3, "the captions say nothing"
    for rank in range(2):
        found = json.loads((model_folder / f"found-{rank}.json").read_text())
        for size, results in found.items():
            assert results == expected[: int(size)], (rank, size)
    printed = [line for line in result.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert printed == [f"{escape(path)}\t{escape(captions[0])}" for path, captions, _ in expected[:5]], (
        "one process prints, in order"
    )


def test_large_batches_from_workers_need_few_open_files(tmp_path, model_folder, images):
    """A tensor for each image took as many open files, of which systems allow 1024."""
    resource = pytest.importorskip("resource")
    images[0].save(tmp_path / "image.png")
    paths = [str(tmp_path / "image.png")] * 600
    paths[300] = str(tmp_path / "missing.png")
    model = ClipCapForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = ClipCapProcessor.from_pretrained(model_folder)
    expected = next(caption_files(model, processor, paths[:1], progress=False, max_new_tokens=2)).captions
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 60, limits[1]))
    try:
        found = list(caption_files(model, processor, paths, 128, num_workers=2, progress=False, max_new_tokens=2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [number for number, each in enumerate(found) if each.error] == [300]
    assert all(each.captions == expected for each in found if not each.error)


def test_open_images_that_come_twice_are_read_whole(tmp_path, model_folder, images):
    """Threads share the position in an open file."""
    for number, image in enumerate(images):
        image.resize((900, 900)).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number // 8}.png" for number in range(8 * len(images))]
    model = ClipCapForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = ClipCapProcessor.from_pretrained(model_folder)
    opened = [image for path in paths[::8] for image in [Image.open(path)] * 8]
    files = [file for path in paths[::8] for file in [io.BytesIO(path.read_bytes())] * 8]
    arguments = {"progress": False, "max_new_tokens": 4}
    expected = list(caption_images(model, processor, paths, **arguments))
    assert expected[0].error is None and len({each.captions[0] for each in expected}) > 1
    assert list(caption_images(model, processor, opened, **arguments)) == expected
    assert list(caption_images(model, processor, files, **arguments)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_ray_captions_shards(tmp_path, model_folder, images, kind):
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    contents = []
    for number in range(10):
        file = io.BytesIO()
        images[number % len(images)].rotate(20 * number).save(file, "JPEG")
        contents.append(file.getvalue() if number != 4 else b"broken")
    (tmp_path / "shards").mkdir()
    if kind == "tar":
        for shard in range(2):
            with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
                for number in range(5 * shard, 5 * shard + 5):
                    for extension, content in (("jpg", contents[number]), ("txt", b"old caption")):
                        info = tarfile.TarInfo(f"{number:02d}.{extension}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    else:
        from datasets import Dataset, Image

        rows = {"image": [{"bytes": content, "path": None} for content in contents]}
        rows["image_id"] = [f"{number:02d}" for number in range(10)]
        Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(tmp_path / "shards" / "0.parquet")
    example = Path(__file__).parent.parent / "examples" / "cluster" / "caption_with_ray.py"
    command = [sys.executable, example, tmp_path / "shards", "--out", tmp_path / "out", "--model", model_folder]
    command += ["--batch-size", "3", *(["--parquet"] if kind == "parquet" else [])]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [line for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()]
    found = {record["image_id"]: record for record in map(json.loads, lines)}
    assert len(lines) == len(found) == 10
    assert found["04"]["caption"] is None and found["04"]["error"]

    model = ClipCapForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = ClipCapProcessor.from_pretrained(model_folder)
    for number in (0, 3, 9):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(contents[number])
        (expected,) = caption_files(model, processor, [str(path)], progress=False)
        assert found[f"{number:02d}"]["caption"] == expected.captions[0]
