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
#: In which stages the run is killed: checking, embedding, training, and each evaluation but the last.
KILLED = (0, 1, 1, 2, 2, 2, 2, 3, 4, 5)


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
    _, said = finish(tmp_path / "whole", *few)
    stages = [line for line in said.splitlines() if line.endswith(" ...")]
    costs = json.loads((tmp_path / "whole" / "record.json").read_text())["stages"]
    seconds = [costs.get(line.split()[1], {"seconds": 1})["seconds"] for line in stages]

    rng, killed = random.Random(0), []
    for stage in KILLED:
        killed.append(kill_in(stages[stage:], rng.uniform(0, seconds[stage]), tmp_path / "killed", *few))
    print(*killed, sep="\n")
    assert len(set(killed)) >= 5
    _, said = finish(tmp_path / "killed", *few)
    assert stages[-1] in said.splitlines() and stages[1] not in said.splitlines()  # it went on, and did not begin anew
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def kill_in(stages, seconds, out, *more):
    """Start a run, kill it so many seconds after it began one of the stages, and return the last one that it began."""
    process = start(out, *more)
    said = []
    for line in process.stderr:
        said.append(line.rstrip())
        if said[-1] in stages:
            break
    time.sleep(seconds)
    assert process.poll() is None, said
    os.kill(process.pid, signal.SIGKILL)
    said += process.stderr.read().splitlines()
    process.communicate()
    return [line for line in said if line.endswith(" ...")][-1]


@pytest.mark.slow
def test_two_processes_divide_the_stages_and_end_with_a_table(tmp_path):
    few = ["--table", "coco", "nocaps", "--variant", "mlp", "--tokenizer", "python"]
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "clipcap_hf.cli")
    finish(tmp_path / "two", *few, launcher=torchrun)
    rows = json.loads((tmp_path / "two" / "table.json").read_text())["rows"]
    assert all(row["numbers"] for row in rows if row["metric"] not in ("spice", "meteor"))
    assert len(list((tmp_path / "two" / "captioners").iterdir())) == 1
