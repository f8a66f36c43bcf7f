"""The processes that `torchrun` or `accelerate launch` started, of which this is one."""

from datetime import timedelta

import torch


def process_state():
    """accelerate's `PartialState`: of this process alone, or of all that share the work."""
    from accelerate import PartialState

    # The fastest process waits for the slowest at the end, perhaps for hours.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
