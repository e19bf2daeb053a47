"""The disk tier on a disk that does what it is asked: what it keeps, for whom, and within which bound."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plugin import ConfigError
from engine.plugin.registry import Plugins, resolve
from engine_plugins.tiers.disk import layout as layouts
from engine_plugins.tiers.disk.layout import Entry, Layout, digest_of, entries_of, entry_bytes, page_checksum
from engine_plugins.tiers.disk.store import DiskStore

PAGE = 10_000  # no whole blocks
ROOM = 1 << 20
LIB = Path(__file__).parents[2] / "lib"
Open = Callable[..., DiskStore]


def key(number: int) -> bytes:
    return blake2b(number.to_bytes(4, "little"), digest_size=32).digest()


def page(number: int, size: int = PAGE) -> memoryview:
    return memoryview(random.Random(number).randbytes(size))


def put(store: DiskStore, *numbers: int) -> list[bool]:
    return store.put([key(number) for number in numbers], [page(number) for number in numbers])


def got(store: DiskStore, *numbers: int) -> list[bool]:
    """Which pages are found; each that is must be right."""
    into = [bytearray(PAGE) for _ in numbers]
    found = store.get([key(number) for number in numbers], [memoryview(each) for each in into])
    assert all(not here or each == page(number) for here, each, number in zip(found, into, numbers, strict=True))
    return found


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.kv"))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens stores in one folder, and closes them."""
    stores = []

    def open_store(manifest: str = "m", capacity: int = ROOM, page_bytes: int = PAGE, **more: object) -> DiskStore:
        options = {"patience": 30.0, "refresh": 0.0, **more}
        terms = {"capacity_bytes": capacity, "page_bytes": page_bytes, "manifest": {"model": manifest}}
        stores.append(DiskStore(**terms, argument=str(tmp_path), **options))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


# ── the bytes ────────────────────────────────────────────────────────────────────────────────


