"""Processes: the rank of this one among those that `torchrun` started, its workers and threads, and its memory."""

import atexit
import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from torch.utils.data import get_worker_info


Item = TypeVar("Item")
Result = TypeVar("Result")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST = 2**31 - 1
_FEW_CORES = 4  # tried with 2; with many, Python runs too little of the reading at once


def process_state():
    """Return the `PartialState` of accelerate, for this process alone or for all that share the work."""
    from accelerate import PartialState

    # At the end the fastest process waits for the slowest, perhaps for hours.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    leave_at_exit()
    return state


def default_workers(images: int | None, most: int = 4, processes: int = 1, device: torch.device | None = None) -> int:
    """Choose how many processes read images.

    None for a few images, since starting one takes as long as reading dozens. None either where the model has only a
    few cores to share with them: they would take turns, which threads of this process do for less ([`in_threads`]).

    Args:
        images (`int`, *optional*): Number of images, if it is known.
        most (`int`): Largest number of workers.
        processes (`int`): Number of processes on this machine that start workers.
        device (`torch.device`, *optional*): Where the model runs.
    """
    few = images is not None and images < 64
    shares_few_cores = device is not None and device.type == "cpu" and cores() <= _FEW_CORES
    return 0 if few or shares_few_cores else min(most, cores() // processes)


def reading_threads() -> int:
    """Count the threads that read images where no processes do."""
    return min(cores(), _FEW_CORES)


def in_threads(read: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Read items by a few threads, in order; a worker is one of several and reads alone."""
    threads = min(reading_threads(), len(items))
    if threads < 2 or get_worker_info() is not None:
        return list(map(read, items))
    with ThreadPoolExecutor(threads) as pool:  # decoders and resizing let other threads run
        return list(pool.map(read, items))


def cores() -> int:
    """Count the cores that this process may use, which a scheduler or a container can restrict."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
