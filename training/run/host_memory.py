"""Settings of the memory allocator for training on CPUs."""

import ctypes
import sys

# constants of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """
    Lets glibc keep freed memory for the next tensor instead of returning it to the system.

    Otherwise activations of tens of MiB are mapped and unmapped at each operation, and the kernel clears every page
    again, which took a sixth of a base-size step on a CPU (docs/performance.md). The process does not shrink again, so
    this is only for processes that train on the CPU.

    Returns:
        Whether it worked; False without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # no mmap, never return memory, and request 64 MiB from the system at a time
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26}
    return all([mallopt(name, value) == 1 for name, value in wanted.items()])
