"""Tiers below the device, simulated: every request gets the tokens it would get alone, wherever its pages have been."""

import random
from array import array
from hashlib import blake2b
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from msgspec.structs import replace
from simulated_copies import SimulatedCopies
from simulated_device import VOCABULARY
from simulated_tiers import SimulatedTiers
from test_batcher import POLICIES, AnythingHappens, Bench, request

from engine.cache import names
from engine.cache.host import HostPages
from engine.cache.tiers import Ticket, TierOptions, WritePolicy
from engine.messages.assets import Need
from engine.messages.tiers import PAGES, Moved
from engine.sched.assets import WaitingRoom
from engine.sched.copies import Copies
from engine.sched.moves import Moves
from engine.sched.request import Request
from engine.sched.sessions import Below


def wanting(admit):
    """`admit`, which waits for pages as well."""
    return replace(admit, needs=(*admit.needs, Need(PAGES, admit.rid.encode())))


class TierBench(Bench):
    """As Bench, with `host` pages below the device and a store; whoever arrives waits in the room for the latter.

    Moves end when they are told to. Then the pages fail for which `failing` has a byte. The store takes `fetch` times
    as long for a page as the device for a token, as far as that is known."""

    def __init__(self, host, write="write-through", stores=True, fetch=0.0, cold=6, part=16, **options):
        state = options.get("states", 0)
        tiers = TierOptions(host, write, stores, 1, 1, piece=2, cold=cold, least_part=part, state=state)
        super().__init__(**options, tiers=tiers)
        self.below = SimulatedTiers(self.device, host)
        self.moves = Moves([self.scheduler])
        if fetch:
            self.moves.cost.seconds = 1.0
            self.scheduler.tiers.fetching.pace.measure(1, fetch)
        self.room = WaitingRoom({})
        self.room.started()
        self.failing = b""
        self.stepped, self.pace = 0, 1.0  # seconds a step

    def admit(self, *admits):
        for admit in admits:
            seeks = self.moves.seeks(admit)
            admit = self.moves.named(admit) if seeks else admit
            self.scheduler.accept(Request.admitted(admit, 0), admit)  # raises what it would, before it waits
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
        self.moves.tick(self.stepped * self.pace)
        stepped = super().step()
        if self.below.moving and (not stepped or self.stepped % 32 == 0):
            self.finish()
        return stepped or bool(self.below.moving)

    def drain(self, steps=20_000):
        self.go_on()  # a request that was aborted last may have left pages that are to go down
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

    def lose(self):
        """The device is gone, and another one comes."""
        for rid in self.scheduler.reset():
            self.ends[rid] = "lost"
        self.flying.clear()
        self.device.clear()
        self.below.lose()
        self.let_in(self.room.lost())
        self.room.started()

    def end(self, rid, keep=None):
        """Abort `rid`, or stop it."""
        self.moves.leave(rid)
        if not self.room.abort(rid):
            assert self.scheduler.stop(rid, keep)


class AnythingMoves(AnythingHappens):
    @initialize(
        pages=st.integers(4, 9),
        page_size=st.integers(1, 3),
        slots=st.integers(1, 5),
        max_step_tokens=st.sampled_from([3, 7, 30]),
        policy=st.sampled_from(sorted(POLICIES)),
        depth=st.integers(1, 3),
        burst=st.sampled_from([1, 1, 3]),
        lanes=st.sampled_from([1, 1, 2]),
        host=st.sampled_from([2, 5, 12, 40]),
        write=st.sampled_from(get_args(WritePolicy)),
        stores=st.sampled_from([True, True, False]),
        fetch=st.sampled_from([0.0, 1.0, 10.0]),
        cold=st.sampled_from([1, 2, 6]),
        part=st.sampled_from([1, 2, 16]),
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

    @precondition(lambda self: self.bench.admitted)
    @rule(data=st.data(), steps=st.sampled_from([0, 0, 3, 60]))
    def ask_again(self, data, steps):
        """As one that came before asked, so that its pages come up."""
        before = data.draw(st.sampled_from(sorted(self.bench.admitted)))
        self.next += 1
        self.bench.admit(replace(self.bench.admitted[before], rid=f"r{self.next}", priority=1))
        for _ in range(steps):
            self.bench.step()

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
        self.bench.lose()
        assert self.bench.scheduler.counts()["running"] == self.bench.room.waiting == 0

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "bench"):
            self.bench.scheduler.check_integrity()
            self.bench.room.check_integrity()
            counts = self.bench.scheduler.counts()
            assert counts["running"] + counts["waiting"] + self.bench.room.waiting == len(self.bench.live)


