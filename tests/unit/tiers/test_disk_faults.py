"""The disk tier on a disk with faults: every answer is right or no, nothing is raised, and the log says it once."""

import errno
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_disk import CALLS, Faults, FaultyFiles, damage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_disk_store import PAGE, ROOM, got, key, page, put

from engine.plugin.registry import Plugins, resolve
from engine_plugins.tiers.disk.files import Found
from engine_plugins.tiers.disk.store import DiskStore

Open = Callable[..., DiskStore]
SHARED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens stores over faulty files, and closes them."""
    stores: list[tuple[DiskStore, FaultyFiles]] = []
    default = tmp_path_factory.mktemp("disk")

    def open_store(files: FaultyFiles, path: Path = default, **more: object) -> DiskStore:
        options = {"patience": 30.0, "refresh": 0.0, "pause": 0.0, **more}
        terms = {"capacity_bytes": ROOM, "page_bytes": PAGE, "manifest": {"model": "m"}, "argument": str(path)}
        stores.append((DiskStore(**terms, files=files, **options), files))
        return stores[-1][0]

    yield open_store
    for store, files in stores:
        files.faults.errors.clear()
        files.faults.resumed.set()
        store.close()


@contextmanager
def impatient(store: DiskStore) -> Iterator[None]:
    """Calls of `store` wait for next to nothing."""
    patience, store._patience = store._patience, 0.02
    yield
    store._patience = patience


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@SHARED
@given(seed=st.integers(0, 1 << 32), harms=st.integers(1, 8))
def test_damaged_files_give_no_wrong_page(
    opened: Open, tmp_path_factory: pytest.TempPathFactory, seed: int, harms: int
) -> None:
    path, choose = tmp_path_factory.mktemp("damaged"), random.Random(seed)
    store = opened(FaultyFiles(), path)
    put(store, *range(20))
    store.close()
    for _ in range(harms):
        damage(path, choose)
    again = opened(FaultyFiles(), path)
    got(again, *range(20))
    assert put(again, *range(20)) == [True] * 20
    assert got(again, *range(20)) == [True] * 20  # those that were wrong are written anew
    assert again.counts()["errors"] == 0


@SHARED
@given(seed=st.integers(0, 1 << 32))
def test_a_power_failure_leaves_no_wrong_page(
    opened: Open, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    path = tmp_path_factory.mktemp("lost")
    for life in range(3):
        files = FaultyFiles(Faults(seed=seed + life))
        store = opened(files, path)
        got(store, *range(30))
        assert all(put(store, *range(life, 30, 2)))
        store.close()
        files.lose()
    last = opened(FaultyFiles(), path)
    got(last, *range(30))
    assert put(last, *range(30)) == [True] * 30 == got(last, *range(30))


def test_a_corrupt_page_is_said_once_and_taken_out_for_all(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(FaultyFiles(), tmp_path)
    put(store, 1, 2, 3)
    (path,) = tmp_path.rglob("*.kv")
    data = bytearray(path.read_bytes())
    for number in (1, 2):
        data[data.index(page(number)[:64]) + PAGE // 2] ^= 16
    path.write_bytes(data)
    assert got(store, 1, 2, 3) == [False, False, True]
    assert store.counts()["corrupt"] == 2
    assert len(warnings(caplog)) == 1 and "checksum is wrong" in warnings(caplog)[0]
    assert store.has([key(1), key(3)]) == [False, True]
    other = opened(FaultyFiles(), tmp_path)
    assert other.has([key(1), key(2), key(3)]) == [False, False, True]
    assert put(other, 1) == [True] == got(other, 1)


def test_bits_that_flip_on_the_way_are_noticed(opened: Open) -> None:
    files = FaultyFiles(Faults(flips=0.5, seed=3))
    store = opened(files)
    put(store, *range(30))
    found = got(store, *range(30))
    assert 0 < sum(found) < 30 and store.counts()["corrupt"] > 0


def test_calls_that_do_half_are_repeated(opened: Open) -> None:
    store = opened(FaultyFiles(Faults(short=True)))
    assert put(store, 1, 2) == [True, True] == got(store, 1, 2)


def test_a_full_disk_keeps_what_it_has_and_is_tried_again(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    files = FaultyFiles()
    store = opened(files)
    put(store, 1, 2)
    files.faults.room = 3 * PAGE // 2
    kept = put(store, 3, 4, 5)
    assert kept.count(True) <= 1 and put(store, 6) == [False]
    assert got(store, 1, 2, 3, 4, 5) == [True, True, *kept]
    assert len(warnings(caplog)) == 1 and "No space left" in warnings(caplog)[0]
    files.faults.room = None
    assert put(store, 6) == [True] == got(store, 6)


def test_a_full_disk_is_not_asked_for_each_page(opened: Open) -> None:
    files = FaultyFiles(Faults(room=0))
    store = opened(files, pause=600.0)
    put(store, 1)
    files.calls.clear()
    assert put(store, 2) == [False] and files.calls == []


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.EACCES, errno.EIO, errno.EINVAL, errno.ENOLCK], ids=errno.errorcode.get
)
@pytest.mark.parametrize("call", CALLS)
def test_no_error_of_the_system_is_raised(opened: Open, call: str, number: int) -> None:
    """At the start, in the middle, and after: what was there before is there again."""
    files = FaultyFiles()
    store = opened(files)
    put(store, 1, 2)
    files.faults.errors[call] = number
    second = opened(files)
    for each in (store, second):
        put(each, 3)
        got(each, 1, 2, 3)
        each.has([key(9)])
        each.drop([key(2)])
        each.clear()
        each.held()
    assert store.counts()["errors"] + second.counts()["errors"] > 0 or call in (
        "folders",
        "touch",
        "make_folder",
        "resize",
        "lock",
        "sync",
        "remove",
    )
    files.faults.errors.clear()
    assert put(store, 4) == [True] == got(store, 4)


class OneBadFile(FaultyFiles):
    """A disk on which one file alone fails: its folder lists it, and no `call` on it is done."""

    bad, call = "", ""

    def _fails(self, call: str, path: str) -> None:
        if self.bad and path.endswith(self.bad) and call == self.call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def open(self, path: str, flags: int) -> int:
        self._fails("open", path)
        return super().open(path, flags)

    def read(self, descriptor: int, into: memoryview, at: int) -> int:
        self._fails("read", self._paths[descriptor])
        return super().read(descriptor, into, at)

    def remove(self, path: str) -> None:
        self._fails("remove", path)
        super().remove(path)


@pytest.mark.parametrize("which", [0, -1], ids=["the first to leave", "the one to be gone on with"])
@pytest.mark.parametrize("call", ["open", "read", "remove"])
def test_a_segment_that_fails_takes_no_other_along(opened: Open, tmp_path: Path, call: str, which: int) -> None:
    """Others are found, written and evicted as ever."""
    before = opened(FaultyFiles(), tmp_path)
    put(before, *range(35))
    before.close()
    segments = list(before._index.segments.values())  # in the order in which they were begun
    for age, segment in enumerate(reversed(segments)):
        os.utime(before._folder.path_of(segment), (0, 1e9 - age))
    files = OneBadFile()
    files.bad, files.call = segments[which].name, call
    store = opened(files, tmp_path)
    lost = 0 if call == "remove" else len(segments[which].keys)
    assert store.has([key(number) for number in range(35)]).count(True) == 35 - lost
    assert all(put(store, *range(1000, 1200)))
    assert store.counts()["evicted"] > 5 and (store.counts()["errors"] > 0) == bool(lost)
    assert any(tmp_path.rglob(files.bad)) == (call != "read")  # to evict one nobody reads it
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.kv")) <= ROOM


REFUSES = {"remove": errno.EROFS, "resize": errno.EROFS}


@pytest.mark.parametrize("faults", [Faults(errors=dict(REFUSES)), Faults(stall=frozenset(["remove"]))])
def test_what_a_disk_could_not_clear_is_found_no_more(opened: Open, faults: Faults) -> None:
    files = FaultyFiles()
    store = opened(files)
    assert put(store, 1, 2) == [True, True]
    files.faults = faults
    said = "fails to write: Read-only file system" if faults.errors else "does not answer"
    with impatient(store):
        assert store.clear().endswith(said)
        assert store.has([key(1), key(2)]) == [False, False] == got(store, 1, 2) == put(store, 3, 4)
    faults.errors.clear()
    faults.resumed.set()
    while put(store, 3) == [False]:  # threads that were stuck go on by and by
        time.sleep(0.01)
    assert got(store, 3) == [True]
    assert got(store, 1, 2) == [False, False] and got(opened(FaultyFiles()), 1, 2, 3) == [False, False, True]


def test_what_no_disk_takes_from_us_a_later_store_has_again(opened: Open) -> None:
    """That is why a user is told."""
    files = FaultyFiles()
    store = opened(files)
    put(store, 1)
    files.faults.errors |= REFUSES
    assert store.clear() and got(store, 1) == [False]
    assert got(opened(FaultyFiles()), 1) == [True]
    files.faults.errors.clear()
    assert not store.clear() and got(opened(FaultyFiles()), 1) == [False]


def test_segments_that_cannot_be_removed_are_emptied_for_all(opened: Open, tmp_path: Path) -> None:
    files, others = FaultyFiles(), FaultyFiles()
    store, other = opened(files, tmp_path), opened(others, tmp_path)
    put(store, 1)
    assert got(other, 1) == [False] and other.has([key(1)]) == [True] == put(other, 2)
    files.faults.errors["remove"] = errno.EACCES  # of the folder; the files are ours
    assert not store.clear() and all(path.stat().st_size == 0 for path in tmp_path.rglob("*.kv"))
    assert other.has([key(1), key(2)]) == [False, False] == got(opened(FaultyFiles(), tmp_path), 1, 2)
    assert put(store, 3) == [True] == put(other, 4)  # in segments that are begun anew
    assert got(opened(FaultyFiles(), tmp_path), 1, 2, 3, 4) == [False, False, True, True]


def test_what_is_cleared_stays_so_when_the_power_fails(opened: Open, tmp_path: Path) -> None:
    files = FaultyFiles()
    store = opened(files, tmp_path)
    put(store, *range(30))
    assert not store.clear()
    store.close()
    files.lose()
    assert not any(got(opened(FaultyFiles(), tmp_path), *range(30)))


def test_a_page_whose_write_began_before_a_flush_is_not_kept(opened: Open) -> None:
    files = FaultyFiles(Faults(stall=frozenset(["make_folder"])))
    store = opened(files)
    with impatient(store):
        assert put(store, 1) == [False]
    files.faults.stall = frozenset()
    assert not store.clear()
    files.faults.resumed.set()
    store._writing.close(30.0)  # what was begun ends
    assert got(store, 1) == [False] == got(opened(FaultyFiles()), 1)


def test_a_file_that_could_not_be_closed_is_left_alone(opened: Open, tmp_path: Path) -> None:
    """Its number may be that of another file by then."""
    files = FaultyFiles()
    store = opened(files)
    assert put(store, 1) == [True] and not store.clear()  # so the next page needs another segment
    files.faults.errors["close"] = errno.EIO
    assert put(store, 2) == [False]
    files.faults.errors.clear()
    others = [os.open(tmp_path / f"other{number}", os.O_RDWR | os.O_CREAT) for number in range(20)]
    assert put(store, 3, 4) == [True, True] == got(store, 3, 4)
    assert [os.fstat(other).st_size for other in others] == [0] * 20
    for other in others:
        os.close(other)


def test_to_clear_many_segments_takes_long_and_is_no_stall(opened: Open) -> None:
    files = FaultyFiles()
    store = opened(files, pause=3600.0)
    assert put(store, 1) == [True]
    files.faults = Faults(stall=frozenset(["remove"]))
    with impatient(store):
        assert store.clear().endswith("does not answer")
        assert put(store, 2) == [False] == got(store, 1)
    files.faults.resumed.set()
    while put(store, 2) == [False]:
        time.sleep(0.01)
    assert got(store, 1, 2) == [False, True] and store.counts()["stalls"] == 0


def test_a_flush_while_the_disk_still_clears_is_not_done_by_that(opened: Open, tmp_path: Path) -> None:
    files = FaultyFiles()
    store, other = opened(files, tmp_path), opened(FaultyFiles(), tmp_path)
    assert put(store, 1) == [True]
    files.faults = Faults(stall=frozenset(["remove"]))
    with impatient(store):
        assert store.clear()
        assert put(other, 2) == [True] and store.clear()
    files.faults.resumed.set()
    while put(store, 3) == [False]:
        time.sleep(0.01)
    assert got(opened(FaultyFiles(), tmp_path), 1, 2, 3) == [False, False, True]


def test_a_flush_that_is_sent_again_waits_for_the_disk_to_go_on_with_the_first(opened: Open) -> None:
    files = FaultyFiles()
    store = opened(files)
    assert put(store, 1) == [True]
    files.faults = Faults(stall=frozenset(["remove"]))
    with impatient(store):
        assert store.clear().endswith("does not answer")
        assert put(store, 2) == [False]  # which does not wait
    threading.Timer(0.1, files.faults.resumed.set).start()
    assert store.clear() == ""
    assert put(store, 3) == [True] == got(store, 3) and got(store, 1) == [False]


def test_a_folder_that_is_removed_is_made_again(opened: Open, tmp_path: Path) -> None:
    store = opened(FaultyFiles(), tmp_path / "pages")
    put(store, 1)
    shutil.rmtree(tmp_path / "pages")
    assert got(store, 1) == [False] == put(store, 2)
    assert put(store, 2) == [True] == got(store, 2)


OTHER = "0" * 32  # a folder of another manifest


class Vanishing(FaultyFiles):
    """As if another engine took away at each `moment` what this one has just seen."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self.moment = path, ""

    def folders(self, path: str) -> list[str]:
        found = super().folders(path)
        if self.moment == "folders":
            shutil.rmtree(self._path / OTHER, ignore_errors=True)
        return found

    def files(self, path: str, ending: str) -> list[Found]:
        found = super().files(path, ending)
        if self.moment == "files":
            for each in found:
                (Path(path) / each.name).unlink()
        return found

    def read(self, descriptor: int, into: memoryview, at: int) -> int:
        count = super().read(descriptor, into, at)
        if self.moment == "page" and len(into) >= PAGE:
            into[0] ^= 1
            for each in self._path.rglob("*.kv"):
                each.unlink()
        return count


