"""Host memory for KV pages: anonymous, in huge pages where the system has them, and all there from the start.

The system gives memory when it is first written. That costs about 0.4 s a GiB on one thread, and would fall into the
first requests, so several threads write it at once here. The worker registers it with the device, which then copies
without a buffer between. Left out: memory near the device's own processor (NUMA); memory that outlives the process.
"""

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

from engine.plugin.tiers import Manifest

PIECE_BYTES = 256 << 20  # that one thread fills at a time
MOST_THREADS = 16


class HostMemory:
    """`capacity_bytes` of memory, filled with zeros."""

    def __init__(self, *, capacity_bytes: int, page_bytes: int, manifest: Manifest, argument: str) -> None:
        self._map = mmap.mmap(-1, capacity_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(self._map)
        self._fill()

    @property
    def memory(self) -> memoryview:
        return self._memory

    def _fill(self) -> None:
        anchor = ctypes.c_char.from_buffer(self._map)
        address, size = ctypes.addressof(anchor), len(self._map)
        del anchor  # it holds the map open
        pieces = range(0, size, PIECE_BYTES)
        with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)), len(pieces))) as threads:
            for _ in threads.map(lambda at: ctypes.memset(address + at, 0, min(PIECE_BYTES, size - at)), pieces):
                pass
