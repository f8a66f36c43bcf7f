"""Saved data sets whose files are not whole are refused in every way that reads them."""

import json

import pyarrow as pa
import pytest
from clipcap_hf.data import load_captions, load_embeddings
from clipcap_hf.data.saved import load_saved
from clipcap_hf.training.arguments import DataArguments
from clipcap_hf.training.loading import load_data
from datasets import Dataset, DatasetDict, load_from_disk


ROWS = {"captions": [[f"caption {number}"] for number in range(6)], "clip_embeds": [[float(n)] * 4 for n in range(6)]}


@pytest.fixture(params=["one", "splits"])
def saved(request, tmp_path):
    """Save six rows in batches of two, alone or as the split "train"; return the folder and its Arrow file."""
    data = Dataset.from_dict(ROWS)
    (data if request.param == "one" else DatasetDict(train=data, test=data)).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved" / ("" if request.param == "one" else "train")).glob("*.arrow")
    table = data.data.table
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return tmp_path / "saved", file


def batch_ends(file) -> list[int]:
    with pa.memory_map(str(file)) as mapped:
        reader = pa.ipc.open_stream(mapped)
        return [mapped.tell() for _ in reader]


WAYS = [
    load_saved,
    load_embeddings,
    lambda folder: load_captions("hub", folder),
    lambda folder: load_data(DataArguments(data=str(folder), eval_split="none")),
]


def test_files_cut_between_batches_are_refused(saved):
    folder, file = saved
    whole = file.read_bytes()
    ends = batch_ends(file)
    assert len(ends) == 3
    for cut in (*ends, len(whole) - 1, 3, 0):
        file.write_bytes(whole[:cut])
        for load in WAYS:
            with pytest.raises(ValueError, match=f"{file.name} is truncated, so rows are missing"):
                load(folder)
    file.write_bytes(whole[: ends[0]])
    rows = load_from_disk(folder)  # why we look at the end: `datasets` reads what is left
    assert len(rows["train"] if isinstance(rows, dict) else rows) == 2
    file.write_bytes(whole)
    assert all(load(folder) for load in WAYS[:2])


def test_missing_files_and_damaged_lists_are_named(saved):
    folder, file = saved
    state = file.parent / "state.json"
    content = json.loads(state.read_text())
    for damaged in ("", "[]", "{}", json.dumps({**content, "_data_files": [{}]}), json.dumps({"_data_files": [[1]]})):
        state.write_text(damaged)
        with pytest.raises(ValueError, match="state.json is damaged"):
            load_saved(folder)
    state.write_text(json.dumps(content))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=file.name):
        load_saved(folder)
