"""What a machine's bus and disk give, measured bare: the floors of pages that come from host memory or a disk."""

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

READERS = 8
BLOCK = 2 << 20


def from_host_rate(size: int) -> float:
    """Bytes a second from pinned memory to the GPU, the best of five copies of `size` bytes; on a CPU, of a memcpy."""
    import torch

    cuda = torch.cuda.is_available()
    source = torch.ones(size, dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty(size, dtype=torch.uint8, device="cuda" if cuda else "cpu")
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - began))
    return best


def from_disk_rate(folder: Path, size: int) -> tuple[float, str]:
    """Bytes a second of a new file of `size` bytes in `folder`, read by several threads past the page cache; and how,
    where a file system allows no such reads."""
    path = folder / "floor"
    block = mmap.mmap(-1, BLOCK)
    block.write(os.urandom(BLOCK))
    with path.open("wb", buffering=0) as file:
        for _ in range(size // BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    how, flags = "O_DIRECT", os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    try:
        os.close(os.open(path, flags))
    except OSError:
        how, flags = "page cache dropped", os.O_RDONLY
        drop_page_cache()

    def read(first: int) -> int:
        buffer, file = mmap.mmap(-1, BLOCK), os.open(path, flags)
        try:
            places = range(first * BLOCK, size // BLOCK * BLOCK, READERS * BLOCK)
            return sum(os.preadv(file, [buffer], place) for place in places)
        finally:
            os.close(file)

    began = time.perf_counter()
    with ThreadPoolExecutor(READERS) as threads:
        count = sum(threads.map(read, range(READERS)))
    rate = count / (time.perf_counter() - began)
    path.unlink()
    return rate, how


def file_system(folder: Path) -> str:
    """The kind and the device of the file system that `folder` is in, such as "ext4 on /dev/vda"; a "tmpfs" is memory.

    "unknown" where the system does not say."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    path = folder.resolve()
    above = [(len(place), kind, device) for device, place, kind, *_ in mounts if path.is_relative_to(place)]
    _, kind, device = max(above, default=(0, "unknown", "nothing"), key=lambda each: each[0])
    return f"{kind} on {device}"


def drop_page_cache() -> bool:
    """Whether the system has forgotten what it knows of files; only root may ask for that."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True
