"""Embedding whole data sets: the resulting rows, killed and resumed runs, several real processes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from clipcap_hf import CaptioningCollator
from clipcap_hf.captioning import embed_images
from clipcap_hf.cli import main
from clipcap_hf.data import (
    check_embeddings,
    embed,
    embeddings_provenance,
    load_captions,
    load_embeddings,
    load_emoji,
)
from clipcap_hf.model.images_clipcap import edge_that_is_enough
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image


IMAGES = 30
BROKEN = (7, 8, 22)


@pytest.fixture(scope="module")
def emoji_files(tmp_path_factory):
    """Emoji as files with Karpathy's annotations; three of them are damaged."""
    folder = tmp_path_factory.mktemp("emoji")
    emoji = load_emoji("new_design").select(range(0, 8 * IMAGES, 8))
    images = []
    for number, row in enumerate(emoji):
        row["image"].save(folder / f"{number}.png")
        if number in BROKEN:
            complete = (folder / f"{number}.png").read_bytes()
            (folder / f"{number}.png").write_bytes(complete[: len(complete) // 2])
        sentences = [{"raw": caption} for caption in row["captions"]]
        images.append({"filename": f"{number}.png", "imgid": number, "split": "train", "sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return folder / "dataset.json"


@pytest.fixture
def data(emoji_files):
    return load_captions("karpathy", emoji_files, split="train")


def rows_of(dataset):
    return [{name: row[name] for name in sorted(row)} for row in dataset]


def test_rows(tmp_path, make_model, processor, data, caplog):
    model = make_model()
    exactly = {"dtype": torch.float32, "shard_size": 8, "batch_size": 3, "num_workers": 2, "progress": False}
    embedded = embed(model, data, tmp_path / "embeds", processor, **exactly)
    good = [number for number in range(IMAGES) if number not in BROKEN]
    assert embedded["image_id"][:] == good
    assert embedded["captions"][:] == data.select(good)["captions"][:]
    expected = embed_images(model, processor, data.select(good)["image"], progress=False)
    torch.testing.assert_close(torch.tensor(embedded["clip_embeds"][:]), expected, rtol=1e-4, atol=1e-5)
    assert embedded.features["clip_embeds"].feature.dtype == "float32"
    failed = [json.loads(line) for line in (tmp_path / "embeds" / "failed.jsonl").read_text().splitlines()]
    assert [record["image_id"] for record in failed] == [record["row"] for record in failed] == list(BROKEN)
    assert all(record["image"].endswith(f"{record['image_id']}.png") and record["error"] for record in failed)
    assert "3 images could not be embedded" in caplog.text
    assert f"The first: {failed[0]['image']}: " in caplog.text
    batch = CaptioningCollator(processor)([embedded[0], embedded[1]])
    assert batch["clip_embeds"].shape == (2, 16)
    from datasets import load_from_disk

    assert (
        rows_of(load_from_disk(tmp_path / "embeds"))
        == rows_of(embedded)
        == rows_of(load_embeddings(tmp_path / "embeds"))
    )


def test_splits_and_streams(tmp_path, make_model, processor, data):
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(10 * shard, 10 * shard + 10):
                picture = io.BytesIO()
                Image.new("RGB", (40, 40 + number), (8 * number, 0, 90)).save(picture, "PNG")
                content = picture.getvalue() if number != 12 else b"broken"
                for name, content in (
                    (f"{number:03d}.png", content),
                    (f"{number:03d}.txt", f"number {number}".encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    stream = load_captions("webdataset", tmp_path / "*.tar")
    embedded = embed(make_model(), stream, tmp_path / "embeds", processor, batch_size=4, num_workers=2, progress=False)
    assert embedded["train"]["image_id"][:] == [f"{number:03d}" for number in range(30) if number != 12]
    assert embedded["train"]["captions"][13] == ["number 14"]
    assert embedded["train"]["image_path"][0] is None
    assert "012" in (tmp_path / "embeds" / "train" / "failed.jsonl").read_text()
    again = load_embeddings(tmp_path / "embeds", split="train")
    assert rows_of(again) == rows_of(embedded["train"])
    with pytest.raises(ValueError, match="no split 'test'; it has 'train'"):
        load_embeddings(tmp_path / "embeds", split="test")


def test_replaced_files_are_other_images(tmp_path, make_model, processor, emoji_files, caplog):
    folder = tmp_path / "files"
    shutil.copytree(emoji_files.parent, folder)
    data = load_captions("karpathy", folder / "dataset.json", split="train")
    model, out = make_model(), tmp_path / "embeds"
    embed(model, data, out, processor, progress=False)
    caplog.clear()
    embed(model, data, out, processor, progress=False)  # there is nothing left to do
    assert "3 images could not be embedded" in caplog.text
    shutil.copy(folder / "0.png", folder / "7.png")
    with pytest.raises(ValueError, match="differ in data: choose another folder, or delete"):
        embed(model, data, out, processor, progress=False)
    assert len(embed(model, data, tmp_path / "again", processor, progress=False)) == IMAGES - 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(tmp_path, make_model, processor, data, dtype):
    model = make_model()
    embedded = embed(model, data, tmp_path / "embeds", processor, dtype=dtype, num_workers=0, progress=False)
    assert embeddings_provenance(embedded)["dtype"] == str(dtype).removeprefix("torch.")
    expected = embed_images(model, processor, data.select(embedded["image_id"])["image"], progress=False)
    found = torch.tensor(embedded["clip_embeds"][:])
    assert not torch.equal(found, expected)
    assert torch.cosine_similarity(found, expected).min() > 0.999
    assert model.vision_tower.dtype == torch.float32  # as it was


def test_provenance_and_check(tmp_path, make_model, processor, data):
    model = make_model()
    embedded = embed(model, data.select(range(4)), tmp_path / "embeds", processor, progress=False)
    provenance = embeddings_provenance(embedded.shuffle(seed=0).select([1, 2]))
    assert provenance["vision"]["model_type"] == "clip_vision_model" and provenance["shape"] == [16]
    fast = "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"
    assert provenance["transform"]["image_mean"] and provenance["dtype"] == fast
    check_embeddings(embedded, model)
    check_embeddings(tmp_path / "embeds", model)
    check_embeddings(embedded, make_model(None))  # a captioner without a tower
    half = make_model()
    half.vision_tower.half()  # loses digits: other weights
    for other, complaint in (
        (half, "not made by the model's vision tower"),
        (make_model(None, clip_embed_dim=8), "16 dimensions.* takes 8"),
    ):
        with pytest.raises(ValueError, match=complaint):
            check_embeddings(embedded, other)
    with torch.no_grad():
        model.vision_tower.visual_projection.weight[0, 0] += 0.01
    with pytest.raises(ValueError, match="not made by the model's vision tower"):
        check_embeddings(tmp_path / "embeds", model)
    with pytest.raises(ValueError, match="no column 'clip_embeds'; it has image"):
        check_embeddings(data, model)


def test_reduced_jpeg_files_are_on_record(tmp_path, make_model, processor):
    picture = Image.effect_noise((400, 300), 60).convert("RGB").resize((1600, 1200))
    picture.save(tmp_path / "large.jpg")
    rows = Dataset.from_dict({"image": [str(tmp_path / "large.jpg")]}).cast_column("image", ImageFeature())
    model = make_model()
    whole, reduced = (
        embed(model, rows, tmp_path / str(reduce), processor, progress=False, reduce_jpeg=reduce)
        for reduce in (False, True)
    )
    embeds = [torch.tensor(data[0]["clip_embeds"]) for data in (whole, reduced)]
    assert not torch.equal(*embeds) and torch.cosine_similarity(*embeds, dim=0) > 0.99
    records = [embeddings_provenance(data)["transform"] for data in (whole, reduced)]
    assert "jpeg_reduced_to" not in records[0]
    assert records[1].pop("jpeg_reduced_to") == edge_that_is_enough(processor.image_processor)
    assert records[0] == records[1]
    with pytest.raises(ValueError, match="differ in transform"):
        embed(model, rows, tmp_path / "True", processor, progress=False)


def test_patches(tmp_path, make_model, processor, data):
    model = make_model(vision_feature="patches", mapping_type="transformer")
    exactly = {"dtype": torch.float32, "num_workers": 0, "progress": False}
    embedded = embed(model, data, tmp_path / "embeds", processor, **exactly)
    assert embeddings_provenance(embedded)["shape"] == [16, 32]
    check_embeddings(embedded, model)
    with pytest.raises(ValueError, match="'pooled' features of its tower, but the embeddings are 'patches'"):
        check_embeddings(embedded, make_model())
    from_embeds = model(**CaptioningCollator(processor)([embedded[0]])).image_hidden_states
    pixels = processor(images=data[0]["image"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(from_embeds, model.get_image_features(pixels).pooler_output)


def test_the_hash_does_not_depend_on_the_type_in_memory(make_model, tmp_path, processor, data):
    saved_in_half = make_model().half()
    embedded = embed(saved_in_half.float(), data.select(range(2)), tmp_path / "embeds", processor, progress=False)
    check_embeddings(embedded, saved_in_half.half())


def test_a_tower_alone_from_the_command_line(tmp_path, make_model, image_processor, emoji_files, capsys):
    tower = make_model().vision_tower
    tower.save_pretrained(tmp_path / "tower")
    image_processor.save_pretrained(tmp_path / "tower")
    arguments = ["embed", str(emoji_files), "--data-format", "karpathy", "--vision", str(tmp_path / "tower")]
    arguments += ["--out", str(tmp_path / "embeds"), "--split", "train", "--device", "cpu"]
    assert main(arguments) == 0
    assert f"{IMAGES - len(BROKEN)} images, embeddings of 16" in capsys.readouterr().out
    check_embeddings(tmp_path / "embeds", make_model())


def test_wrong_input(tmp_path, make_model, processor, embeds_processor, data):
    def run(data=data, model=None, processor=processor, out="embeds", **kwargs):
        return embed(model or make_model(), data, tmp_path / out, processor, progress=False, **kwargs)

    with pytest.raises(FileNotFoundError, match="no embeddings"):
        load_embeddings(tmp_path)
    with pytest.raises(ValueError, match="no column 'image'; it has captions"):
        run(data.remove_columns("image"))
    with pytest.raises(ValueError, match="no rows"):
        run(data.select([]))
    with pytest.raises(ValueError, match="no vision tower"):
        run(model=make_model(None))
    with pytest.raises(ValueError, match="image_processor"):
        run(processor=embeds_processor)
    with pytest.raises(ValueError, match="No image could be embedded. The first error: .*8.png"):
        run(data.select([8, 7]), out="broken")
    run(data.select(range(3)))
    with pytest.raises(ValueError, match="differ in data: choose another folder"):
        run(data.select(range(4)))
    other = make_model()
    torch.nn.init.zeros_(other.vision_tower.visual_projection.weight)
    with pytest.raises(ValueError, match="differ in weights_sha256"):
        run(data.select(range(3)), model=other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="not empty and holds no embeddings"):
        run(out="mine")
    with pytest.raises(ValueError, match="not empty and holds thesis.txt: choose another folder"):
        run({"train": data.select(range(3))}, out="mine")
    (tmp_path / "begun" / "train").mkdir(parents=True)
    (tmp_path / "begun" / "train" / ".lock").touch()  # of a run that was killed at once
    for _ in range(2):
        assert len(run({"train": data.select(range(3))}, out="begun")["train"]) == 3
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    with pytest.raises(OSError):
        embed(make_model(), data, "/proc/embeds", processor, progress=False)
    with torch.no_grad():
        other.vision_tower.visual_projection.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="No image could be embedded. The first error: the embedding holds NaN"):
        run(data.select(range(3)), model=other, out="nan")


SCRIPT = """
import os, resource, signal, sys, time
import torch
import clipcap_hf
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.data import embed, load_captions
from clipcap_hf.data.embeddings import EmbeddingsFolder

torch.set_num_threads(1)  # rounding depends on the number of threads, which torchrun changes
model_folder, annotations, out, mode = sys.argv[1:]
model = ClipCapForConditionalGeneration.from_pretrained(model_folder).eval()
processor = ClipCapProcessor.from_pretrained(model_folder)
data = load_captions("karpathy", annotations, split="train")


def run():
    embed(model, data, out, processor, shard_size=4, batch_size=3, num_workers=0, progress=False)


def step_by_step(name, owner, do):
    original = getattr(owner, name)

    def stepped(*args, **kwargs):
        do()
        result = original(*args, **kwargs)
        do()
        return result

    setattr(owner, name, stepped)


if mode == "slowly":
    step_by_step("write", EmbeddingsFolder, lambda: time.sleep(0.1))
    run()
elif mode == "full disk, then kill at each step":
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert sorted(os.listdir(out)) == ["clip_embeds.json"]
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            run()
        except OSError:
            os._exit(7)
        os._exit(0)
    # A process that is killed at its first step, one that is killed at its second, ..., until one ends by itself.
    for limit in range(1, 1000):
        if child := os.fork():
            status = os.waitpid(child, 0)[1]
            if status == 0:
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            continue
        steps = 0

        def step():
            global steps
            steps += 1
            if steps == limit:
                os.kill(os.getpid(), signal.SIGKILL)

        step_by_step("replace", os, step)
        step_by_step("write", EmbeddingsFolder, step)
        run()
        os._exit(0)
    print(limit)
else:
    run()
"""


@pytest.fixture
def script(tmp_path, model_folder, emoji_files):
    """`script(out, mode, processes)` starts a process, or several by torchrun, that embed the emoji."""
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def start(out, mode="", processes=1):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*launcher, tmp_path / "script.py", model_folder, emoji_files, out, mode]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def expected_rows(tmp_path, script):
    """Return the rows of an uninterrupted run."""
    out = tmp_path / "uninterrupted"
    finish(script(out))
    return rows_of(load_embeddings(out))


def kill_on_the_way(process, out, shards):
    deadline = time.monotonic() + 120
    while len(list(out.glob("data-*.arrow"))) < shards:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def test_killed_and_resumed_by_two_processes(tmp_path, script, expected_rows):
    out = tmp_path / "embeds"
    kill_on_the_way(script(out, "slowly"), out, shards=3)
    with pytest.raises(ValueError, match="unfinished: run `embed` again"):
        load_embeddings(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("data-*")}
    assert 3 <= len(before) < 8
    finish(script(out, processes=2))
    assert rows_of(load_embeddings(out)) == expected_rows
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items()), "work was done twice"
    assert not list(out.glob(".*"))


def test_full_disk_and_killed_at_each_step(tmp_path, script, expected_rows):
    out = tmp_path / "embeds"
    assert int(finish(script(out, "full disk, then kill at each step"))) > 5
    assert rows_of(load_embeddings(out)) == expected_rows
    failed = [json.loads(line)["image_id"] for line in (out / "failed.jsonl").read_text().splitlines()]
    assert failed == list(BROKEN)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(2, 1), (3, 2)])
def test_killed_with_several_processes(tmp_path, script, expected_rows, processes):
    out = tmp_path / "embeds"
    kill_on_the_way(script(out, "slowly", processes[0]), out, shards=2)
    kill_on_the_way(script(out, "slowly", processes[1]), out, shards=5)
    finish(script(out, processes=processes[0]))
    assert rows_of(load_embeddings(out)) == expected_rows
