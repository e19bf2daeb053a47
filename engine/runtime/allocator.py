"""How the allocator gives memory back: blocks of a MiB and more go to the system as soon as they are free.

Without this, the C library of Linux (glibc) learns from the first large block that is freed to keep such blocks on its
heap. Bodies of requests that come and go then leave holes, which small blocks behind them keep from being given back.
And what a process has once it serves, it keeps: the garbage collector need not look through all of that again.
Left out: other C libraries, which are left as they are.
"""

import ctypes
import gc
import sys

M_MMAP_THRESHOLD = -3  # of <malloc.h>
MAPPED_FROM = 2**20  # bytes


def give_back_large_blocks() -> bool:
    """Called once in each process that handles requests; whether the C library knows of this."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, MAPPED_FROM) == 1


def keep_for_good() -> None:
    """Called once a process that handles requests serves: a full collection would go through modules, vocabulary and
    routes while all streams wait."""
    gc.collect()
    gc.freeze()