TestAnythingMoves = AnythingMoves.TestCase
TestAnythingMoves.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ── conversations that come back, again and again ────────────────────────────────────────────


@pytest.mark.parametrize(("write", "part"), [(write, part) for write in get_args(WritePolicy) for part in (1, 16)])
def test_conversations_come_back_right_whatever_fails(write, part):
    """Half of the moves end late, some fail, some requests are aborted, and the device is lost now and then."""
    draw = random.Random(write)
    bench = TierBench(30, write=write, part=part, pages=12, page_size=2, slots=3, max_step_tokens=9)
    histories = [[] for _ in range(6)]
    for turn in range(400):
        number = draw.randrange(6)
        if len(histories[number]) > 14:
            histories[number] = []
        histories[number] = [*histories[number], *(draw.randrange(VOCABULARY) for _ in range(3))]
        bench.admit(request(f"r{turn}", histories[number], max_new=draw.randint(1, 4), salt=draw.choice("aab")))
        for _ in range(draw.randrange(10)):
            bench.step()
            if bench.below.moving and draw.random() < 0.5:
                bench.failing = draw.choice([b"", b"", b"\0\1", b"\1"])
                bench.finish(draw.randrange(len(bench.below.moving)))
                bench.failing = b""
        if bench.live and draw.random() < 0.1:
            rid = draw.choice(bench.live)
            bench.end(rid)
            bench.ends[rid] = "abort"
        if turn % 100 == 99:
            bench.lose()
        bench.scheduler.check_integrity()
    bench.drain()
    done, counts = bench.below.done, bench.scheduler.tiers.counts
    assert done["up"] > 100 and done["down"] > 100 and done["keep"] > 20 and done["fetch"] > 5, done
    assert counts.failed > 10 and counts.from_store > 0


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


def test_pages_of_a_text_stay_neighbours_so_that_one_copy_moves_them():
    bench = TierBench(48, stores=False, pages=12)
    moved, begin = [], bench.below.begin
    bench.below.begin = lambda move: (moved.append(move), begin(move))
    for turn, first in enumerate((0, 1, 2, 3, 0, 1)):
        run(bench, str(turn), [first, *LONG[1:]])
    assert [move.way for move in moved] == 4 * ["down"] + 2 * ["up"]
    for move in moved:
        places = list(zip(array("i", move.pages), array("i", move.slots), strict=True))
        joined = sum(after == (page + 1, slot + 1) for (page, slot), after in pairwise(places))
        assert joined >= 5, places  # of 7: pages of two other texts, not all, gave way for these


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
    assert bench.below.done["clear"] == 1 and len(bench.below.store) == 8
    run(bench, "c", OTHER)
    assert run(bench, "d", LONG) == (32, 1)
    bench.drain()


