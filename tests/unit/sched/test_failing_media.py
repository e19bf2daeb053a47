"""A medium that cannot be made ends who shows it; what it has spoiled is forgotten in every tier, and nothing else."""

import random
from typing import get_args

import pytest
from msgspec.structs import replace
from simulated_device import WRONG, SimulatedDevice
from simulated_tiers import SimulatedTiers
from test_batcher import request
from test_encoder import SIZES, admitted
from test_moves import TierBench

from engine.cache.tiers import WritePolicy
from engine.messages.step import StepDone, StepPlan
from engine.sched.encoder import Encoder
from engine.sched.request import shown_by
from engine.testing.steps import rows_of


class SpoilingDevice(SimulatedDevice):
    """Media of which `failing` has the number cannot be made: what shows them writes rubbish from there on.

    Until that is told, `doubtful`, rows that show them may read it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.failing: set[int] = set()
        self.spoiled: set[int] = set()  # of those that are held, in the place of which there is nothing
        self.doubtful: set[int] = set()
        self.encoded: list[int] = []

    def run(self, plan: StepPlan) -> StepDone:
        made = list(memoryview(plan.encodes).cast("i"))[1::2]
        failed = self.failing.intersection(made)
        self.spoiled = (self.spoiled - set(made)) | failed
        self.doubtful |= failed
        self.encoded += made
        done = super().run(plan)
        for slot, start, length, _ in rows_of(plan):
            spoiled = [shown for shown in self._shown(slot) if shown.number in self.spoiled & self.doubtful]
            begins = [shown.begin for shown in spoiled if shown.begin + shown.count > start]
            begins += [at for at in range(start) if self.store.get(self._place(slot, at)) == WRONG]
            for position in range(max(start, min(begins, default=start + length)), start + length):
                self.store[self._place(slot, position)] = WRONG
        return replace(done, failed=tuple((0, number, "it is broken") for number in sorted(failed)))

    def _shown(self, slot):
        return shown_by(self.admits[slot].bound)

    def _read(self, slot, place, wanted):
        doubtful = {number % OTHER for number in self.doubtful}
        if not any(shown.number % OTHER in doubtful for shown in self._shown(slot)):
            super()._read(slot, place, wanted)


class SpoiledBench(TierBench):
    """As TierBench, of requests that show media, and ends them as the actor does."""

    def __init__(self, write: WritePolicy = "write-through", *, host: int = 60, pages: int = 60, depth=2) -> None:
        sizes = {"pages": pages, "page_size": 2, "slots": 3, "max_step_tokens": 8}
        super().__init__(host, write, **sizes, depth=depth)
        # As in Bench, but for the encoder.
        scheduler = self.scheduler
        scheduler.encoder = Encoder(7, 12)
        scheduler._start_afresh(scheduler._pages.afresh())
        self.device = SpoilingDevice(*sizes.values())
        self.below = SimulatedTiers(self.device, host)
        self.retired: set[str] = set()

    def ask(self, rid: str, pieces: list[int], *, other: int = 0, **options) -> None:
        """It knows its media by numbers that are so many more than those of others."""
        admit, bound = admitted(rid, pieces, whole=False, **options)
        self.scheduler.admit(admit, tuple(replace(each, number=each.number + other) for each in bound))
        self.admitted[rid], self.tokens[rid] = admit, []

    def commit(self):
        done = self.flying[0]
        for _, number, _ in done.failed:
            for rid in self.scheduler.encoder.users(number, self.scheduler.running_requests()):
                self.scheduler.stop(rid)
                self.ends[rid] = "failed"
            self.scheduler.places.spoiled(number)
            self.device.doubtful.discard(number)
        return super().commit()

    def alone(self, rid: str, pieces: list[int], **options) -> int:
        """One request; how many of its tokens were cached."""
        self.ask(rid, pieces, **options)
        while self.live or self.below.moving or self.flying:
            self.step()
        return self.cached.get(rid, -1)

    def check(self) -> None:
        self.scheduler.check_integrity()
        there = {place.slot for place in self.scheduler.tiers.host.places() if place.known and place.there}
        lower = [value for (slot, _), value in self.below.pool.items() if slot in there]
        lower += [value for page in self.below.store.values() for value in page]
        assert WRONG not in lower, "what was spoiled went down"


TEXT = [1, 2, 3, 0, 1, 1, 2, 2, 3, 3, 0]  # 5 pages of 2
PICTURE = [3, 2, 6, 1, 0, 2, 2]  # its picture begins within the second page
NUMBER = 3  # of that picture, which takes SIZES[2] tokens
OTHER = 9  # more than that, media have other numbers


@pytest.mark.parametrize("write", get_args(WritePolicy))
def test_others_keep_what_they_have_where_a_medium_fails(write):
    bench = SpoiledBench(write)
    assert bench.alone("text", TEXT) == 0
    assert bench.alone("other", [3, 2, 7, 1, 1]) == 0
    bench.device.failing = {NUMBER}
    for number in range(2):
        bench.ask(f"fails{number}", PICTURE)
        bench.ask(f"beside{number}", [number, 2, 6, 3])
        bench.ask(f"text{number}", TEXT)
        while bench.live:
            bench.step()
            bench.check()
        assert {rid for rid, end in bench.ends.items() if end == "failed"} >= {f"fails{number}", f"beside{number}"}
        assert bench.cached[f"text{number}"] == 10
    assert bench.device.encoded.count(NUMBER) == 2  # each time anew
    assert bench.alone("again", [3, 2, 7, 1, 1]) == 8
    bench.device.failing = set()
    assert bench.alone("right", PICTURE) == 2  # the page before the picture
    assert bench.alone("held", PICTURE) == 2 * ((len(PICTURE) - 1 + SIZES[2] - 1) // 2)
    bench.check()
    bench.drain()


def test_what_was_made_before_stays_below_where_it_fails_later():
    """Pages of a picture that went down while it could be made are right, and come up again."""
    bench = SpoiledBench()
    assert bench.alone("right", PICTURE) == 0
    down = bench.below.done["down"]
    bench.scheduler._pages.evict(60)
    bench.scheduler.encoder._held.clear()
    bench.scheduler.encoder._tokens = 0
    bench.device.failing = {NUMBER}
    bench.alone("fails", [0, 0, 6, 1])
    assert bench.ends["fails"] == "failed"
    assert bench.alone("again", PICTURE) == 2 * ((len(PICTURE) - 1 + SIZES[2] - 1) // 2)
    assert bench.scheduler.tiers.counts.from_host > 0 and bench.below.done["down"] >= down
    bench.drain()


def test_what_is_right_in_the_tree_is_not_written_over_by_who_makes_the_picture_anew():
    """Pages of a picture are on their way down while a prompt that ends with it is computed to its end again."""
    bench = SpoiledBench()
    bench.ask("right", [0, 0, 6], max_new=1)
    bench.plan()
    bench.commit()
    bench.scheduler.encoder._held.clear()
    bench.scheduler.encoder._tokens = 0
    bench.device.failing = {NUMBER}
    bench.ask("fails", [0, 0, 6])
    bench.plan()
    while bench.below.moving:
        bench.finish()
        bench.check()
    bench.commit()
    assert bench.ends == {"right": "length", "fails": "failed"} and bench.below.done["down"] == 3
    bench.device.failing = set()
    assert bench.alone("again", [0, 0, 6]) == 4
    bench.check()
    bench.drain()


def test_what_moves_hold_is_forgotten_once_they_are_over_and_lower_tiers_keep_all():
    bench = SpoiledBench()
    bench.alone("text", TEXT)
    bench.ask("right", [0, 0, 6], max_new=1)
    bench.plan()
    bench.commit()
    tiers = bench.scheduler.tiers
    below, stored = set(tiers.host.names), dict(bench.below.store)
    assert bench.below.moving and stored
    bench.scheduler.encoder._held.clear()
    bench.scheduler.encoder._tokens = 0
    bench.device.failing = {NUMBER}
    bench.ask("fails", [0, 0, 6])
    bench.plan()
    bench.commit()
    assert bench.ends["fails"] == "failed"
    bench.device.failing = set()
    bench.ask("again", [0, 0, 6])
    assert bench.plan() is None, "it could find what is spoiled"
    while bench.below.moving:
        bench.finish()
        bench.check()
    assert set(tiers.host.names) == below and bench.below.store.items() >= stored.items()
    while bench.live:
        bench.step()
    assert bench.cached["again"] == 4 and tiers.counts.from_host, "it comes up again"
    assert bench.alone("text again", TEXT) == 10
    bench.check()
    bench.drain()


def test_pages_that_show_a_picture_go_down_once_it_is_made():
    bench = SpoiledBench(depth=3)
    bench.ask("a", PICTURE, max_new=9)
    bench.plan()
    assert not [move for move in bench.below.moving if move.way == "down"]
    bench.commit()
    (move,) = [move for move in bench.below.moving if move.way == "down"]
    assert move.count == 4  # of a chunk of 8 tokens
    bench.drain()


def test_who_left_before_it_was_told_has_left_nothing_wrong():
    """A request is aborted while the step that spoils its pages is in flight, and its session keeps them."""
    bench = SpoiledBench(depth=2)
    bench.device.failing = {NUMBER}
    admit, bound = admitted("a", PICTURE, whole=False)
    of_session = request("x", [1], session="s")
    bench.scheduler.admit(replace(admit, session=of_session.session), bound)
    bench.plan()
    bench.scheduler.stop("a")
    assert bench.scheduler._pages.pins.nodes()
    bench.commit()
    assert not bench.scheduler._pages.pins.nodes()
    bench.check()
    bench.device.failing = set()
    assert bench.alone("b", PICTURE) == 2
    bench.drain()


def test_who_knows_the_medium_by_another_number_ends_as_well():
    """The waiting room has forgotten the medium of a request that left, and its pages are found all the same."""
    bench = SpoiledBench()
    scheduler = bench.scheduler
    scheduler.admit(*admitted("a", PICTURE, whole=False))
    assert scheduler.plan() is not None
    scheduler.stop("a")
    for rid, pieces in (("b", PICTURE), ("c", TEXT)):
        admit, bound = admitted(rid, pieces, whole=False)
        scheduler.admit(admit, tuple(replace(each, number=each.number + OTHER) for each in bound))
    assert scheduler.plan() is not None and scheduler.running == 2
    assert scheduler.encoder.users(NUMBER, scheduler.running_requests()) == ["b"]
    scheduler.stop("b")
    scheduler.places.spoiled(NUMBER)
    bench.go_on()
    while bench.below.moving:
        bench.finish()
    assert scheduler.cache.tree.size == 3 + 1  # of the text, so far, and before the picture
    assert len(scheduler.tiers.host.names) == 3, "what b had found has not gone down"
    scheduler.check_integrity()


@pytest.mark.parametrize("write", get_args(WritePolicy))
def test_replies_are_right_whatever_fails_and_whoever_leaves(write):
    draw = random.Random(write)
    failed = fallen = 0
    for seed in range(8):
        bench = SpoiledBench(write, pages=draw.choice([24, 40]), host=draw.choice([6, 30]), depth=draw.randint(1, 3))
        for turn in range(40):
            numbers = (*range(1, 5), *range(1 + OTHER, 5 + OTHER))
            bench.device.failing = {number for number in numbers if draw.random() < 0.3}
            head = draw.choice([[1, 2], [3], []])
            pieces = [*head, *(draw.choice([0, 1, 4, 5, 6, 7]) for _ in range(draw.randint(1, 4)))]
            other = draw.choice([0, 0, OTHER])
            bench.ask(f"r{turn}", pieces, other=other, seed=seed, max_new=draw.randint(1, 4))
            for _ in range(draw.randrange(4)):
                bench.step()
                if bench.below.moving and draw.random() < 0.5:
                    bench.finish(draw.randrange(len(bench.below.moving)))
                bench.check()
            if bench.live and draw.random() < 0.15:
                rid = draw.choice(bench.live)
                bench.scheduler.stop(rid)
                bench.ends[rid] = "abort"
        bench.drain()
        failed += sum(end == "failed" for end in bench.ends.values())
        fallen += bench.scheduler.tiers.counts.from_host
    assert failed > 30 and fallen > 5
