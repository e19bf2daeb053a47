"""Pages that a store has are fetched, or computed: whichever is sooner."""

from math import inf
from statistics import fmean

import pytest
from msgspec.structs import replace
from test_batcher import Bench, request
from test_moves import LONG, OTHER, TierBench, run

from bench.engine.sooner import Shape, Simulation
from engine.cache.fetching import MOVES, STUCK_SECONDS, Fetching
from engine.cache.sooner import Pace, most_ahead

NAMES = [bytes([number]) for number in range(100)]


def test_how_many_pages_a_store_may_give_others_before():
    assert most_ahead(100, fetch=2.0, compute=1.0, running=0) == -50  # the store takes twice as long: never
    assert most_ahead(100, fetch=2.0, compute=1.0, running=1) == 0  # whom it would delay counts like itself
    assert most_ahead(100, fetch=2.0, compute=1.0, running=5) == 200
    assert most_ahead(100, fetch=0.5, compute=1.0, running=0) == 100
    assert most_ahead(100, fetch=0.0, compute=1.0, running=0) == inf == most_ahead(100, 1.0, 0.0, 0)


def test_a_pace_follows_what_is_measured_and_counts_each_page_alike():
    pace = Pace()
    assert pace.each == 0
    pace.measure(4, 2.0)
    assert pace.each == 0.5
    pace.measure(96, 2.0)
    assert pace.each == pytest.approx((0.8 * 2 + 2) / (0.8 * 4 + 96))
    for _ in range(40):
        pace.measure(10, 30.0)
    assert pace.each == pytest.approx(3.0, rel=1e-3)


def waiting(*counts, always=False):
    """Two pieces for each request of so many pages a piece."""
    fetching = Fetching(always)
    for span, count in enumerate(counts):
        fetching.wait({10 * span + 1: NAMES[:count], 10 * span + 2: NAMES[count : 2 * count]})
    return fetching


def test_few_pieces_are_under_way_and_their_pace_is_that_of_all_that_were_before_them():
    fetching = waiting(4, 4)
    sent = [fetching.next() for _ in range(MOVES)]
    assert [(number, piece.ahead) for number, piece in sent] == [(1, 0), (2, 4), (11, 8)]
    assert fetching.next() is None
    fetching.over(1, 3, 9.0)  # one page was lost: nothing is learned
    assert fetching.pace.each == 0
    fetching.over(2, 4, 4.0)
    assert fetching.pace.each == 0.5
    assert fetching.next()[0] == 12
    assert (fetching.rest(1), fetching.rest(2), fetching.rest(11), fetching.rest(12)) == ([], [], [11, 12], [12])


def test_a_request_waits_for_what_is_sooner_with_what_the_store_gives_others_before():
    fetching = waiting(4, 4)
    fetching.compute = 1.0
    assert fetching.worth(1, 0) and fetching.worth(11, 0)  # nobody knows the pace of the store
    fetching.pace.measure(1, 0.75)
    assert fetching.worth(1, 0) and not fetching.worth(11, 0) and fetching.worth(11, 1)
    fetching.drop(1)
    fetching.drop(2)
    assert fetching.worth(11, 0)
    fetching.pace.measure(1000, 2000.0)
    assert not fetching.worth(11, 0)
    assert waiting(4, always=True).worth(1, 0)


def test_who_waits_gives_up_after_twice_what_is_expected_and_what_computing_takes():
    fetching = waiting(4, 4)
    fetching.compute = 1.0
    assert fetching.patience(8) == 0
    fetching.pace.measure(1, 0.75)
    assert fetching.patience(8) == 2 * 16 * 0.75 + 8


# ── the scheduler ────────────────────────────────────────────────────────────────────────────


def restarted(fetch, *texts):
    """A store that has `texts`, or the eight pages of LONG, of four tokens each, which computing takes four for."""
    bench = TierBench(40, pages=24, fetch=fetch)
    for number, text in enumerate(texts or [LONG]):
        run(bench, f"a{number}", text)
    bench.lose()
    return bench