def test_a_store_that_refuses_to_forget_is_asked_for_nothing_until_it_has():
    """Also by the next life of the device."""
    bench = TierBench(40, pages=11)
    bench.pace = 0.0
    run(bench, "a", LONG)
    before = dict(bench.below.done)
    bench.scheduler.flush()
    for life in range(2):
        assert bench.moves.clearing
        for now, due in ((0.0, True), (14.9, False), (15.0, True), (44.9, False), (45.0, True)):
            bench.moves.tick(60.0 * life + now)
            bench.go_on()
            assert [move.way for move in bench.below.moving] == ["clear"] * due
            if due:
                bench.moves.moved(replace(bench.below.finish(0, b"\1"), cause="read-only"))
            assert (bench.moves.clearing, bench.moves.uncleared) == (False, "read-only")
        assert run(bench, f"b{life}", LONG) == (0, 33)  # which asks no store, and gives it nothing
        bench.lose()
    assert bench.moves.stats().uncleared and len(bench.below.store) == 8
    for way in ("find", "fetch", "keep", "clear"):
        assert bench.below.done[way] == before[way]
    bench.go_on()
    bench.finish()
    assert not (bench.moves.clearing or bench.moves.uncleared or bench.moves.stats().uncleared or bench.below.store)
    assert run(bench, "c", LONG) == (0, 33)
    assert len(bench.below.store) == 8
    bench.drain()


def test_what_a_store_drops_for_a_flush_is_no_refusal():
    bench = TierBench(40, pages=11)
    bench.pace = 0.0  # no pause ends by itself
    bench.admit(request("a", LONG, max_new=1))
    while "keep" not in {move.way for move in bench.below.moving}:
        bench.step()
    failed = bench.moves.stats().failed
    bench.scheduler.flush()
    bench.failing = b"\1" * 40
    while any(move.way == "keep" for move in bench.below.moving):
        bench.finish(next(place for place, move in enumerate(bench.below.moving) if move.way == "keep"))
    bench.failing = b""
    assert not bench.scheduler.tiers.keeping.paused and bench.moves.stats().failed == failed
    bench.drain_steps()
    assert run(bench, "b", LONG) == (0, 33)
    assert len(bench.below.store) == 8
    bench.drain()


def test_a_flush_while_a_store_forgets_is_one_more():
    bench = TierBench(40, pages=11)
    run(bench, "a", LONG)
    for _ in range(2):
        bench.scheduler.flush()
        bench.go_on()
    first, second = bench.below.moving
    assert bench.moves.moved(Moved(first.number, b"\1")) == "" and bench.moves.clearing
    assert bench.moves.moved(Moved(second.number, b"\0")) == "" and not bench.moves.clearing
    assert bench.moves.uncleared == "it does not say why"


def test_what_is_on_its_way_at_a_flush_does_not_come():
    bench = TierBench(40, pages=11, stores=False)
    run(bench, "a", LONG)
    run(bench, "b", OTHER)
    bench.admit(request("c", LONG, max_new=1))
    bench.plan()
    assert [move.way for move in bench.below.moving] == ["up"]
    bench.scheduler.flush()
    bench.drain()
    assert bench.cached["c"] == 0  # nor is the page there that it would have gone on from


def test_what_goes_down_at_a_flush_is_forgotten_and_nobody_finds_it_meanwhile():
    bench = TierBench(40, pages=30, stores=False)
    bench.admit(request("a", LONG, max_new=2))
    while bench.live:
        Bench.step(bench)
    assert [move.way for move in bench.below.moving] == ["down"]
    assert bench.scheduler.flush() == (0, 8)
    bench.admit(request("b", LONG, max_new=2), request("c", OTHER, max_new=2))
    for _ in range(3):
        assert not Bench.step(bench)
    bench.finish()
    assert bench.scheduler.counts()["pages_free"] == 30
    bench.drain()
    assert bench.cached["b"] == bench.cached["c"] == 0


def test_a_restarted_engine_finds_in_the_store_what_it_had():
    bench = TierBench(40, pages=11)
    run(bench, "a", LONG)
    bench.lose()
    assert run(bench, "b", LONG) == (32, 1)
    assert run(bench, "c", LONG, salt="x") == (0, 33)
    counts = bench.scheduler.tiers.counts
    assert (counts.fetched, counts.from_store, counts.from_host) == (8, 8, 0)
    bench.drain()


