"""Processes: the rank of this one among those that `torchrun` started, its workers, and the memory that it keeps."""

import atexit
import ctypes
import os
import sys
from datetime import timedelta
from functools import cache

import torch


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST = 2**31 - 1


def process_state():
    """Return the `PartialState` of accelerate, for this process alone or for all that share the work."""
    from accelerate import PartialState

    # At the end the fastest process waits for the slowest, perhaps for hours.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    leave_at_exit()
    return state


def default_workers(images: int | None, most: int = 4, processes: int = 1) -> int:
    """Choose how many processes read images: none for a few, since starting one takes as long as reading dozens.

    Args:
        images (`int`, *optional*): Number of images, if it is known.
        most (`int`): Largest number of workers.
        processes (`int`): Number of processes on this machine that start workers.
    """
    few = images is not None and images < 64
    return 0 if few else min(most, usable_cores() // processes)


def usable_cores() -> int:
    """Count the CPU cores that this process may use: fewer than the machine's, if a scheduler allots them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def leave_at_exit():
    """Leave the process group while Python still runs: a process that ends before gloo's threads do may be aborted."""
    atexit.register(_leave)


def _leave():
    # After an error the other processes may hang in a collective, and NCCL would wait for them.
    if hasattr(sys, "last_value"):
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    Every training step frees and allocates gradients and activations. Fetching that memory from the system again, page
    by page, costs a CPU up to a sixth of the step. In exchange, the process never shrinks.

    Returns:
        `bool`: Whether the C library can do this; glibc (Linux) can.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(M_MMAP_THRESHOLD, LARGEST), mallopt(M_TRIM_THRESHOLD, LARGEST)])