@pytest.mark.parametrize("moment", ["folders", "files", "page"])
def test_what_another_engine_takes_away_meanwhile_is_no_error(opened: Open, tmp_path: Path, moment: str) -> None:
    (tmp_path / OTHER).mkdir()
    if moment != "folders":  # else what is there would be gone on with
        before = opened(FaultyFiles(), tmp_path)
        put(before, 1, 2)
        before.close()
    files = Vanishing(tmp_path)
    store = opened(files, tmp_path, pause=60.0)
    files.moment = moment
    assert got(store, 1) == [moment == "files"]
    assert put(store, 3) == [True]
    assert store.counts()["errors"] == 0


def test_a_folder_that_cannot_be_written_is_read(opened: Open, tmp_path: Path) -> None:
    put(opened(FaultyFiles(), tmp_path), 1)
    files = FaultyFiles()
    really = files.open

    def read_only(path: str, flags: int) -> int:
        if flags & 3:
            raise OSError(errno.EROFS, "Read-only file system")
        return really(path, flags)

    files.open = read_only  # type: ignore[method-assign]
    files.faults.errors["touch"] = errno.EROFS
    store = opened(files, tmp_path)
    assert got(store, 1) == [True] and put(store, 2) == [False] and put(store, 1) == [True]


# ── a disk that stalls ───────────────────────────────────────────────────────────────────────