@pytest.mark.parametrize("host", [4, 8, 19])
def test_of_a_prompt_that_the_host_has_no_room_for_as_much_is_fetched_as_it_keeps(host):
    """The last pages would push out the first, and all would be computed that had been waited for."""
    text = [index * index % 7 % 4 for index in range(81)]
    before, bench = (TierBench(size, pages=24, max_step_tokens=30) for size in (40, host))
    run(before, "a", text)
    bench.below.store.update(before.below.store)
    assert len(bench.below.store) == 20
    kept = host * 3 // 4
    assert run(bench, "b", text) == (4 * kept, 81 - 4 * kept)
    stats = bench.moves.stats()
    assert stats.fetched == stats.from_store == kept
    assert abs(stats.ceiling - kept / 20) < 0.01, "what an earlier life has left was asked for before"
    bench.drain()


def test_what_a_store_holds_is_asked_for_at_the_start_of_each_life():
    bench = TierBench(40, pages=11)
    for _ in range(2):
        bench.go_on()
        assert [(move.way, move.count) for move in bench.below.moving] == [("find", 0)]
        number = bench.below.moving[0].number
        assert bench.moves.moved(Moved(number, b"", 0.1, 7, 700)) == ""
        assert (bench.moves.stats().store_pages, bench.moves.stats().store_bytes) == (7, 700)
        bench.lose()


def test_what_stores_count_goes_on_over_the_lives_of_a_device():
    bench = TierBench(40, pages=11)
    bench.go_on()
    for count, total in ((5, 5), (7, 7), (6, 7)):  # the last two overtake each other
        bench.moves.moved(Moved(bench.below.moving[0].number, b"", counts={"corrupt": count}, held=0))
        assert bench.moves.stats().stores == {"corrupt": total}
        bench.scheduler.tiers._send(Ticket("find"), bench.scheduler.tiers._after)
        del bench.below.moving[0]
        bench.go_on()
    bench.lose()
    bench.go_on()
    bench.moves.moved(Moved(bench.below.moving[0].number, b"", counts={"corrupt": 2, "read": 1}, held=0))
    assert bench.moves.stats().stores == {"corrupt": 9, "read": 1}


def test_the_pages_of_a_prompt_are_named_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(names, "blake2b", lambda *given, **options: hashed.append(1) or blake2b(*given, **options))
    bench = TierBench(40, pages=11)
    run(bench, "a", LONG)
    assert len(hashed) == 1 + 8  # what the salt gives, and the pages
    bench.lose()
    run(bench, "b", LONG)
    assert bench.below.done["fetch"] == 8 and len(hashed) == 2 * (1 + 8)
    run(bench, "c", [*LONG, *OTHER[:7]])  # of whose 10 pages the cache knows 8
    assert len(hashed) == 2 * (1 + 8) + 2


def test_pages_that_a_store_has_lost_are_computed_from_the_first_of_them_on():
    bench = TierBench(40, pages=11)
    run(bench, "a", LONG)
    bench.lose()
    request_of = Request.admitted(request("x", LONG, max_new=1), 0)
    bench.scheduler.places.know(request_of, request("x", LONG, max_new=1))
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


def test_a_hit_is_counted_where_it_was_and_no_count_falls():
    """Who leaves before its pages have come, and who shares them, take nothing from what the device had."""
    bench = TierBench(60, pages=12, stores=False)
    counts = bench.scheduler.tiers.counts
    run(bench, "a", LONG)
    assert run(bench, "b", LONG) == (32, 1)
    assert (counts.from_device, counts.from_host) == (8, 0)
    run(bench, "c", OTHER)
    bench.admit(request("d", LONG, max_new=1))
    bench.plan()
    bench.end("d")
    bench.ends["d"] = "abort"
    while bench.below.moving:
        bench.finish()
    assert (counts.from_device, counts.from_host) == (8, 6)  # two had stayed
    assert run(bench, "e", OTHER)[0] == 4 * (counts.from_device - 8 + counts.from_host - 6) == 36
    stats = bench.moves.stats()
    assert stats.asked_total == 36 and abs(stats.ceiling - 0.5) < 0.01, "one that never ran counts"


