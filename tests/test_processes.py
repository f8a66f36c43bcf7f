"""The process group is left while Python still runs, and a process that fails takes the others with it."""

import subprocess
import sys

import pytest


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
