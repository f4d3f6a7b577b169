"""Memory of the host, for training on CPUs."""

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """
    Lets glibc keep what is freed, for the next tensor, instead of handing it back to the system.

    Activations of tens of MiB are mapped and unmapped at each operation otherwise, and the kernel clears every page
    again: of a step of base size on a CPU that was a sixth (docs/performance.md). The process stays as large as it
    once was, so this is for processes that train on the CPU.

    Returns:
        Whether there is a glibc to tell.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # never map by itself, never give back, and take 64 MiB from the system at a time
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26}
    return all([mallopt(name, value) == 1 for name, value in wanted.items()])
