"""Folders of embeddings that were damaged after writing, or that two runs write at once."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pytest
from clipcap_hf.data import embed, load_embeddings, load_emoji
from clipcap_hf.files import lock_folder


@pytest.fixture
def run(tmp_path, make_model, processor):
    data, model = load_emoji("validation").select(range(12)), make_model()

    def run():
        return embed(
            model, data, tmp_path / "out", processor, shard_size=5, batch_size=2, num_workers=0, progress=False
        )

    return run


def cut_between_records(path):
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_stream(file)
        reader.read_next_batch()
        end = file.tell()
    os.truncate(path, end)


def cut_and_closed(path):
    """Fewer rows, but a whole file."""
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(0, 2))


@pytest.mark.parametrize(
    "damage",
    [
        cut_between_records,
        cut_and_closed,
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"x" * 1000),
    ],
    ids=["record", "rows", "half", "empty", "other"],
)
@pytest.mark.parametrize("finished", [False, True])
def test_damaged_shards_are_made_again(tmp_path, run, caplog, damage, finished):
    expected = list(run())
    out = tmp_path / "out"
    if not finished:
        (out / "state.json").unlink()
    damage(out / "data-00001.arrow")
    kept = (out / "data-00000.arrow").stat().st_mtime_ns
    assert list(run()) == expected
    assert "data-00001.arrow is damaged or incomplete" in caplog.text
    assert (out / "data-00000.arrow").stat().st_mtime_ns == kept


def test_a_run_is_kept_out_while_another_writes(tmp_path, run):
    script = f"import time; from clipcap_hf.files import lock_folder\nwith lock_folder({str(tmp_path / 'out')!r}):\n"
    script += "    print(flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(ValueError, match=f"is being written by process {other.pid} on .*: wait for it"):
            run()
    finally:
        other.kill()
        other.wait()
    assert len(run()) == 12  # a killed process holds no lock
    assert not list((tmp_path / "out").glob(".*"))


def test_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path / "new"):
            assert os.listdir(tmp_path / "new") == [".lock"]
        assert not os.listdir(tmp_path), "a folder that was made for the lock alone"


def test_leftovers_of_killed_runs_are_removed(tmp_path, run):
    run()
    out = tmp_path / "out"
    (out / "state.json").unlink()
    names = [
        ".data-00001.arrow.4242.tmp",
        ".state.json.x1y2.tmp",
        ".clip_embeds.json.abc.tmp",
        ".data-00000.arrow.tmp",
    ]
    for name in names:
        (out / name).write_text("half")
    run()
    assert not list(out.glob(".*"))


def test_damaged_manifest(tmp_path, run):
    run()
    (tmp_path / "out" / "clip_embeds.json").write_text('{"vision": ')
    with pytest.raises(ValueError, match="clip_embeds.json is damaged"):
        run()


def test_failed_images_count_as_rows(tmp_path, make_model, processor, caplog):
    rows = load_emoji("validation").select(range(4)).cast_column("image", datasets.Image(decode=False))
    images = [dict(image) for image in rows["image"]]
    images[2]["bytes"] = images[2]["bytes"][:50]
    data = rows.remove_columns("image").add_column("image", images, feature=datasets.Image())
    model = make_model()
    for _ in range(2):
        embed(model, data, tmp_path / "out", processor, shard_size=2, num_workers=0, progress=False)
    assert "damaged" not in caplog.text
    assert [json.loads(line)["row"] for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()] == [2]
    assert len(load_embeddings(tmp_path / "out")) == 3
