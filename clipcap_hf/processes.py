"""This process: its place among those that `torchrun` started, and the memory that it keeps."""

import atexit
import ctypes
import sys
from datetime import timedelta
from functools import cache

import torch


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST = 2**31 - 1


def process_state():
    """accelerate's `PartialState`: of this process alone, or of all that share the work."""
    from accelerate import PartialState

    # The fastest process waits for the slowest at the end, perhaps for hours.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    leave_at_exit()
    return state


@cache
def leave_at_exit():
    """Leave the process group while Python still runs: a process that ends before gloo's threads do may be aborted."""
    atexit.register(_leave)


def _leave():
    if hasattr(sys, "last_value"):  # after an error the others may wait in a collective, and NCCL would wait for them
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the next step, rather than give it back to the system.

    Gradients and activations are freed and allocated again in every training step; fetched from the system each time, page by
    page, they cost a CPU up to a sixth of the step. The process stays as large as it once was.

    Returns:
        `bool`: Whether this could be had, which is so with glibc (Linux).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(M_MMAP_THRESHOLD, LARGEST), mallopt(M_TRIM_THRESHOLD, LARGEST)])
