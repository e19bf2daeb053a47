"""Copies on streams of a simulated GPU: what a step, and another move, may touch while a copy up has not ended."""

import time
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from simulated_cuda import Stream, simulate, until
from test_transfers import HEADS, Mover, names

from engine.messages.step import StepPlan
from engine.messages.tiers import Move, Moved
from engine.worker import transfers
from engine.worker.steps.uses import PageUses


class StreamMover(Mover):
    """A Mover whose copies are put on streams, one page a copy. Of a copy up the last two are told of ahead, and the
    last three where no step is under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        page = HEADS.page_bytes
        sizes = {"COPY_BYTES": page, "UNDER_WAY": 1000, "AHEAD_BYTES": 2 * page, "IDLE_AHEAD_BYTES": 3 * page}
        self.cuda = simulate(monkeypatch, **sizes)
        super().__init__(HEADS, device=torch.device("cuda"))
        self.up, self.down, self.late = (self.transfers._streams[way] for way in ("up", "down", "late"))
        for slot in range(5):
            self.transfers._host[slot].fill_(200 + slot)

    def begin(self, way: Any, pages: Sequence[int], slots: Sequence[int], **more: Any) -> None:
        self.number += 1
        packed = array("i", pages).tobytes(), array("i", slots).tobytes()
        self.transfers.begin(Move(self.number, way, *packed, **more), self.told.put)

    def launch(self, seen: list[int], given: Sequence[int] = (0, 1, 2, 3)) -> None:
        """A step, which sees the pages: those that have come are of one number. It is the first that is `given` some
        of them."""
        pages = array("i", [number for page in given for number in (0, page, page)])
        self.transfers.follow(StepPlan(0, pages=pages.tobytes()))
        self.cuda.main.put(lambda: seen.extend(self.bytes_of(page) for page in range(4)))

    def bytes_of(self, page: int) -> int:
        """What all bytes of a page are; 0 if they differ."""
        found = set(b"".join(self.page(page)))
        return found.pop() if len(found) == 1 else 0

    def issued(self, stream: Stream, jobs: int) -> None:
        until(lambda: len(stream) >= jobs)

    def answer(self) -> Moved:
        return self.told.get(timeout=20)


@pytest.fixture
def mover(monkeypatch: pytest.MonkeyPatch) -> StreamMover:
    return StreamMover(monkeypatch)


def rise(mover: StreamMover) -> None:
    """Of four pages one has come, and the move is told of, as no step is under way."""
    mover.begin("up", [0, 1, 2, 3], [0, 1, 2, 3])
    mover.issued(mover.up, 8)  # a wait, four copies and three marks
    mover.cuda.main.go_on()
    mover.up.go_on(1)
    assert mover.told.empty() and mover.transfers._told is None
    mover.up.go_on(1)
    assert mover.answer().done == b"\1\1\1\1"


def test_steps_wait_for_the_rest_of_a_copy_up_once_it_is_told_of(mover: StreamMover) -> None:
    before: list[int] = []
    early: list[int] = []
    seen: list[int] = []
    later: list[int] = []
    mover.launch(before)
    mover.begin("up", [0, 1, 2, 3], [0, 1, 2, 3])
    mover.issued(mover.up, 8)
    mover.up.go_on()
    assert len(mover.up) == 8  # a step under way may still write the pages
    mover.launch(early)
    mover.cuda.main.go_on()
    assert (before, early) == ([0, 0, 0, 0], [0, 0, 0, 0])  # no step waits before the answer
    mover.cuda.main.put(lambda: None)  # one more, which runs
    mover.up.go_on(2)
    time.sleep(0.02)  # in which it would be told of
    assert mover.told.empty()
    mover.up.go_on(2)
    assert mover.answer().done == b"\1\1\1\1"
    mover.launch(seen)
    mover.cuda.main.go_on()
    assert (seen, [mover.bytes_of(page) for page in range(4)]) == ([], [200, 201, 0, 0])
    mover.up.go_on()
    mover.cuda.main.go_on()
    assert seen == [200, 201, 202, 203]
    mover.launch(later)
    assert len(mover.cuda.main) == 1  # there is nothing to wait for
    mover.cuda.main.go_on()
    assert later == seen


def test_a_step_that_is_given_none_of_the_pages_does_not_wait_for_them(mover: StreamMover) -> None:
    rise(mover)
    other: list[int] = []
    none: list[int] = []
    given: list[int] = []
    mover.launch(other, [7, 5])
    mover.launch(none, [])
    mover.cuda.main.go_on()
    assert other == none == [200, 0, 0, 0]
    mover.launch(given, [5, 3])
    mover.launch(none, [])  # what comes behind it waits with it
    mover.cuda.main.go_on()
    assert (given, len(none)) == ([], 4)
    mover.up.go_on()
    mover.cuda.main.go_on()
    assert given == none[4:] == [200, 201, 202, 203]


def test_a_page_that_goes_down_to_a_place_waits_for_the_copy_up_from_there(mover: StreamMover) -> None:
    rise(mover)
    mover.begin("down", [5], [3])
    mover.issued(mover.late, 4)
    mover.cuda.main.go_on()
    mover.late.go_on()
    assert mover.told.empty()
    mover.up.go_on()
    mover.late.go_on()
    assert mover.answer().done == b"\1" and mover.bytes_of(3) == 203
    assert bytes(mover.transfers._host[3].numpy().tobytes()) == b"".join(mover.page(5))


def test_a_store_gives_no_page_to_a_place_that_a_copy_up_still_reads(mover: StreamMover) -> None:
    key = mover.transfers._named(names("a"))
    mover.store.put(key, [memoryview(bytes(mover.transfers._host[0].numpy().tobytes()))])
    rise(mover)
    mover.number += 1
    fetch = Move(mover.number, "fetch", slots=array("i", [3]).tobytes(), names=names("a")[0])
    mover.transfers.begin(fetch, mover.told.put)
    time.sleep(0.02)  # in which it would be there
    mover.up.go_on()
    assert mover.answer().done == b"\1" and mover.bytes_of(3) == 203
    assert set(mover.transfers._host[3].tolist()) == {200}


def test_a_short_copy_up_is_told_of_as_it_begins_and_has_taken_what_it_took(mover: StreamMover) -> None:
    mover.begin("up", [1, 0], [4, 2])
    mover.issued(mover.up, 6)
    mover.up.go_on()
    assert mover.told.empty()  # the steps before it are under way
    mover.cuda.main.go_on()
    mover.up.go_on(1)
    assert mover.answer().done == b"\1\1" and not mover.transfers._told[0].query()  # type: ignore[index]
    mover.up.go_on()
    assert (mover.bytes_of(1), mover.bytes_of(0)) == (204, 202)


def test_a_page_that_is_written_back_is_not_written_over_before(mover: StreamMover) -> None:
    wanted = mover.page(5)
    mover.begin("down", [5], [1], holds=True)
    mover.cuda.main.put(lambda: [layer[5].fill_(0) for layer in mover.caches[0]])
    mover.cuda.main.go_on()
    assert mover.page(5) == wanted
    mover.late.go_on()
    mover.cuda.main.go_on()
    assert mover.answer().done == b"\1" and mover.page(5) != wanted
    assert bytes(mover.transfers._host[1].numpy().tobytes()) == b"".join(wanted)


def test_the_time_of_a_copy_that_is_told_of_ahead_is_that_of_all_its_pages(
    mover: StreamMover, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([9.0, 10.0, 16.0, 19.0, 20.0, 26.0])  # asked for, begun and told of
    monkeypatch.setattr(transfers, "time", SimpleNamespace(perf_counter=clock.__next__))
    for name in ("AHEAD_BYTES", "IDLE_AHEAD_BYTES"):
        monkeypatch.setattr(transfers, name, HEADS.page_bytes)
    mover.begin("up", [0, 1, 2, 3], [0, 1, 2, 3])
    mover.issued(mover.up, 8)
    mover.cuda.main.go_on()
    mover.up.go_on()
    assert mover.answer().seconds == 8.0  # three quarters took 6
    mover.begin("up", [0], [0])
    mover.issued(mover.up, 5)
    mover.cuda.main.go_on()
    mover.up.go_on()
    assert mover.answer().seconds == 6.0  # it had only begun: that is what it waited for


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_stream_has_few_copies_at_a_time_so_that_steps_wait_behind_few(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = StreamMover(monkeypatch)
    monkeypatch.setattr(transfers, "UNDER_WAY", 2)
    monkeypatch.setattr(transfers, "IDLE_AHEAD_BYTES", 0)
    monkeypatch.setattr(transfers, "AHEAD_BYTES", 0)
    stream = mover.late if way == "down" else mover.up
    mover.begin(way, [0, 1, 2, 3], [3, 1, 4, 0])
    mover.cuda.main.go_on()
    for left in (4, 3, 2, 1):
        until(lambda: copies_on(stream) >= min(left, 2))  # noqa: B023
        time.sleep(0.005)
        assert copies_on(stream) <= 2
        stream.go_on(2)  # a copy, and the mark behind it
    stream.go_on()
    until(lambda: stream.go_on() or not mover.told.empty())
    assert mover.told.get().done == bytes([1] * 4)


def copies_on(stream: Stream) -> int:
    return sum(getattr(job, "__name__", "") == "<lambda>" for job in list(stream._jobs))


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_copy_waits_for_steps_that_may_use_its_pages_and_for_no_others(way: str, mover: StreamMover) -> None:
    stream = mover.down if way == "down" else mover.up
    mover.transfers._uses = cast(PageUses, SimpleNamespace(busy=lambda pages: 0 in pages))
    mover.cuda.main.put(lambda: None)  # a step under way
    mover.begin(way, [1], [3])
    until(lambda: stream.go_on() or not mover.told.empty())
    assert mover.answer().done == b"\1" and len(mover.cuda.main) == 1
    stream = mover.late if way == "down" else mover.up
    mover.begin(way, [0], [4])
    until(lambda: len(stream) > 1)
    stream.go_on()
    time.sleep(0.01)
    assert mover.told.empty()
    mover.cuda.main.go_on()
    until(lambda: stream.go_on() or not mover.told.empty())
    assert mover.answer().done == b"\1"


def test_what_goes_down_does_not_wait_behind_what_waits_for_a_step(mover: StreamMover) -> None:
    mover.transfers._uses = cast(PageUses, SimpleNamespace(busy=lambda pages: 0 in pages))
    mover.cuda.main.put(lambda: None)  # a step under way, which uses page 0
    mover.begin("down", [0], [3])
    mover.begin("down", [1], [4])
    until(lambda: mover.late.go_on() or mover.down.go_on() or not mover.told.empty())
    assert mover.answer().number == mover.number and mover.told.empty()
    mover.cuda.main.go_on()
    until(lambda: mover.late.go_on() or not mover.told.empty())
    assert mover.answer().number == mover.number - 1


def test_what_comes_up_waits_for_what_held_a_step_on_either_stream(mover: StreamMover) -> None:
    mover.transfers._uses = cast(PageUses, SimpleNamespace(busy=lambda pages: 2 in pages))
    before = b"".join(mover.page(2))
    mover.begin("down", [2], [3], holds=True)  # which waits for a step
    mover.begin("down", [1], [4], holds=True)
    mover.transfers._uses = cast(PageUses, SimpleNamespace(busy=lambda pages: False))
    mover.begin("up", [2], [1])
    until(lambda: len(mover.up) > 1)
    mover.down.go_on()
    mover.up.go_on()
    assert b"".join(mover.page(2)) == before
    mover.cuda.main.go_on()
    until(lambda: mover.late.go_on() or mover.up.go_on() or mover.told.qsize() == 3)
    mover.up.go_on()
    assert mover.bytes_of(2) == 201 and bytes(mover.transfers._host[3].numpy().tobytes()) == before


def test_what_comes_up_waits_for_what_held_a_step_and_may_still_read_the_page(mover: StreamMover) -> None:
    mover.transfers._uses = cast(PageUses, SimpleNamespace(busy=lambda pages: False))
    before = b"".join(mover.page(0))
    mover.begin("down", [0], [3], holds=True)
    mover.begin("up", [0], [1])
    until(lambda: len(mover.up) > 1)
    mover.up.go_on()
    assert b"".join(mover.page(0)) == before
    mover.down.go_on()
    until(lambda: mover.up.go_on() or mover.told.qsize() == 2)
    assert mover.bytes_of(0) == 201
    assert bytes(mover.transfers._host[3].numpy().tobytes()) == before
