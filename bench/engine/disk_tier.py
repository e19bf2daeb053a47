"""What the disk tier writes and reads a second, beside what the disk does: past the page cache, and through it.

    python -m bench.engine.disk_tier [--folder DIR] [--page 2097152] [--pages 400] [--threads 8] [--repeat 3]

The floor writes and reads one file, with O_DIRECT, from as many threads as the store reads with, in pieces of a page,
without checksums and copies. Pages are read in an order at random, each once, after the page cache was told to forget
them; `from disk` is what the kernel says it has read for us, over what was asked for. Each line is the median of the
repetitions, which take turns.
"""

import argparse
import mmap
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine_plugins.tiers.disk.store import DiskStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write; default: the system's temporary directory")
    parser.add_argument("--page", type=int, default=2 << 20, help="bytes of a page")
    parser.add_argument("--pages", type=int, default=400)
    parser.add_argument("--threads", type=int, default=8, help="of the floor")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    size = given.page * given.pages
    order = random.Random(0).sample(range(given.pages), given.pages)
    rates: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for _ in range(given.repeat):
        for name, measure in (
            ("floor", floor),
            ("store, past the page cache", lambda *rest: store(*rest, direct=True)),
            ("store, through it", lambda *rest: store(*rest, direct=False)),
        ):
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                wrote, read, share = measure(folder, given.page, order, given.threads)
            rates[name].append((size / wrote / 1e9, size / read / 1e9, share))
    print(f"{given.pages} pages of {given.page} bytes")
    for name, each in rates.items():
        wrote, read, share = (statistics.median(column) for column in zip(*each, strict=True))
        print(f"{name:<28} written {wrote:6.2f} GB/s   read {read:6.2f} GB/s   from disk {100 * share:4.0f} %")


def floor(folder: str, page: int, order: list[int], threads: int) -> tuple[float, float, float]:
    """Seconds to write, and to read, and the share that came from the disk."""
    path = os.path.join(folder, "floor")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    buffers = [mmap.mmap(-1, page) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(os.urandom(page))

    def each(work: Callable[[mmap.mmap, int], object]) -> float:
        def part(thread: int) -> None:
            for number in order[thread::threads]:
                work(buffers[thread], number * page)

        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(threads)))
        return time.perf_counter() - began

    wrote = each(lambda buffer, at: os.pwrite(descriptor, buffer, at))
    before = read_so_far()
    read = each(lambda buffer, at: os.preadv(descriptor, [buffer], at))
    share = (read_so_far() - before) / (page * len(order))
    os.close(descriptor)
    return wrote, read, share


def store(folder: str, page: int, order: list[int], threads: int, *, direct: bool) -> tuple[float, float, float]:
    """As `floor`, of our store, which includes what is still to be written when it has taken the last page."""
    kept = DiskStore(
        capacity_bytes=4 * page * len(order) + (1 << 30),
        page_bytes=page,
        manifest={},
        argument=folder,
        direct=direct,
        patience=600.0,
    )
    keys = [number.to_bytes(32, "little") for number in order]
    sources = [memoryview(bytearray(os.urandom(page))) for _ in range(8)]
    pages = [sources[number % 8] for number in order]
    into = [memoryview(bytearray(page)) for _ in order]
    for view in into:  # memory that is there, as that of a host tier is
        view[:] = sources[0]
    began = time.perf_counter()
    assert all(kept.put(keys, pages))
    forget(folder)
    wrote = time.perf_counter() - began
    random.Random(1).shuffle(keys)
    before = read_so_far()
    began = time.perf_counter()
    assert all(kept.get(keys, into))
    read = time.perf_counter() - began
    share = (read_so_far() - before) / (page * len(order))
    assert into[0] == sources[int.from_bytes(keys[0], "little") % 8]
    kept.close()
    return wrote, read, share


def forget(folder: str) -> None:
    """Write out what is not yet, and drop it from the page cache."""
    for path in Path(folder).rglob("*.kv"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_so_far() -> int:
    """Bytes that the kernel has read from disks for this process."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


if __name__ == "__main__":
    main()
