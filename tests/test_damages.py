"""Commands on damaged files: see damages.py, which can also be run by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("damages.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the memory of its children")


def run_cases(*options: str) -> str:
    pytest.importorskip("open_clip")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-10_000:]
    return done.stdout


def test_a_few_damages():
    assert "22 cases in" in run_cases("--cases", "22", "--seed", "few")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, 250))
def test_two_thousand_damages(first):
    assert "250 cases in" in run_cases("--cases", "250", "--first", str(first), "--seed", "many")