def test_a_device_that_is_idle_computes_what_a_slow_store_has():
    bench = restarted(fetch=5.0)
    assert run(bench, "b", LONG) == (0, 33)
    counts = bench.moves.stats()
    assert (counts.computed, counts.fetched) == (2, 6)  # of which some was under way when the device could begin
    bench.drain()


def test_the_pace_of_a_store_that_was_slow_is_measured_again_where_the_device_is_idle():
    """A plan that computes all of the prompt is made before any move is sent."""
    bench = restarted(fetch=5.0)
    bench.admit(request("b", LONG, max_new=1))
    while bench.room.waiting:
        bench.moves.moved(bench.below.finish())
        for number in bench.moves.settled():
            bench.let_in(bench.room.settle(number))
    assert bench.plan() is not None
    fetches = [move for move in bench.below.moving if move.way == "fetch"]
    assert [move.count for move in fetches] == [2] * MOVES
    for move in fetches:
        place = bench.below.moving.index(move)
        bench.moves.moved(replace(bench.below.finish(place), seconds=0.5))
    assert bench.scheduler.tiers.fetching.pace.each < 1
    bench.drain()


def test_what_a_store_says_too_late_is_not_fetched():
    bench = restarted(fetch=0.1)
    bench.admit(request("b", LONG, max_new=1))
    bench.moves.leave("b")
    bench.go_on()
    assert not bench.room.waiting
    while bench.below.moving:
        bench.finish()
    assert bench.below.done["find"] == 8 and not bench.scheduler.tiers.fetching.later
    bench.drain()
    assert (bench.cached["b"], bench.below.done["fetch"]) == (0, 0)


def test_what_a_faster_store_has_is_fetched():
    bench = restarted(fetch=3.0)
    assert run(bench, "b", LONG) == (32, 1)
    assert (bench.moves.stats().computed, bench.moves.stats().fetched) == (0, 8)
    bench.drain()


def test_what_came_while_a_request_waited_for_the_device_is_used_and_the_rest_computed():
    bench = restarted(fetch=1000.0)
    bench.admit(request("b", LONG, max_new=1))
    while not any(move.way == "fetch" for move in bench.below.moving):
        bench.finish()
    assert [move.count for move in bench.below.moving] == [2] * MOVES
    bench.finish()
    while "b" not in bench.ends:
        if bench.plan() is not None:
            bench.commit()
        for move in [move for move in bench.below.moving if move.way == "up"]:
            bench.finish(bench.below.moving.index(move))
    assert bench.cached["b"] == 8
    bench.drain()


def test_a_store_that_is_stuck_is_given_up_on_and_nothing_waits_for_it():
    bench = restarted(fetch=0.1)
    bench.admit(request("b", LONG, max_new=1))
    while not any(move.way == "fetch" for move in bench.below.moving):
        bench.finish()
    ((need, seconds),) = bench.moves.patience()
    assert seconds == pytest.approx(2 * 8 * 0.1 + 8 * 4)
    assert bench.plan() is None
    bench.moves.give_up(need)
    while "b" not in bench.ends:
        bench.plan()
        bench.commit()
    assert bench.cached["b"] == 0 and sum(move.way == "fetch" for move in bench.below.moving) == MOVES
    bench.drain()


@pytest.mark.parametrize("beside", [False, True])
def test_nothing_more_is_fetched_for_a_request_that_is_gone_but_what_others_wait_for_is(beside):
    bench = restarted(fetch=0.1)
    bench.admit(request("b", LONG, max_new=1))
    if beside:
        bench.admit(request("c", LONG, max_new=1))
    while not any(move.way == "fetch" for move in bench.below.moving):
        bench.finish()
    bench.end("b")
    bench.ends["b"] = "abort"
    assert len(bench.scheduler.tiers.fetching.later) == beside
    bench.drain()
    assert bench.below.done["fetch"] == 2 * (MOVES + beside)
    if beside:
        assert bench.cached["c"] == 32


