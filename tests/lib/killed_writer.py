"""python killed_writer.py FOLDER ROUNDS SEED: store pages on a disk, and be killed in the middle, again and again.

Each round forks two processes that share the folder. Each reads all that the rounds before have left, tells how much of
it was right, and then writes, evicts and drops pages until SIGKILL comes to both. The last line is what an undisturbed
look finds, and the most pages that a process found. It needs no torch, so that a round takes milliseconds.
"""

import os
import random
import select
import signal
import sys
import time
from hashlib import blake2b

from engine_plugins.tiers.disk.store import DiskStore

PAGE = 20_000  # no whole blocks
KEYS = 300
CAPACITY = 4 << 20  # less than all pages


def key_of(number: int) -> bytes:
    return blake2b(number.to_bytes(4, "little")).digest()[:32]


def page_of(number: int) -> bytes:
    return (blake2b(number.to_bytes(4, "little"), person=b"page").digest() * (PAGE // 64 + 1))[:PAGE]


def opened(folder: str) -> DiskStore:
    return DiskStore(
        capacity_bytes=CAPACITY, page_bytes=PAGE, manifest={"model": "killed"}, argument=folder, patience=60.0
    )


def checked(store: DiskStore) -> tuple[int, int]:
    """How many pages are found, and how many of them are not what was put."""
    keys, into = [key_of(number) for number in range(KEYS)], [bytearray(PAGE) for _ in range(KEYS)]
    found = store.get(keys, [memoryview(page) for page in into])
    pages = [(number, page) for number, page in enumerate(into) if found[number]]
    return len(pages), sum(bytes(page) != page_of(number) for number, page in pages)


def write_for_ever(store: DiskStore, choose: random.Random) -> None:
    while True:
        numbers = [choose.randrange(KEYS) for _ in range(4)]
        store.put([key_of(number) for number in numbers], [memoryview(page_of(number)) for number in numbers])
        if choose.random() < 0.1:
            store.drop([key_of(choose.randrange(KEYS))])


def begun(folder: str, choose: random.Random) -> tuple[int, int]:
    """A process that writes, and where it says first what it found."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store = opened(folder)
            os.write(writing, "{} {}\n".format(*checked(store)).encode())
            write_for_ever(store, choose)
        finally:
            os._exit(1)
    os.close(writing)
    return child, reading


def one_round(folder: str, seed: int) -> list[str]:
    """What the processes say before they write; they are killed then, at moments at random."""
    processes = [begun(folder, random.Random(2 * seed + number)) for number in range(2)]
    said = [
        os.read(reading, 100).decode() if select.select([reading], [], [], 60.0)[0] else "" for _, reading in processes
    ]
    for child, reading in processes:
        time.sleep(random.Random(seed).uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
    return said


def main(folder: str, rounds: int, seed: int) -> None:
    most = 0
    for number in range(rounds):
        for said in one_round(folder, seed * rounds + number):
            found, wrong = map(int, said.split())
            assert not wrong, f"round {number}: {wrong} of {found} pages are wrong"
            most = max(most, found)
    assert "torch" not in sys.modules
    store = opened(folder)
    found, wrong = checked(store)
    again = store.put([key_of(KEYS)], [memoryview(page_of(KEYS))])
    print(found, wrong, most, store.counts()["errors"], again[0])
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
