"""The process group is left while Python still runs, and a process that fails takes the others with it."""

import subprocess
import sys
import threading

import pytest
import torch
from clipcap_hf import processes
from clipcap_hf.processes import default_workers, in_threads
from torch.utils.data import DataLoader, Dataset


SCRIPT = """
import atexit, os, sys
import torch

# Called last, since it is registered first. (`print` of two processes may mix.)
atexit.register(lambda: os.write(1, b"in a group at the end: %d;" % torch.distributed.is_initialized()))

import clipcap_hf
from clipcap_hf.processes import process_state
from accelerate.utils import gather_object

state = process_state()
assert gather_object([state.process_index]) == [0, 1]
if sys.argv[1] == "fails" and state.process_index == 1:
    raise ValueError("no luck")
if sys.argv[1] == "fails":
    gather_object([0])
"""


@pytest.mark.parametrize("how", ["ends", "fails"])
def test_the_end_of_processes(tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, tmp_path / "script.py", how], capture_output=True, text=True, timeout=300)
    if how == "ends":
        assert done.returncode == 0, done.stderr
        assert done.stdout == 2 * "in a group at the end: 0;"
    else:
        assert done.returncode != 0
        assert "ValueError: no luck" in done.stderr


def test_a_model_that_shares_few_cores_has_no_workers_beside_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for there, expected in ((2, (0, 2)), (4, (0, 4)), (16, (4, 4))):
        monkeypatch.setattr(processes, "cores", lambda there=there: there)
        assert (default_workers(1000, device=cpu), default_workers(1000, device=gpu)) == expected
        assert default_workers(10, device=cpu) == default_workers(10, device=gpu) == 0


def test_threads_read_side_by_side_and_keep_the_order(monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 2)
    both = threading.Barrier(2, timeout=30)

    def read(number: int) -> int:
        both.wait()  # breaks unless two are here at once
        return 10 * number

    assert list(in_threads(read, range(6))) == [0, 10, 20, 30, 40, 50]


class ThreadsOfReaders(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return set(in_threads(lambda _: threading.get_ident(), range(50))) == {threading.get_ident()}


def test_a_worker_reads_alone():
    assert list(DataLoader(ThreadsOfReaders(), batch_size=None, num_workers=1)) == [True]
