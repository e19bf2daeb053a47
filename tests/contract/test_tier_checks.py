"""Our tiers keep the contract of stores and pools, and the checks find those that do not."""

import errno
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faulty_disk import CALLS, FaultyFiles

from engine.plugin.testing import check_pool, check_store
from engine.plugin.tiers import Held
from engine_plugins.tiers.disk import DiskStore
from engine_plugins.tiers.host import HostMemory

PATIENT = {"patience": 30.0, "refresh": 0.0, "pause": 0.0}


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_the_disk_which_fails_in_the_end(tmp_path: Path, error: int) -> None:
    files = FaultyFiles()

    def fails() -> None:
        files.faults.errors = dict.fromkeys(set(CALLS) - {"close"}, error)

    check_store(partial(DiskStore, **PATIENT, files=files), str(tmp_path), lasting=True, fails=fails)
    assert len(files.faults.errors) == len(CALLS) - 1


def test_the_memory_of_the_host() -> None:
    check_pool(HostMemory)


# ── others ───────────────────────────────────────────────────────────────────────────────────


class Right:
    """Pages in a dictionary, which is lost with the store."""

    def __init__(self, *, capacity_bytes: int, page_bytes: int, manifest: Any, argument: str) -> None:
        self.bound, self.page_bytes = capacity_bytes, page_bytes
        self.pages: dict[bytes, Any] = {}
        self.lock = threading.RLock()

    def put(self, keys: Any, pages: Any, /) -> list[bool]:
        with self.lock:
            for key, page in zip(keys, pages, strict=True):
                while key not in self.pages and (len(self.pages) + 1) * len(page) > self.bound:
                    self.pages.pop(next(iter(self.pages)))
                self.pages[key] = self.kept(page)
            return self.has(keys)

    def kept(self, page: memoryview) -> Any:
        return bytes(page)

    def get(self, keys: Any, into: Any, /) -> list[bool]:
        with self.lock:
            found = self.has(keys)
            for key, place in zip(keys, into, strict=True):
                if key in self.pages:
                    place[:] = self.pages[key]
            return found

    def has(self, keys: Any, /) -> list[bool]:
        return [key in self.pages for key in keys]

    def drop(self, keys: Any, /) -> None:
        with self.lock:
            for key in keys:
                self.pages.pop(key, None)

    def held(self) -> Held:
        with self.lock:
            return Held(len(self.pages), len(self.pages) * self.page_bytes, self.bound)

    def clear(self) -> str | None:
        with self.lock:
            self.pages.clear()
        return None

    def close(self) -> None:
        pass


def test_a_store_that_forgets_when_it_ends_is_right_and_does_not_last() -> None:
    check_store(Right, "")
    with pytest.raises(AssertionError, match="opened later with the same manifest, has is False for 4 of 4 pages"):
        check_store(Right, "", lasting=True)


class Borrows(Right):
    def kept(self, page: memoryview) -> Any:
        return page  # the caller's


class Boundless(Right):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given | {"capacity_bytes": 1 << 40})

    def held(self) -> Held:
        return Held(len(self.pages), min(len(self.pages) * self.page_bytes, 1 << 20), 1 << 20)


class Undropped(Right):
    def drop(self, keys: Any, /) -> None:
        super().drop([])


class Fussy(Right):
    def drop(self, keys: Any, /) -> None:
        for key in keys:
            del self.pages[key]


class OneScratch(Right):
    """Reads by way of memory that all threads share."""

    def get(self, keys: Any, into: Any, /) -> list[bool]:
        for key, place in zip(keys, into, strict=True):
            self.scratch = self.pages.get(key, b"\0" * len(place))
            time.sleep(1e-4)
            place[:] = self.scratch
        return self.has(keys)


class Shared(Right):
    """By keys alone, whatever the manifest."""

    everyone: dict[bytes, Any] = {}  # noqa: RUF012

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.pages = self.everyone


class Uncleared(Shared):
    everyone: dict[bytes, Any] = {}  # noqa: RUF012

    def __init__(self, *, manifest: Any, **given: Any) -> None:
        super().__init__(manifest=manifest, **given)
        self.pages = dict(self.everyone) if manifest["model"] == "a" else {}

    def put(self, keys: Any, pages: Any, /) -> list[bool]:
        kept = super().put(keys, pages)
        self.everyone.update(self.pages)
        return kept


class Vague(Right):
    def has(self, keys: Any, /) -> list[Any]:
        return [1 if key in self.pages else None for key in keys]


class Short(Right):
    def has(self, keys: Any, /) -> list[bool]:
        return super().has(keys)[1:]


class Wide(Right):
    """Writes behind a page's place, where the memory goes on."""

    def get(self, keys: Any, into: Any, /) -> list[bool]:
        for place in into:
            place.obj[-1] = 0
        return super().get(keys, into)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Borrows, "get gives page 0, and 99.. of 10000 bytes are not as put"),
        (Boundless, "of 312 pages, 31. are given, and there is room for 104"),
        (Undropped, "after drop, has is True for 1 of 1 page"),
        (Fussy, "drop raises KeyError: .*; a store answers instead"),
        (OneScratch, "get gives page .*, and .* of 10000 bytes are not as put"),
        (Shared, "to a store of another manifest, has is True for 4 of 4 pages"),
        (Uncleared, "in a store that is opened after clear.., has is True for 4 of 4 pages"),
        (Vague, r"has gives \[None, None, None, None\], no bools"),
        (Short, "has gives 3 answers for 4 pages"),
        (Wide, "get of page 3 writes behind its place"),
    ],
)
def test_a_wrong_store_is_found(wrong: Callable[..., Any], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_store(wrong, "")


def test_one_that_raises_once_its_medium_fails_is_found() -> None:
    broken: list[bool] = []

    class Raises(Right):
        def held(self) -> Held:
            if broken:
                raise OSError("the disk is gone")
            return super().held()

    check_store(Raises, "")
    with pytest.raises(AssertionError, match="held raises OSError: the disk is gone; a store answers instead"):
        check_store(Raises, "", fails=lambda: broken.append(True))


class Memory:
    def __init__(self, *, capacity_bytes: int, page_bytes: int, manifest: Any, argument: str) -> None:
        self.size, self.held = capacity_bytes, bytearray(capacity_bytes)

    @property
    def memory(self) -> Any:
        return memoryview(self.held)


class Anew(Memory):
    @property
    def memory(self) -> Any:
        self.held = self.held[:]
        return memoryview(self.held)


class Sealed(Memory):
    @property
    def memory(self) -> Any:
        return memoryview(self.held).toreadonly()


class Small(Memory):
    @property
    def memory(self) -> Any:
        return memoryview(self.held)[: self.size - 1]


class Common(Memory):
    common = bytearray(1 << 20)

    @property
    def memory(self) -> Any:
        return memoryview(self.common)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Anew, "memory lies at 0x.*, and then at 0x"),
        (Sealed, "memory is read-only"),
        (Small, "memory has 1048575 bytes; 1048576 were asked for"),
        (Common, "memory keeps 4096 of 1048576 bytes once another pool is written"),
        (Right, "Right has no memory; a Store is for check_store"),
    ],
)
def test_a_wrong_pool_is_found(wrong: Callable[..., Any], said: str) -> None:
    check_pool(Memory)
    with pytest.raises(AssertionError, match=said):
        check_pool(wrong)