def test_a_read_that_stalls_is_passed_over_and_touches_nothing_later(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    files = FaultyFiles()
    store = opened(files)
    put(store, 1, 2)
    files.faults.stall = frozenset(["read"])
    into = [bytearray(PAGE), bytearray(PAGE)]
    with impatient(store):
        assert store.get([key(1), key(2)], [memoryview(each) for each in into]) == [False, False]
    assert store.counts()["stalls"] == 1 and len(warnings(caplog)) == 1
    for each in into:
        each[:] = b"o" * PAGE  # the caller's own again
    files.faults.stall = frozenset()
    files.faults.resumed.set()
    assert got(store, 1, 2) == [True, True]  # the threads that were stuck are back
    assert into == [bytearray(b"o" * PAGE)] * 2


def test_a_store_that_stalled_is_not_asked_for_a_while(opened: Open) -> None:
    files = FaultyFiles()
    store = opened(files, pause=600.0)
    put(store, 1)
    files.faults.stall = frozenset(["read"])
    with impatient(store):
        assert got(store, 1) == [False]
    files.faults.resumed.set()
    files.calls.clear()
    assert got(store, 1) == [False] and store.has([key(1)]) == [False] and files.calls == []


def test_a_page_that_changes_after_a_stalled_write_is_never_found_wrong(opened: Open) -> None:
    files = FaultyFiles(Faults(stall=frozenset(["write"])))
    store = opened(files)
    memory = bytearray(page(1))
    with impatient(store):
        assert store.put([key(1)], [memoryview(memory)]) == [False]
    memory[:] = b"o" * PAGE
    files.faults.resumed.set()
    store._writing.close(30.0)  # what was begun ends
    got(store, 1)  # which says that it is right, if it is there


def test_a_queue_that_is_full_refuses(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_plugins.tiers.disk.threads.MOST_WAITING", 4)
    files = FaultyFiles(Faults(stall=frozenset(["write"])))
    store = opened(files)
    with impatient(store):
        assert put(store, *range(20)) == [False] * 20
    files.faults.resumed.set()
    store._writing.close(30.0)
    written = store.counts()["pages_written"]
    assert written <= 2  # those that threads had begun with; the rest nobody waited for


def test_a_disk_that_stalls_from_the_start_delays_it_no_longer_than_patience(opened: Open) -> None:
    files = FaultyFiles(Faults(stall=frozenset(["files", "open", "make_folder"])))
    store = opened(files, patience=0.05, pause=600.0)
    assert put(store, 1) == [False] and got(store, 1) == [False] and store.held().pages == 0


# ── for the tests of whole engines ───────────────────────────────────────────────────────────


def test_the_faulty_tier_is_a_plugin(tmp_path: Path) -> None:
    lib = Path(__file__).parents[2] / "lib" / "faulty_disk.py"
    entry = Plugins.load([str(lib)]).entries("tiers")["faulty"]
    argument = f"{tmp_path}?room=0&flips=0.5&errors=touch:EIO&stall=lock&seconds=0"
    store = resolve(entry.target)(capacity_bytes=ROOM, page_bytes=PAGE, manifest={}, argument=argument)
    assert put(store, 1) == [False]
    faults = store._files.faults
    assert (faults.room, faults.flips, faults.errors) == (0, 0.5, {"touch": errno.EIO})
    assert (faults.stall, faults.seconds) == (frozenset(["lock"]), 0.0)
    store.close()
