"""Tiers below the device, simulated: every request gets the tokens it would get alone, wherever its pages have been."""

from typing import get_args

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from msgspec.structs import replace
from simulated_tiers import SimulatedTiers
from test_batcher import POLICIES, AnythingHappens, Bench

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
        super().__init__(**options, tiers=TierOptions(host, write, stores, least=1))
        self.scheduler.places._least = 1
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
        plan = self.scheduler.plan()
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
