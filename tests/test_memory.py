import subprocess
import sys

import pytest


SCRIPT = """
import resource, sys, torch
from clipcap_hf.processes import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(30_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

as_it_is = faults()
kept = keep_freed_memory()
faults()  # which fetches it for the last time
print(as_it_is, faults(), kept)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    as_it_is, afterwards, kept = done.stdout.split()
    if kept == "False":
        pytest.skip("not glibc")
    assert int(afterwards) < int(as_it_is) / 10
