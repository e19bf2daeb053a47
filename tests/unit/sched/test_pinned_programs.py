"""Programs in the scheduler: what they may come back to stays in the cache, and never in the way of others."""

from test_batcher import Bench, request

from engine.cache.pins import MOST_BRANCHES, MOST_PROGRAMS, SECONDS, Pins
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
    ended.scheduler.end_program("p")
    crowd(ended)
    assert cached(ended) == 0
    late = filled()
    late.now = SECONDS + 1
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


def test_a_longer_prefix_takes_the_place_of_a_shorter_one_and_forks_have_one_each():
    tree = RadixTree(1)
    pins = Pins(tree)
    key = bytes(range(64)) * 5

    def node(length, salt=b""):
        found, pages = tree.match(key[:length], salt)
        tree.lock(found)
        if len(pages) * 4 < length:
            found, _ = tree.extend(found, key[len(pages) * 4 : length], list(range(length // 4 - len(pages))))
        return found

    short = node(8)
    pins.keep("p", short, 0.0)
    tree.unlock(short)
    long = node(40)
    pins.keep("p", long, 1.0)
    tree.unlock(long)
    assert pins.nodes() == [long] and (tree.evictable, pins.pages) == (0, 10)
    for index in range(MOST_BRANCHES + 3):
        fork = node(8, salt=b"%d" % index)
        pins.keep("q", fork, 2.0)
        tree.unlock(fork)
    assert len(pins.nodes()) == 1 + MOST_BRANCHES
    for index in range(MOST_PROGRAMS - 1):
        pins.keep(f"short {index}", RadixTree(1).match(b"")[0], 2.0)
    assert len(pins.nodes()) == MOST_BRANCHES, "that of p is gone, of which was heard first"
    pins.end("q")
    while pins.drop():
        pass
    assert tree.evictable == tree.size
    tree.check_integrity()
