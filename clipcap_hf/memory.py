"""Memory that torch frees on a CPU stays with the process."""

import ctypes
import sys


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST = 2**31 - 1


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
