"""Tiers below the device, simulated: every request gets the tokens it would get alone, wherever its pages have been."""

from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from msgspec.structs import replace
from simulated_tiers import SimulatedTiers
from test_batcher import POLICIES, AnythingHappens, Bench, request

from engine.cache.tiers import TierOptions, WritePolicy
from engine.messages.assets import Need
from engine.messages.tiers import PAGES
from engine.sched.assets import WaitingRoom
from engine.sched.moves import Moves
from engine.sched.request import Request


def wanting(admit):
    """`admit`, which waits for pages as well."""
    return replace(admit, needs=(*admit.needs, Need(PAGES, admit.rid.encode())))


class TierBench(Bench):
    """As Bench, with `host` pages below the device and a store; whoever arrives waits in the room for the latter.

    Moves end when they are told to. Then the pages fail for which `failing` has a byte."""

    def __init__(self, host, write="write-through", stores=True, **options):
        super().__init__(**options, tiers=TierOptions(host, write, stores, 1, 1))
        self.below = SimulatedTiers(self.device, host)
        self.moves = Moves([self.scheduler])
        self.room = WaitingRoom({})
        self.room.started()
        self.failing = b""
        self.stepped = 0

    def admit(self, *admits):
        for admit in admits:
            self.scheduler.accept(Request.admitted(admit, 0), admit)  # raises what it would, before it waits
            seeks = self.moves.seeks(admit)
            due = self.room.admit(wanting(admit) if seeks else admit)
            for make in due.makes:
                self.moves.want(make.number, admit)
            self.admitted[admit.rid] = admit
            self.tokens[admit.rid] = []
            self.let_in(due)
        self.go_on()

    def let_in(self, due):
        for admit, bound in due.ready:
            assert bound == ()
            self.scheduler.admit(admit, bound)

    def go_on(self):
        for number in self.moves.settled():
            self.let_in(self.room.settle(number))
        for move in self.moves.after():
            self.below.begin(move)

    def plan(self):
        plan = self.scheduler.plan(self.now)
        for move in self.moves.before():
            self.below.begin(move)
        if plan is not None:
            self.flying.append(self.device.run(plan))
        self.go_on()
        return plan

    def commit(self):
        told = super().commit()
        self.go_on()
        return told

    def finish(self, index=0):
        assert self.moves.moved(self.below.finish(index, self.failing)) == ""
        self.go_on()

    def step(self):
        """Steps overtake moves here: of these one ends in a while, and where nothing else can go on."""
        self.stepped += 1
        stepped = super().step()
        if self.below.moving and (not stepped or self.stepped % 32 == 0):
            self.finish()
        return stepped or bool(self.below.moving)

    def drain(self, steps=20_000):
        while self.live or self.below.moving or self.flying:
            self.step()
            steps -= 1
            assert steps, "no progress"
        assert not self.room.waiting
        super().drain()  # which flushes
        self.go_on()
        while self.below.moving:
            self.finish()
        self.scheduler.check_integrity()
        assert self.scheduler.tiers.host.pool.free_pages == self.below.host, "a place leaked"
        assert not self.below.store

    def end(self, rid, keep=None):
        """Abort `rid`, or stop it."""
        if not self.room.abort(rid):
            assert self.scheduler.stop(rid, keep)


class AnythingMoves(AnythingHappens):
    @initialize(
        pages=st.integers(2, 12),
        page_size=st.integers(1, 4),
        slots=st.integers(1, 5),
        max_step_tokens=st.sampled_from([3, 7, 30]),
        policy=st.sampled_from(sorted(POLICIES)),
        depth=st.integers(1, 3),
        burst=st.sampled_from([1, 1, 3]),
        lanes=st.sampled_from([1, 1, 2]),
        host=st.integers(1, 20),
        write=st.sampled_from(get_args(WritePolicy)),
        stores=st.booleans(),
    )
    def start(self, burst, lanes, **options):
        burst = burst if lanes == 1 else 1
        self.bench = TierBench(**options, burst=burst, lanes=lanes, max_model_len=24)
        self.capacity = options["pages"] * options["page_size"]
        self.next = 0

    @precondition(lambda self: self.bench.below.moving)
    @rule(data=st.data(), failing=st.sampled_from([b"", b"", b"", b"\1", b"\0\1", b"\1" * 20]))
    def a_move_ends(self, data, failing):
        self.bench.failing = failing
        self.bench.finish(data.draw(st.integers(0, len(self.bench.below.moving) - 1)))
        self.bench.failing = b""

    @precondition(lambda self: self.bench.room.waiting)
    @rule()
    def nobody_waits_any_longer(self):
        for rid in self.bench.room.rids():
            for asset in self.bench.room._requests[rid].assets:
                self.bench.moves.give_up(asset.number)
        self.bench.go_on()
        assert not self.bench.room.waiting

    @precondition(lambda self: self.bench.live)
    @rule(data=st.data())
    def abort(self, data):
        rid = data.draw(st.sampled_from(self.bench.live))
        self.bench.end(rid)
        self.bench.ends[rid] = "abort"

    @precondition(lambda self: self.bench.live)
    @rule(data=st.data(), keep=st.integers(0, 3))
    def stop(self, data, keep):
        rid = data.draw(st.sampled_from(self.bench.live))
        self.bench.end(rid, keep)
        self.bench.ends[rid] = "stopped"

    @rule()
    def lose_the_device(self):
        for rid in self.bench.scheduler.reset():
            self.bench.ends[rid] = "lost"
        self.bench.flying.clear()
        self.bench.device.clear()
        self.bench.below.lose()
        self.bench.let_in(self.bench.room.lost())
        self.bench.room.started()
        assert self.bench.scheduler.counts()["running"] == self.bench.room.waiting == 0

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "bench"):
            self.bench.scheduler.check_integrity()
            self.bench.room.check_integrity()
            counts = self.bench.scheduler.counts()
            assert counts["running"] + counts["waiting"] + self.bench.room.waiting == len(self.bench.live)