@pytest.mark.parametrize(("end", "pages"), [("whole", 6), ("stopped", 4), ("retracted", 4)])
def test_pages_of_a_reply_go_down_together_at_its_end(end, pages):
    """While a request decodes nothing moves, however many of its pages are full."""
    bench = TierBench(40, stores=False, pages=24)
    bench.admit(request("a", LONG[:9], max_new=24))
    bench.plan()
    assert [(move.way, move.count) for move in bench.below.moving] == [("down", 2)]
    bench.commit()
    bench.finish()
    while len(bench.tokens["a"]) < (24 if end == "whole" else 16):
        assert not bench.below.moving
        bench.plan()
        bench.commit()
    if end == "stopped":
        bench.end("a")
        bench.ends["a"] = "stopped"
    elif end == "retracted":
        bench.scheduler.retract_all()
    bench.go_on()
    assert [(move.way, move.count) for move in bench.below.moving] == [("down", pages)]
    bench.drain()


def test_pages_that_fail_to_come_up_are_computed_from_the_first_of_them_on():
    bench = TierBench(40, stores=False, pages=11)
    run(bench, "a", LONG)
    run(bench, "b", OTHER)
    bench.failing = b"\0\0\1"
    assert run(bench, "c", LONG) == (12, 21)  # one page was on the device still, and two came
    counts = bench.scheduler.tiers.counts
    assert (counts.from_host, counts.failed) == (2, 1)
    bench.failing = b""
    bench.drain()


def test_a_place_that_a_page_comes_up_from_is_given_to_no_other_meanwhile():
    bench = TierBench(9, stores=False, pages=24)
    run(bench, "a", LONG)
    bench.scheduler._pages.evict(24)
    bench.admit(request("b", LONG, max_new=1))
    bench.plan()
    assert [move.way for move in bench.below.moving] == ["up"]
    bench.admit(request("c", OTHER, max_new=1))
    bench.plan()
    assert [move.way for move in bench.below.moving] == ["up", "down"]
    bench.finish(1)  # which finds room for one page
    assert bench.scheduler.tiers.counts.down == 9
    bench.drain()
    assert bench.cached["b"] == 32


