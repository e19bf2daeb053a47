"""The contract of stores of KV pages, for authors by way of engine.plugin.testing. Torch-free.

def test_my_store(tmp_path):
    check_store(MyStore, str(tmp_path), lasting=True)

Left out: processes that end without `close`, and the bound of several manifests together.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from threading import Barrier

import numpy as np

from engine.errors import ConfigError, counted
from engine.plugin.tiers import KEY_BYTES, BuildTier, Held, Manifest, Store

MANIFEST: Manifest = {"model": "a", "dtype": "bfloat16", "page_size": 16, "place": [0, 1]}
FEW = range(4)  # pages that any store has room for
THREADS = 8
GUARD = 64  # bytes between the places that pages are read into


class _Asked:
    """A store whose every answer is looked at: none may raise, or be of another kind than the contract says."""

    def __init__(self, store: Store, page_bytes: int) -> None:
        self.store, self.page_bytes = store, page_bytes

    def put(self, numbers: Sequence[int]) -> list[bool]:
        # Once `put` has returned, the memory is used for something else.
        pages = [bytearray(_page(number, self.page_bytes)) for number in numbers]
        with _never_raises("put"):
            kept = self.store.put(_keys(numbers), [memoryview(page) for page in pages])
        for page in pages:
            page[:] = bytes(len(page))
        return _truths("put", kept, len(numbers))

    def get(self, numbers: Sequence[int]) -> list[bool]:
        """Which pages are given. Each that is must be what was put, and nothing beside its place may change."""
        stride = self.page_bytes + GUARD
        memory = bytearray(b"\xa5" * (stride * len(numbers)))
        places = [memoryview(memory)[at * stride : at * stride + self.page_bytes] for at in range(len(numbers))]
        with _never_raises("get"):
            given = self.store.get(_keys(numbers), places)
        _truths("get", given, len(numbers))
        for number, here, place in zip(numbers, given, places, strict=True):
            wrong = np.count_nonzero(
                np.frombuffer(place, np.uint8) != np.frombuffer(_page(number, len(place)), np.uint8)
            )
            assert not (here and wrong), (
                f"get gives page {number}, and {wrong} of {counted(len(place), 'byte')} are not as put"
            )
        for at in range(len(numbers)):
            end = (at + 1) * stride
            assert memory[end - GUARD : end] == b"\xa5" * GUARD, f"get of page {at} writes behind its place"
        return given

    def has(self, numbers: Sequence[int]) -> list[bool]:
        with _never_raises("has"):
            return _truths("has", self.store.has(_keys(numbers)), len(numbers))

    def drop(self, numbers: Sequence[int]) -> None:
        with _never_raises("drop"):
            self.store.drop(_keys(numbers))

    def held(self) -> Held:
        with _never_raises("held"):
            held = self.store.held()
        assert isinstance(held, Held), f"held() gives {type(held).__name__}, not engine.plugin.tiers.Held"
        assert held.pages >= 0 and held.bytes >= 0, f"held() says {held.pages} pages of {held.bytes} bytes"
        assert held.bytes <= held.bound, f"held() says {held.bytes} bytes, more than its bound of {held.bound}"
        wrong = {name: count for name, count in held.counts.items() if type(count) is not int or count < 0}
        assert not wrong, f"counts of held() are integers of 0 or more, not {wrong}"
        return held

    def clear(self) -> str | None:
        with _never_raises("clear"):
            why = self.store.clear()
        assert why is None or isinstance(why, str), f"clear gives {why!r}; it gives None, or says why not"
        return why

    def holds(self, numbers: Sequence[int], where: str, wanted: bool = True) -> None:
        """It has and gives all of these pages; none of them where that is `wanted` to be False."""
        for name, found in (("has", self.has(numbers)), ("get", self.get(numbers))):
            count = found.count(not wanted)
            assert not count, f"{where}, {name} is {not wanted} for {count} of {counted(len(numbers), 'page')}"


def check_store(
    build: BuildTier,
    argument: str,
    *,
    lasting: bool = False,
    fails: Callable[[], None] | None = None,
    capacity_bytes: int = 1 << 20,
    page_bytes: int = 10_000,
) -> None:
    """It gives what was put and nothing else, within its bound and to several threads at a time, and raises nothing.

    `argument` is one where nothing is held yet, and which nobody else uses. `lasting` says that pages outlive a store:
    another of the same manifest then gives them, after `close`. `fails` is called last and breaks the medium (a disk
    has no room, a host does not answer): from then on each method still answers."""

    @contextmanager
    def opened(manifest: Manifest = MANIFEST) -> Iterator[_Asked]:
        store = build(capacity_bytes=capacity_bytes, page_bytes=page_bytes, manifest=manifest, argument=argument)
        assert not hasattr(store, "memory"), "a Pool was built, not a Store: check_pool checks it"
        try:
            yield _Asked(store, page_bytes)
        finally:
            with _never_raises("close"):
                store.close()

    with opened() as store:
        _check_one(store)
        _check_threads(store)
        _check_bound(store, capacity_bytes)
        _check_clear(store)
        assert all(store.put(FEW)), "after clear(), put keeps nothing"
        with opened({**MANIFEST, "model": "b"}) as unlike:
            unlike.holds(FEW, "to a store of another manifest", wanted=False)
        store.holds(FEW, "after a store of another manifest was opened and closed")
    with opened(dict(sorted(MANIFEST.items()))) as later:  # in another order
        if lasting:
            later.holds(FEW, "in a store that is opened later with the same manifest")
        later.get(FEW)
        _check_clear(later)
    with opened() as last:
        last.holds(FEW, "in a store that is opened after clear()", wanted=False)
        assert all(last.put(FEW)), "put keeps nothing in a store that is opened after clear()"
        if fails is not None:
            fails()
            _check_failing(last)
    if fails is not None:
        try:
            with opened() as broken:
                _check_failing(broken)
        except ConfigError:  # something that the user has to change
            pass


def _check_one(store: _Asked) -> None:
    """What is put, had, given and dropped, by one thread."""
    assert store.put([]) == store.get([]) == store.has([]) == []
    store.holds(FEW, "before anything is put", wanted=False)
    before = store.held()
    assert not before.pages, f"held() says {before.pages} pages before anything is put; take an argument of its own"
    kept = store.put(FEW)
    assert all(kept), f"put keeps {sum(kept)} of {counted(len(kept), 'page')}, though there is room"
    store.holds(FEW, "after put")
    assert all(store.put(FEW)), "put is False for pages that are kept already"
    held = store.held()
    assert held.pages == len(FEW), f"held() says {held.pages} pages, and {len(FEW)} were put, twice"
    unknown = [7, FEW[0], 8]
    for name, found in (("has", store.has(unknown)), ("get", store.get(unknown))):
        assert found == [False, True, False], f"{name} of a page that is there between two that are not says {found}"
    assert store.get(list(reversed(FEW))) == [True] * len(FEW), "get finds fewer pages in another order"
    store.drop([FEW[1], 7])
    store.holds([FEW[1]], "after drop", wanted=False)
    store.holds([FEW[0], *FEW[2:]], "after another page was dropped")
    assert store.held().pages == len(FEW) - 1, f"held() says {store.held().pages} pages after {len(FEW)} less one"
    assert store.put([FEW[1]]) == [True], "put does not keep a page again that was dropped"
    store.holds(FEW, "after a page was dropped and put again")


def _check_bound(store: _Asked, capacity_bytes: int) -> None:
    """Three times as much as there is room for."""
    many = range(100, 100 + 3 * (capacity_bytes // store.page_bytes))
    counts = store.held().counts
    for at in range(0, len(many), 8):
        store.put(many[at : at + 8])
        held = store.held()
        assert held.bound <= capacity_bytes, f"held() has the bound {held.bound}, and was given {capacity_bytes} bytes"
        fallen = {name: (count, held.counts.get(name)) for name, count in counts.items()
                  if held.counts.get(name, -1) < count}  # fmt: skip
        assert not fallen, f"counts of held() only grow, and these fell: {fallen}"
        counts = held.counts
    given, room = sum(store.get(many)), capacity_bytes // store.page_bytes
    assert 0 < given <= room, f"of {counted(len(many), 'page')}, {given} are given, and there is room for {room}"


def _check_threads(store: _Asked) -> None:
    """Several threads at a time, on the same pages and on pages of their own."""
    together = Barrier(THREADS)

    def use(thread: int) -> None:
        own = range(1000 + 2 * thread, 1002 + 2 * thread)
        together.wait()
        for _ in range(12):
            store.put([*own, *FEW])
            store.get([*FEW, *own])
            store.held()
            store.drop([own[0], *FEW])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        with ThreadPoolExecutor(THREADS) as threads:
            for done in [threads.submit(use, thread) for thread in range(THREADS)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert all(store.put(FEW)), f"put keeps nothing after {THREADS} threads used it"
    store.holds(FEW, f"after {THREADS} threads used it")


def _check_clear(store: _Asked) -> None:
    why = store.clear()
    assert not why, f"clear says why pages may be given again, and nothing is wrong with the medium: {why}"
    store.holds(FEW, "after clear()", wanted=False)
    assert not store.held().pages, f"held() says {store.held().pages} pages after clear()"


def _check_failing(store: _Asked) -> None:
    """Whatever it answers, it answers."""
    for numbers in (FEW, range(50, 54)):
        store.put(numbers)
        store.has(numbers)
        store.get(numbers)
        store.drop(numbers)
        store.held()
    store.clear()


# ── pages ────────────────────────────────────────────────────────────────────────────────────


def _keys(numbers: Sequence[int]) -> list[bytes]:
    return [blake2b(number.to_bytes(4, "little"), digest_size=KEY_BYTES).digest() for number in numbers]


def _page(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def _truths(name: str, found: object, count: int) -> list[bool]:
    assert isinstance(found, list) and all(type(each) is bool for each in found), f"{name} gives {found!r}, no bools"
    assert len(found) == count, f"{name} gives {len(found)} answers for {count} pages"
    return found


@contextmanager
def _never_raises(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{name} raises {type(error).__name__}: {error}; a store answers instead") from error
