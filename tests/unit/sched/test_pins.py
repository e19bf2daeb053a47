"""Programs in the scheduler: what they may come back to stays in the cache, and never in the way of others."""

from test_batcher import Bench, request

from engine.cache.pins import MOST_BRANCHES, MOST_HOLDERS, PROGRAM_SECONDS, Holder, Pins
from engine.cache.radix import RadixTree

PREFIX = [index % 4 for index in range(16)]  # 4 pages of 4


def filled(pages=10, program="p", **options):
    """A scheduler whose cache holds PREFIX for a program."""
    bench = Bench(pages=pages, slots=2, **options)
    bench.admit(request("first", [*PREFIX, 1], max_new=1, program=program))
    bench.drain_steps()
    return bench


def cached(bench, rid="again", program="p"):
    """Of PREFIX, how many tokens the cache still has for a call of the program."""
    bench.admit(request(rid, [*PREFIX, 2], max_new=1, program=program))
    bench.drain_steps()
    return bench.cached[rid]


def crowd(bench, count=8):
    """Other requests, one after the other, which together have more pages than there are."""
    for index in range(count):
        bench.admit(request(f"o{index}", [index % 4, (index // 4) % 4] * 6, max_new=1))
        bench.drain_steps()


def test_what_a_program_may_come_back_to_stays_while_others_come_and_go():
    for program, found in (("p", 16), ("", 0)):
        bench = filled(program=program)
        crowd(bench)
        assert cached(bench, program=program) == found


def test_the_end_of_a_program_and_a_minute_give_its_pages_to_others():
    ended = filled()
    ended.scheduler.end_program(Holder("program", b"", b"", "p"))
    crowd(ended)
    assert cached(ended) == 0
    late = filled()
    late.now = PROGRAM_SECONDS + 1
    late.admit(request("q", [3] * 6, max_new=1, program="q"))
    late.drain_steps()
    crowd(late)
    assert cached(late) == 0


def test_pins_never_block_a_request():
    bench = filled(pages=6)
    bench.admit(request("large", [2] * 20, max_new=1))
    bench.drain_steps()
    assert bench.ends["large"] == "length"
    assert cached(bench) == 4  # of six pages, the request took five


def test_pins_give_way_before_anyone_is_retracted():
    bench = filled(pages=10)
    bench.admit(*(request(f"r{index}", [index] * 5, max_new=15) for index in range(2)))
    bench.drain()
    assert bench.scheduler.counts()["retractions_total"] == 0


def test_who_was_heard_of_longest_ago_gives_way_first():
    bench = Bench(pages=12, slots=2)
    for program, first in (("old", 0), ("young", 1)):
        bench.admit(request(program, [first] * 17, max_new=1, program=program))
        bench.drain_steps()
    bench.admit(request("large", [2] * 20, max_new=1))
    bench.drain_steps()
    for program, first, found in (("young", 1, 16), ("old", 0, 8)):
        bench.admit(request(f"{program} again", [first] * 17, max_new=1, program=program))
        bench.drain_steps()
        assert bench.cached[f"{program} again"] == found


def test_calls_of_a_program_go_together():
    bench = Bench(slots=2, max_step_tokens=100)
    order = []
    for rid, program in (("a1", "a"), ("b1", "b"), ("c", ""), ("a2", "a"), ("b2", "b")):
        bench.admit(request(rid, [len(rid), 1, 2], max_new=1, program=program))
    while bench.live:
        plan = bench.plan()
        running = {each.rid for each in bench.scheduler.running_requests()}
        order += sorted(running - set(order))
        if plan is None or len(bench.flying) == bench.depth:
            bench.commit()
    assert order == ["a1", "a2", "b1", "b2", "c"]


def test_nobody_ends_or_has_the_program_of_another():
    for owner, salt in ((b"another", b""), (b"", b"salt")):
        bench = filled()
        bench.scheduler.end_program(Holder("program", owner, salt, "p"))
        bench.scheduler.end_program(Holder("session", b"", b"", "p"))
        crowd(bench)
        assert cached(bench) == 16
        assert bench.scheduler.counts()["pins_released_total"] == 0


def test_who_gives_up_before_its_time_is_counted_and_what_is_over_gives_way_first():
    bench = Bench(pages=10, slots=2)
    for name, first, seconds in (("long", 0, 600.0), ("short", 1, 5.0)):
        bench.admit(request(name, [first] * 17, max_new=1, session=name, seconds=seconds))
        bench.drain_steps()
    bench.now = 10.0
    for rid, ids, found, released in (("a", [2] * 20, 0, 0), ("long again", [0] * 17, 16, 0), ("all", [3] * 40, 0, 1)):
        bench.admit(request(rid, ids, max_new=1))
        bench.drain_steps()
        assert (bench.cached[rid], bench.scheduler.counts()["pins_released_total"]) == (found, released)
    bench.scheduler.reset()
    assert bench.scheduler.counts()["pins_released_total"] == 1


def test_nothing_is_given_up_for_a_request_that_must_wait_anyway():
    bench = filled(pages=10, depth=1)
    bench.admit(request("runs", [1] * 19, max_new=6))
    bench.plan()
    bench.admit(request("waits", [2] * 30, max_new=1))
    bench.commit()
    bench.plan()
    counts = bench.scheduler.counts()
    assert (counts["waiting"], counts["pages_cached"], counts["pins_released_total"]) == (1, 4, 0)


def test_a_longer_prefix_takes_the_place_of_a_shorter_one_and_forks_have_one_each():
    tree = RadixTree(1)
    pins = Pins(tree)
    key = bytes(range(64)) * 5
    one, other = (Holder("program", b"", b"", id) for id in "pq")

    def node(length, salt=b""):
        """Where a prefix of so many bytes ends, which nobody locks."""
        found, pages = tree.match(key[:length], salt)
        tree.lock(found)
        if len(pages) * 4 < length:
            found, _ = tree.extend(found, key[len(pages) * 4 : length], list(range(length // 4 - len(pages))))
        tree.unlock(found)
        return found

    pins.keep(one, node(8), 60.0, MOST_BRANCHES)
    long = node(40)
    assert long.parent is not None and len(long.parent.pages) == 2, "a prefix that is pinned stays as long as it is"
    pins.keep(one, long, 60.0, MOST_BRANCHES)
    assert pins.nodes() == [long] and tree.evictable == 10 and tree.evict(10) == []
    assert pins.pages([one, other]) == 10
    for index in range(MOST_BRANCHES + 3):
        pins.keep(other, node(8, salt=b"%d" % index), 60.0, MOST_BRANCHES)
    assert len(pins.nodes()) == 1 + MOST_BRANCHES
    assert len(tree.evict(tree.size)) == 6
    for index in range(MOST_HOLDERS - 2):
        pins.keep(Holder("session", b"", b"", str(index)), long, 60.0, 1)
    assert len(pins.nodes()) == MOST_HOLDERS - 1 + MOST_BRANCHES and pins.released == 0
    pins.keep(Holder("session", b"", b"", "one more"), long, 60.0, 1)
    assert len(pins.nodes()) == MOST_HOLDERS - 1 + MOST_BRANCHES and pins.released == 1, "that of p is gone"
    assert pins.end(other) and not pins.end(other)
    pins.drop()
    pins.clear()
    assert pins.released == 2 and not pins.nodes()
    tree.check_integrity()
    assert len(tree.evict(tree.size)) == 2 * MOST_BRANCHES + 10 and not tree.size