def test_a_scan_leaves_what_is_asked_for_again_in_the_host():
    bench = TierBench(16, pages=11, stores=False)
    run(bench, "a", LONG)
    run(bench, "b", LONG)
    for number in range(12):
        run(bench, f"scan{number}", [number % 4, number // 4, *OTHER[:30]])
    assert run(bench, "c", LONG) == (32, 1)
    bench.drain()


def test_each_copy_of_attention_has_tiers_of_its_own():
    tiers = TierOptions(90, "write-through", False, 1, 1)
    scheduler = Copies(
        2,
        11,
        4,
        slots=4,
        max_model_len=1000,
        max_step_tokens=64,
        policy=POLICIES["fcfs"](),
        prefix_cache=True,
        max_waiting=100,
        tiers=tiers,
    )
    device = SimulatedCopies(2, 11, 4, 4, 64)
    below = [SimulatedTiers(each, 90) for each in device.devices]
    moves, cached = Moves(scheduler.copies), {}

    def turn():
        plan = scheduler.plan()
        due = moves.before()
        told = [] if plan is None else scheduler.commit_each(device.run(plan))
        for move in [*due, *moves.after()]:
            below[move.copy].begin(move)
        for message in told:
            cached.update({message.rids[row]: count for row, count in message.cached})
        for each in below:
            if plan is None and each.moving:
                moves.moved(each.finish())

    texts = [[*LONG[:32], number] for number in range(2)] + [[number] * 40 for number in range(4)]
    texts[1][:4] = [3, 3, 3, 3]
    for turns in range(3):
        for number, ids in enumerate(texts):
            scheduler.admit(request(f"{turns}.{number}", ids, max_new=1))
        while scheduler.live.by_rid or any(each.moving for each in below):
            turn()
        scheduler.check_integrity()
    assert sum(cached[f"2.{number}"] for number in range(6)) >= 4 * 32
    stats = moves.stats()  # each page was asked for three times, in whichever copy
    assert stats.asked_total == 3 * 56 and abs(stats.ceiling - 2 / 3) < 0.01
    assert moves.stats().from_host > 20
    assert all(each.done["up"] for each in below) and moves.stats().host_pages == 180


# ── sessions ─────────────────────────────────────────────────────────────────────────────────


def told(bench, id="s"):
    """Pages of a session on the device, and below."""
    (session,) = [each for each in bench.scheduler.live.sessions.of(b"", b"", bench.now) if each.id == id]
    return session.pages, session.below


@pytest.mark.parametrize("write", get_args(WritePolicy))
def test_a_session_whose_pages_gave_way_has_them_below_and_comes_back_to_them(write):
    bench = TierBench(40, write=write, pages=11, stores=False)
    for turn in range(2):
        assert run(bench, f"a{turn}", LONG, session="s") == (32 * turn, 33 - 32 * turn)
    assert told(bench) == (8, 0)
    assert run(bench, "b", OTHER) == (0, 40)  # for which the session gives up its pins
    assert bench.scheduler.counts()["pins_released_total"] == 1
    pages, below = told(bench)
    assert pages == 0 and below >= 7  # of the device the first may still be there, unpinned
    assert run(bench, "c", [*LONG, 1, 2, 3], session="s") == (32, 4)
    assert told(bench) == (9, 0)
    bench.drain()


@pytest.mark.parametrize(("count", "most"), [(0, 0), (1, 1), (256, 256), (257, 129), (1000, 250), (65_536, 256)])
def test_a_session_remembers_few_names_and_how_much_lies_below(count, most):
    host = HostPages(max(count, 1))
    names = [number.to_bytes(32) for number in range(count)]
    host.unpin(host.add(names))
    below, each = Below(host, names), -(-count // 256)
    assert len(below._names) == most
    assert [below.after(pages) for pages in (0, 1, count // 3, count)] == [
        count,
        max(0, count - 1),
        count - count // 3,
        0,
    ]
    for left in (count // 2, count // 4, 0):
        for name in names[left:]:
            if place := host.get(name):
                host.forget(place)
        assert abs(below.after(0) - left) <= each // 2
        assert abs(below.after(count // 8) - max(0, left - count // 8)) <= each // 2


def test_a_turn_that_waits_brings_the_pages_of_its_session_up():
    bench = TierBench(40, pages=12, stores=False, slots=1)
    run(bench, "a", LONG, session="s")
    run(bench, "b", OTHER)
    bench.admit(request("c", [1, 1], max_new=9), request("d", [*LONG, 1], max_new=1, session="s"))
    bench.plan()
    assert [move.way for move in bench.below.moving] == ["up"] and bench.scheduler.running == 1
    bench.drain()
    assert bench.cached["d"] == 32


@pytest.mark.parametrize("write", get_args(WritePolicy))
def test_a_scan_pushes_out_no_session_and_an_ended_one_is_erased_nowhere(write):
    bench = TierBench(16, write, pages=11, stores=False)
    for turn in range(1 + (write == "second-hit")):
        run(bench, f"a{turn}", LONG, session="s")
    run(bench, "plain", [2, *LONG[1:]])
    for number in range(12):
        run(bench, f"scan{number}", [number % 4, number // 4, *OTHER[:30]])
    assert told(bench) == (0, 8)
    assert run(bench, "plain again", [2, *LONG[1:]])[0] < 32
    assert bench.scheduler.live.sessions.end(b"", b"", "s", bench.now)
    assert bench.scheduler.live.sessions.of(b"", b"", bench.now) == []
    assert run(bench, "again", LONG) == (32, 1)
    bench.scheduler.flush()
    bench.drain()
