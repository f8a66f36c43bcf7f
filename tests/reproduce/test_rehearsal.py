"""The rehearsal as a user runs it: every stage of every table, killed at any instant, over several processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from clipcap_hf.reproduce.table import FILES


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
COMMAND = ["reproduce", "--rehearse", "--device", "cpu"]
KILLS = 10


def start(out, *more, launcher=("-m", "clipcap_hf.cli")):
    words = [sys.executable, *launcher, *COMMAND, "--out", str(out), *more]
    return subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(out, *more, **kwargs):
    process = start(out, *more, **kwargs)
    printed, said = process.communicate(timeout=3000)
    assert process.returncode == 0, said
    return printed, said


def table(out):
    """Return the table's file, without the name of the folder, which the choices hold."""
    return [(out / name).read_text(encoding="utf-8").replace(str(out), "OUT") for name in FILES]


@pytest.mark.slow
def test_every_stage_of_every_table_runs_in_minutes(tmp_path):
    started = time.monotonic()
    printed, said = finish(tmp_path / "out")
    print(f"{time.monotonic() - started:.0f} s")
    stages = [line.split()[1] for line in said.splitlines() if line.endswith(" ...")]
    kinds = [stage.split("-")[0] for stage in stages]
    assert (kinds.count("embed"), kinds.count("train"), kinds.count("evaluate")) == (2, 4, 12)
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert len([row for row in rows if row["headline"]]) == 12
    assert all(row["verified"] is None for row in rows)
    assert all(row["numbers"] for row in rows if row["metric"] != "spice")
    assert "REHEARSAL" in printed


@pytest.mark.slow
def test_ten_kills_at_random_instants_end_with_the_same_table(tmp_path):
    few = ["--table", "coco", "nocaps", "--variant", "mlp", "--tokenizer", "python"]
    started = time.monotonic()
    process = start(tmp_path / "whole", *few)
    for line in process.stderr:
        if line.rstrip().endswith(" ..."):  # the first stage begins
            break
    imports = time.monotonic() - started
    assert process.communicate(timeout=3000) and process.returncode == 0
    work = time.monotonic() - started - imports

    rng, stages = random.Random(0), []
    for _ in range(KILLS):  # each session gets about a tenth of the work done, so that kills hit every stage
        process = start(tmp_path / "killed", *few)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=imports + rng.uniform(0.02, 0.12) * work)
        os.kill(process.pid, signal.SIGKILL)
        said = process.communicate()[1]
        stages += [line for line in said.splitlines() if line.endswith(" ...")][-1:]
    print(*stages, sep="\n")
    assert len(set(stages)) >= 3
    finish(tmp_path / "killed", *few)
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.slow
def test_two_processes_divide_the_stages_and_end_with_a_table(tmp_path):
    few = ["--table", "coco", "nocaps", "--variant", "mlp", "--tokenizer", "python"]
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "clipcap_hf.cli")
    finish(tmp_path / "two", *few, launcher=torchrun)
    rows = json.loads((tmp_path / "two" / "table.json").read_text())["rows"]
    assert all(row["numbers"] for row in rows if row["metric"] not in ("spice", "meteor"))
    assert len(list((tmp_path / "two" / "captioners").iterdir())) == 1
