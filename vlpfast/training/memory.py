"""How the process gets its memory from the system."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tells the C library to keep what is freed for the next step; False where it cannot be told (only glibc can).

    A step on a CPU frees its activations and asks for as much again. glibc gives large blocks back at once, so every step would
    get them from the system anew, page by page and cleared: about a tenth of the step's time. Kept, the process holds what its
    largest step needed until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