TestAnythingMoves = AnythingMoves.TestCase
TestAnythingMoves.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# ── what is promised, one by one ─────────────────────────────────────────────────────────────

LONG = [index * index % 4 for index in range(33)]  # 8 pages of 4, and a token
OTHER = [3] * 40


def run(bench, rid, ids, **options):
    """One request alone; how many of its tokens were cached, and how many positions were computed."""
    before = bench.device.computed
    bench.admit(request(rid, ids, max_new=1, **options))
    while bench.live or bench.below.moving:
        bench.step()
    return bench.cached[rid], bench.device.computed - before


@pytest.mark.parametrize("write", get_args(WritePolicy))
def test_a_prefix_that_gave_way_comes_up_and_is_not_computed_again(write):
    bench = TierBench(40, write=write, stores=False, pages=11)
    assert run(bench, "a", LONG) == (0, 33)
    assert run(bench, "b", LONG) == (32, 1)  # on the device; the second time that it is asked for
    assert run(bench, "c", OTHER) == (0, 40)  # beside it there is room for one page
    assert bench.scheduler.tiers.counts.from_host == 0
    assert run(bench, "d", LONG) == (32, 1)
    counts = bench.scheduler.tiers.counts
    assert (counts.from_host, counts.from_store, counts.refused, counts.failed) == (7, 0, 0, 0)
    bench.drain()


def test_policies_say_when_pages_go_down():
    down = {}
    for write in get_args(WritePolicy):
        bench = TierBench(40, write=write, stores=False, pages=11)
        down[write] = []
        for rid, ids in (("a", LONG), ("b", LONG), ("c", OTHER)):
            run(bench, rid, ids)
            down[write].append(bench.below.done["down"])
        bench.drain()
    assert down["write-through"] == [8, 8, 18]
    assert down["second-hit"] == [0, 8, 8]
    assert down["write-back"] == [0, 0, 7]  # of 11 pages the first is still there


def test_after_a_flush_nothing_comes_up_and_pages_go_down_again():
    bench = TierBench(40, pages=11)
    run(bench, "a", LONG)
    assert bench.below.store
    bench.scheduler.flush()
    bench.go_on()
    assert run(bench, "b", LONG) == (0, 33)
    assert bench.below.done["clear"] == 0 and len(bench.below.store) == 8
    run(bench, "c", OTHER)
    assert run(bench, "d", LONG) == (32, 1)
    bench.drain()


def test_what_is_on_its_way_at_a_flush_does_not_come():
    bench = TierBench(40, pages=11, stores=False)
    run(bench, "a", LONG)
    run(bench, "b", OTHER)
    bench.admit(request("c", LONG, max_new=1))
    bench.plan()
    assert [move.way for move in bench.below.moving] == ["up"]
    bench.scheduler.flush()
    bench.drain()
    assert bench.cached["c"] == 4  # the page that what came up would have gone on from


def test_a_restarted_engine_finds_in_the_store_what_it_had():
    bench = TierBench(40, pages=11)
    run(bench, "a", LONG)
    bench.scheduler.reset()
    bench.device.clear()
    bench.below.lose()
    assert run(bench, "b", LONG) == (32, 1)
    assert run(bench, "c", LONG, salt="x") == (0, 33)
    counts = bench.scheduler.tiers.counts
    assert (counts.fetched, counts.from_store, counts.from_host) == (8, 8, 0)
    bench.drain()


def test_pages_that_a_store_has_lost_are_computed_from_the_first_of_them_on():
    bench = TierBench(40, pages=11)
    run(bench, "a", LONG)
    bench.scheduler.reset()
    bench.device.clear()
    bench.below.lose()
    names = bench.scheduler.places
    request_of = Request.admitted(request("x", LONG, max_new=1), 0)
    names.know(request_of, request("x", LONG, max_new=1))
    del bench.below.store[request_of.names.upto(8)[5]]
    assert run(bench, "b", LONG) == (20, 13)
    bench.drain()


def test_others_run_while_pages_come_up_and_who_shares_them_waits_for_the_same_move():
    bench = TierBench(60, pages=24, stores=False)
    run(bench, "a", LONG)
    for number in range(3):
        run(bench, f"o{number}", [number] * 40)
    bench.admit(request("b", [*LONG, 1], max_new=1), request("c", [*LONG, 2], max_new=1))
    bench.admit(request("d", [2, 2], max_new=1))
    while "d" not in bench.ends:
        bench.plan()
        bench.commit()
    assert [move.way for move in bench.below.moving if move.way == "up"] == ["up"] and len(bench.live) == 2
    bench.drain()
    assert bench.cached["b"] == bench.cached["c"] == 32
    assert bench.scheduler.tiers.counts.from_host == 8


def test_a_scan_leaves_what_is_asked_for_again_in_the_host():
    bench = TierBench(16, pages=11, stores=False)
    run(bench, "a", LONG)
    run(bench, "b", LONG)
    for number in range(12):
        run(bench, f"scan{number}", [number % 4, number // 4, *OTHER[:30]])
    assert run(bench, "c", LONG) == (32, 1)
    bench.drain()
