"""The processes that `torchrun` or `accelerate launch` started, of which this is one."""

import atexit
import sys
from datetime import timedelta
from functools import cache

import torch


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