def test_a_piece_that_is_stuck_is_waited_for_by_nobody_however_many_come():
    bench = restarted(0.1, LONG, OTHER)
    bench.admit(request("b", LONG, max_new=1))
    while not any(move.way == "fetch" for move in bench.below.moving):
        bench.finish()
    for second in range(100, 101 + int(STUCK_SECONDS)):
        assert bench.plan() is None
        bench.moves.tick(second)
        bench.admit(request(f"more{second}", LONG, max_new=1))
    while bench.live:
        assert bench.plan() is not None
        bench.commit()
    assert bench.cached["b"] == 0
    bench.admit(request("other", OTHER, max_new=1))  # whose pieces wait for those
    while bench.room.waiting:
        bench.finish(next(place for place, move in enumerate(bench.below.moving) if move.way == "find"))
    assert bench.scheduler.tiers.fetching.later and bench.plan() is not None
    assert not bench.scheduler.tiers.fetching.later
    bench.drain()


# ── and a flush ──────────────────────────────────────────────────────────────────────────────


def flushed(lost=False):
    """A flush while request "b" has pages on their way, and others that still wait for their turn, if the device is not
    `lost` then; and a store that refuses to forget."""
    bench = restarted(fetch=0.1)
    bench.admit(request("b", LONG, max_new=1))
    while not any(move.way == "fetch" for move in bench.below.moving):
        bench.finish()
    assert bench.plan() is None and bench.scheduler.tiers.fetching.later
    bench.scheduler.flush()
    assert not bench.scheduler.tiers.fetching.later
    if lost:
        bench.lose()
    bench.go_on()
    assert bench.moves.clearing
    assert bench.below.moving[-1].way == "clear"
    bench.moves.moved(bench.below.finish(len(bench.below.moving) - 1, b"\1"))
    assert bench.moves.stats().uncleared and bench.below.store
    return bench


@pytest.mark.parametrize("lost", [False, True])
def test_a_flush_takes_pages_that_come_from_a_store_and_nobody_waits_for_them(lost):
    bench = flushed(lost)
    fetches = [move for move in bench.below.moving if move.way == "fetch"]
    assert len(fetches) == (0 if lost else MOVES)  # which the store does not answer meanwhile
    bench.admit(request("c", LONG, max_new=1), request("d", LONG, max_new=1))
    assert not bench.room.waiting
    bench.scheduler.check_integrity()
    while bench.live:
        Bench.step(bench)
        assert [move for move in bench.below.moving if move.way not in ("down", "clear")] == fetches
    assert bench.cached["b"] == 0
    bench.drain()
    assert bench.moves.stats().from_store == 0 == bench.moves.stats().computed


# ── in simulated time ────────────────────────────────────────────────────────────────────────


def simulated(policy, disk=1.8e9, seed=0):
    """The benchmark's traffic, with an eighth of the tokens and an eighth of the speed."""
    slow = {"token": 0.495 / 2048, "bus": (16 << 20) / 55e9, "disk": (16 << 20) / disk}
    return Simulation(Shape(48, 960, 16, 32, 72, 8, 768, 2048, 1024, 4, **slow), policy, seed).run()


def rate(policy):
    """Turns a second."""
    return fmean(simulated(policy, seed=seed).rate for seed in range(3))


def test_a_disk_and_the_device_together_serve_more_than_each_of_them_alone():
    assert rate("sooner") > 1.05 * max(rate("never"), rate("always"))
    assert simulated("sooner", 7e9).rate > 1.5 * simulated("never").rate


def test_steps_wait_for_few_of_the_pages_that_the_host_takes_over():
    found = simulated("never")
    assert found.pages["down"] > 3_000 and found.held < 0.1 * found.seconds  # of all at eviction: a quarter
