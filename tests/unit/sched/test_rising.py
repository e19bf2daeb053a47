"""What comes up where pages give way for it, part by part."""

from test_batcher import request
from test_moves import TierBench, run

TEXTS = [[index * index % 4 for index in range(33)], [3] * 33, [2, 3] * 16 + [1], [1, 0, 2] * 11]  # 8 pages of 4 each


def rising():
    """A device and a host that are full, and of the first text six pages on their way up: all that is left of it."""
    bench = TierBench(20, stores=False, pages=20, cold=2, part=2)
    for number, text in enumerate([*TEXTS, *TEXTS[1:]]):
        run(bench, f"{number}", text)
    assert not bench.scheduler.tiers.host.pool.free_pages
    bench.admit(request("again", TEXTS[0], max_new=1))
    bench.plan()
    assert ways(bench) == 3 * [("up", 2)]
    return bench, bench.scheduler.tiers.counts.from_host


def ways(bench):
    return [(move.way, move.count) for move in bench.below.moving]


def end(bench):
    """How many tokens of the first text were cached."""
    bench.failing = b""
    bench.drain()
    return bench.cached["again"]


def test_others_go_down_to_the_places_of_a_part_before_the_next_one_is_there():
    bench, before = rising()
    bench.finish()
    assert ways(bench) == [("up", 2), ("up", 2), ("down", 2)]
    bench.plan()
    assert bench.scheduler.running == 0, "it runs once the last part is there"
    assert end(bench) == 24 and bench.scheduler.tiers.counts.from_host - before == 6


def test_behind_a_part_that_fails_all_is_computed():
    bench, before = rising()
    bench.finish()
    bench.failing = b"\0\1"
    bench.finish()
    bench.failing = b""
    bench.finish()  # which comes, to no avail
    counts = bench.scheduler.tiers.counts
    assert (counts.from_host - before, counts.failed) == (3, 1)
    assert end(bench) == 12


def test_parts_that_are_under_way_at_a_flush_do_not_come():
    bench, before = rising()
    bench.finish()
    bench.scheduler.flush()
    bench.scheduler.check_integrity()
    assert end(bench) == 0 and bench.scheduler.tiers.counts.from_host - before == 2


def test_where_no_pages_are_kept_ready_all_come_at_once():
    bench = TierBench(40, write="write-back", stores=False, pages=40, cold=2, part=2)
    run(bench, "first", TEXTS[0])
    bench.scheduler._pages.evict(40)
    for move in bench.moves.before():
        bench.below.begin(move)
    bench.finish()
    bench.admit(request("again", TEXTS[0], max_new=1))
    bench.plan()
    assert ways(bench) == [("up", 8)] and end(bench) == 32
