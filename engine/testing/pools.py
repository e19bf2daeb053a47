"""The contract of pools of memory, for authors by way of engine.plugin.testing. Torch-free.

def test_my_pool():
    check_pool(MyPool)

Left out: whether a device can copy to and from it, which the worker finds at start.
"""

import numpy as np

from engine.plugin.tiers import BuildTier
from engine.testing.stores import MANIFEST


def check_pool(
    build: BuildTier, argument: str = "", *, capacity_bytes: int = 1 << 20, page_bytes: int = 1 << 14
) -> None:
    """Its memory is writable bytes, as many as were asked for, in one piece, at the same address each time, and no
    other pool's."""

    def built() -> memoryview:
        pool = build(capacity_bytes=capacity_bytes, page_bytes=page_bytes, manifest=MANIFEST, argument=argument)
        assert hasattr(pool, "memory"), f"{type(pool).__name__} has no memory; a Store is for check_store"
        memory = pool.memory
        assert isinstance(memory, memoryview), f"memory is {type(memory).__name__}, not a memoryview"
        assert not memory.readonly, "memory is read-only"
        assert memory.contiguous and memory.itemsize == 1, "memory must be bytes, one after the other"
        assert memory.nbytes == capacity_bytes, f"memory has {memory.nbytes} bytes; {capacity_bytes} were asked for"
        first, again = (np.frombuffer(each, np.uint8).ctypes.data for each in (memory, pool.memory))
        assert first == again, f"memory lies at {first:#x}, and then at {again:#x}"
        return memory

    mine, other = (np.frombuffer(built(), np.uint8) for _ in range(2))
    wanted = np.arange(capacity_bytes, dtype=np.uint32).astype(np.uint8)
    mine[:] = wanted
    other[:] = 0
    kept = int((mine == wanted).sum())
    assert kept == capacity_bytes, f"memory keeps {kept} of {capacity_bytes} bytes once another pool is written"
