"""Copies between the device and the host, many of them in one call of CUDA's runtime.

torch issues one copy a call, and each takes and gives back Python's lock several times. Beside a thread that launches
steps, and others that use a disk, such a thread waits for the lock more often than for the bus. One call for all copies
of a part takes the lock once. CUDA has that call (cudaMemcpyBatchAsync) since 12.8; 13.0 dropped an argument, the index
of the copy that failed.

    addresses [N] of device and host, bytes [N] ──> one call ──> stream

Left out: what is copied, and when (transfers.py).
"""

import ctypes
from collections.abc import Callable

import numpy as np
import torch

LEAST_DRIVER = 12_080  # CUDA 12.8
# of cudaMemcpyAttributes: srcAccessOrder (1: as the stream has it), two locations (type, id), which are told of managed
# memory alone, and flags
ATTRIBUTES = (ctypes.c_int * 6)(1, 0, 0, 0, 0, 0)
FIRST = (ctypes.c_size_t * 1)(0)  # the attributes hold from this copy on

Batch = Callable[[np.ndarray, np.ndarray, np.ndarray, int], None]


def batched() -> Batch | None:
    """What copies to addresses from others, so many bytes each (three arrays [N] uint64), on a stream that is not the
    default one: its handle. In what order is not said. It raises RuntimeError for what CUDA refuses. None where the
    CUDA that torch has, or the driver, does not know such a call."""
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if version < (12, 8):
        return None
    driver = ctypes.c_int()
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{version[0]}")  # which torch has loaded
        call = runtime.cudaMemcpyBatchAsync
        runtime.cudaDriverGetVersion(ctypes.byref(driver))
    except (OSError, AttributeError):
        return None
    if driver.value < LEAST_DRIVER:
        return None
    call.restype = ctypes.c_int
    failed = () if version >= (13, 0) else (ctypes.byref(ctypes.c_size_t()),)

    def copy(to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        arrays = [np.ascontiguousarray(each, np.uint64) for each in (to, source, sizes)]
        pointers = [ctypes.c_void_p(each.ctypes.data) for each in arrays]
        count = ctypes.c_size_t(len(sizes))
        error = call(*pointers, count, ATTRIBUTES, FIRST, ctypes.c_size_t(1), *failed, ctypes.c_void_p(stream))
        if error:
            raise RuntimeError(f"cudaMemcpyBatchAsync fails with error {error}")

    return copy