@given(st.data())
def test_no_bit_of_an_entry_or_a_head_may_differ(data: st.DataObject) -> None:
    id, layout = bytes(range(16)), Layout(bytes(16), PAGE, 40)
    entry = Entry(data.draw(st.integers(0, 39)), data.draw(st.binary(min_size=32, max_size=32)), 7)
    table = bytearray(40 * layouts.ENTRY.size)
    start = entry.number * layouts.ENTRY.size
    table[start : start + layouts.ENTRY.size] = entry_bytes(id, entry)
    assert list(entries_of(id, bytes(table))) == [entry]
    assert list(entries_of(bytes(16), bytes(table))) == []  # of another segment
    table[start + data.draw(st.integers(0, layouts.ENTRY.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert list(entries_of(id, bytes(table))) == []
    head = bytearray(layout.head(id))
    assert layout._replace(pages=3).of_head(bytes(head), id) == layout
    assert layout.of_head(bytes(head), bytes(16)) is None
    assert layout._replace(digest=b"x" * 16).of_head(bytes(head), id) is None
    head[data.draw(st.integers(0, len(head) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert layout.of_head(bytes(head), id) is None


def test_a_checksum_fits_one_place_and_one_key() -> None:
    sums = {
        page_checksum(id, number, key(name), page(1))
        for id in (bytes(16), bytes(15) + b"1")
        for number in (0, 1)
        for name in (0, 1)
    }
    assert len(sums) == 8


def test_the_order_of_a_manifest_does_not_matter_and_all_else_does() -> None:
    one = digest_of({"model": "m", "tp": [0, 2]}, 4096)
    assert one == digest_of({"tp": [0, 2], "model": "m"}, 4096)
    others = [({"model": "m", "tp": [1, 2]}, 4096), ({"model": "m"}, 4096), ({"model": "m", "tp": [0, 2]}, 8192)]
    assert len({one, *(digest_of(*other) for other in others)}) == 4


# ── what is kept ─────────────────────────────────────────────────────────────────────────────


def test_pages_are_there_until_they_are_dropped(opened: Open) -> None:
    store = opened()
    assert got(store, 1) == [False] and store.has([key(1)]) == [False]
    assert put(store, 1, 2, 3) == [True, True, True]
    assert got(store, 3, 4, 1) == [True, False, True]
    assert store.has([key(2), key(4)]) == [True, False]
    assert store.held().pages == 3 and store.held().bytes == 3 * PAGE and store.held().bound == ROOM
    store.drop([key(2), key(4)])
    assert got(store, 1, 2, 3) == [True, False, True]
    assert put(store, 2) == [True] and got(store, 2) == [True]
    store.clear()
    assert got(store, 1, 2, 3) == [False] * 3 and store.held().pages == 0
    assert put(store, 1) == [True] and got(store, 1) == [True]


def test_what_is_there_is_not_written_again(opened: Open) -> None:
    store = opened()
    assert put(store, 1) == put(store, 1) == [True]
    assert got(store, 1, 1) == [True, True]
    counts = store.counts()
    assert (counts["pages_written"], counts["bytes_written"]) == (1, PAGE)
    assert (counts["pages_read"], counts["bytes_read"]) == (2, 2 * PAGE)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [1, 4095, 4096, 300_000])
def test_pages_of_any_size(opened: Open, size: int, direct: bool) -> None:
    store = opened(page_bytes=size, capacity=1 << 23, direct=direct)
    into = bytearray(size + 1)
    assert store.put([key(1)], [page(1, size)]) == [True]
    assert store.get([key(1)], [memoryview(into)[1:]]) == [True]  # memory that begins anywhere
    assert into[1:] == page(1, size)


def test_a_restart_finds_all_and_goes_on_in_the_same_file(opened: Open, tmp_path: Path) -> None:
    store = opened()
    put(store, *range(5))
    store.drop([key(4)])
    store.close()
    after = opened()
    assert after.held().pages == 4
    assert got(after, *range(5)) == [True] * 4 + [False]
    assert put(after, 5) == [True]
    assert len(list(tmp_path.rglob("*.kv"))) == 1


def test_a_segment_that_is_full_is_not_opened_to_be_gone_on_with(opened: Open, tmp_path: Path) -> None:
    store = opened(capacity=4 * ROOM)
    fills = store._layout.pages
    put(store, *range(3 * fills))
    names = {path.name for path in tmp_path.rglob("*.kv")}
    assert len(names) == 3 and all(map(store._is_full, names))
    after = opened(capacity=4 * ROOM)
    assert all(map(after._is_full, names))
    put(after, 1000)
    (new,) = {path.name for path in tmp_path.rglob("*.kv")} - names
    assert not after._is_full(new) and not store._is_full("unknown.kv")


def test_pages_of_another_manifest_are_never_read(opened: Open) -> None:
    ours = opened("m")
    put(ours, 1)
    for other in (opened("n"), opened("m", page_bytes=PAGE + 1, capacity=2 * ROOM)):
        assert other.has([key(1)]) == [False] and other.held().pages == 0
    assert opened("m").has([key(1)]) == [True]


# ── the bound ────────────────────────────────────────────────────────────────────────────────


def test_all_manifests_together_stay_within_the_bound(opened: Open, tmp_path: Path) -> None:
    stores = [opened(name) for name in "mno"]
    for number in range(90):
        put(stores[number % 3], number)
        assert size_of(tmp_path) <= ROOM
    assert sum(store.counts()["evicted"] for store in stores) > 0
    newest = got(stores[89 % 3], 89)
    assert newest == [True]
    held = sum(store.held().pages for store in (opened(name) for name in "mno"))
    assert 40 < held < 90  # most of the room is used


def test_the_least_recently_used_segment_leaves(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_plugins.tiers.disk.store.TOUCH_SECONDS", 0.0)
    store = opened()
    fills = store._layout.pages
    number = 0
    while not store.counts()["evicted"]:
        put(store, number)
        assert got(store, 0) == [True]  # its segment is always in use
        number += 1
    assert store.has([key(0)]) == [True]
    assert store.has([key(each) for each in range(fills, 2 * fills)]) == [False] * fills


def test_a_segment_that_is_written_does_not_leave(opened: Open) -> None:
    one, two = opened(), opened()
    put(one, 0)
    put(two, *range(1, 200))
    assert two.counts()["evicted"] > 5
    assert got(one, 0) == [True]


def test_a_bound_for_less_than_two_segments_is_refused(opened: Open) -> None:
    with pytest.raises(ConfigError, match="16384 bytes, and two segments of one page take 40960"):
        opened(capacity=16384)


# ── several engines ──────────────────────────────────────────────────────────────────────────


def test_engines_read_each_others_pages_and_write_files_of_their_own(opened: Open, tmp_path: Path) -> None:
    one, two = opened(), opened()
    put(one, 1)
    put(two, 2)
    assert len(list(tmp_path.rglob("*.kv"))) == 2
    put(one, 3)
    assert one.has([key(2)]) == two.has([key(3)]) == [True]
    assert got(one, 1, 2, 3) == got(two, 1, 2, 3) == [True] * 3
    assert put(two, 1) == [True] and two.counts()["pages_written"] == 1
    one.close()
    put(two, 4)
    put(opened(), 5)  # goes on with the file of the one that left
    assert len(list(tmp_path.rglob("*.kv"))) == 2


def test_what_another_engine_evicts_or_drops_is_absent(opened: Open) -> None:
    one, two = opened(), opened(refresh=600.0)
    put(one, *range(30))
    two._look()
    assert two.has([key(0), key(29)]) == [True, True]
    one.drop([key(29)])
    # It is not in the table any more, but still in the file, and right: either answer is.
    got(two, 29)
    put(one, *range(30, 150))
    assert one.counts()["evicted"] > 0
    assert got(two, 0) == [False]
    assert two.counts()["errors"] == two.counts()["corrupt"] == 0


def test_who_writes_goes_on_after_another_engine_cleared(opened: Open, tmp_path: Path) -> None:
    one, two = opened(), opened()
    put(one, 1, 2)
    two.clear()
    assert list(tmp_path.rglob("*.kv")) == [] and one.has([key(1)]) == [False]
    assert put(one, 3) == [True]
    assert two.has([key(3)]) == [True] and got(two, 1, 3) == [False, True]


def test_foreign_files_are_left_alone(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "mine.kv").write_bytes(b"x" * ROOM)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.kv").write_bytes(b"x" * ROOM)
    store = opened()
    put(store, *range(100))
    store.clear()
    assert sorted(path.name for path in tmp_path.rglob("*.kv")) == ["a.kv", "mine.kv"]


# ── the process ──────────────────────────────────────────────────────────────────────────────


def test_the_plugin_builds_one(tmp_path: Path) -> None:
    entry = Plugins.load().entries("tiers")["disk"]
    store = resolve(entry.target)(
        capacity_bytes=ROOM, page_bytes=PAGE, manifest={"model": "m"}, argument=str(tmp_path / "new" / "folder")
    )
    assert entry.kind == "store"
    assert put(store, 1) == [True] and got(store, 1) == [True]
    store.close()


def test_writers_that_are_killed_at_any_moment_leave_no_wrong_page(tmp_path: Path) -> None:
    """A hundred of them, two at a time."""
    command = [sys.executable, str(LIB / "killed_writer.py"), str(tmp_path), "50", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found, wrong, most, errors, again = done.stdout.split()
    assert (wrong, errors, again) == ("0", "0", "True")
    assert int(found) > 50 and int(most) > 50  # it got to write in between
    assert size_of(tmp_path) <= 4 << 20
