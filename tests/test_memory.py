import subprocess
import sys

import pytest
from PIL import Image


FAULTS = """
import resource, sys, torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(30_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
KEEP = """
from clipcap_hf.processes import keep_freed_memory

as_it_is = faults()
kept = keep_freed_memory()
faults()  # which fetches it for the last time
print(as_it_is, faults(), kept)
"""
CAPTION = """
from clipcap_hf.cli import main
from clipcap_hf.processes import keep_freed_memory

as_it_is = faults()
main(["caption", "--model", "emoji-mini", sys.argv[1]])
faults()
print(as_it_is, faults(), keep_freed_memory())
"""


def run(script: str, *arguments: str) -> tuple[int, int]:
    """Return the page faults of work before and after freed memory is kept."""
    command = [sys.executable, "-c", FAULTS + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    as_it_is, afterwards, kept = done.stdout.splitlines()[-1].split()
    if kept == "False":
        pytest.skip("not glibc")
    return int(as_it_is), int(afterwards)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again():
    as_it_is, afterwards = run(KEEP)
    assert afterwards < as_it_is / 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_caption_keeps_freed_memory(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    as_it_is, afterwards = run(CAPTION, str(tmp_path / "red.png"))
    assert afterwards < as_it_is / 10
