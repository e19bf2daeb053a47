"""Forks are one group: a prefix that several requests share is computed once, then each has a row of its own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batcher import TOKEN, Bench, request
from test_copies import CopiesBench, copy_of, end_all

from engine.cache.pins import Holder

PAGE = 4
PREFIX = [index * index // 3 % 4 for index in range(102)]  # 25 whole pages of 4, and half of one


def bench_of(copies, **options):
    """A scheduler of one copy, or of several."""
    common = {"pages": 400, "page_size": PAGE, **options}
    return Bench(slots=16, **common) if copies == 1 else CopiesBench(copies, slots=16 * copies, **common)


def fork(index, **options):
    """The call of fork number `index`: it ends in the page in which the prefix does."""
    return request(f"r{index}", [*PREFIX, index % 4, index // 4], 6, seed=index, program="p", **options)


@pytest.mark.parametrize("copies", [1, 2, 4])
@pytest.mark.parametrize("max_step_tokens", [10, 50, 1000])
@pytest.mark.parametrize("apart", [0, 1, 3])
def test_eight_forks_compute_their_prefix_once_whenever_they_come(copies, max_step_tokens, apart):
    bench = bench_of(copies, max_step_tokens=max_step_tokens)
    for index in range(8):
        bench.admit(fork(index))
        for _ in range(apart):  # as calls over HTTP come, some steps after one another
            bench.step()
    end_all(bench)
    assert sorted(bench.cached.values()) == [0] + [100] * 7
    replies = 8 * 5  # the last token of each is not computed
    assert bench.device.computed == len(PREFIX) + 2 + 7 * 4 + replies, "each fork but the first: less than one page"
    bench.drain()


@pytest.mark.parametrize("copies", [1, 2])
def test_a_fork_that_leaves_while_the_prefix_is_computed_takes_nothing_along(copies):
    bench = bench_of(copies, max_step_tokens=20, depth=1)
    bench.admit(*(fork(index) for index in range(4)))
    for gone in ("r0", "r1"):
        bench.step()
        bench.told(bench.scheduler.abort(gone))
    end_all(bench)
    prompts = len(PREFIX) + 2 + 4
    assert bench.device.computed == prompts + 2 * 5 and bench.cached == {"r2": 40, "r3": 100}
    bench.scheduler.end_program(Holder("program", b"", b"", "p"))
    bench.drain()


@given(
    stems=st.lists(st.lists(TOKEN, min_size=1, max_size=30), min_size=1, max_size=3),
    tails=st.lists(st.tuples(st.integers(0, 2), st.lists(TOKEN, min_size=1, max_size=9)), min_size=1, max_size=9),
    max_step_tokens=st.sampled_from([3, 9, 40]),
    steps=st.lists(st.integers(0, 2), min_size=9, max_size=9),
)
@settings(max_examples=30, deadline=None)
def test_whatever_pages_prompts_share_are_computed_once(stems, tails, max_step_tokens, steps):
    bench = Bench(pages=400, page_size=PAGE, slots=16, max_step_tokens=max_step_tokens)
    prompts = [[*stems[stem % len(stems)], *tail] for stem, tail in tails]
    for index, (prompt, count) in enumerate(zip(prompts, steps, strict=False)):
        bench.admit(request(f"r{index}", prompt, 1))
        for _ in range(count):
            bench.step()
    bench.drain()
    seen, computed = set(), 0
    for prompt in prompts:  # in the order of their arrival, as they are served
        pages = [tuple(prompt[:end]) for end in range(PAGE, len(prompt) + 1, PAGE)]
        reusable = [page for page in pages if len(page) < len(prompt)]
        computed += len(prompt) - PAGE * sum(page in seen for page in reusable)
        seen.update(pages)
    assert bench.device.computed == computed


# ── copies of attention: who waits for a prefix, and who does not ────────────────────────────


def begun(*others, slots=8, **options):
    """Two copies, of which the first has begun the prompt of r0, and `others` have come."""
    bench = CopiesBench(2, pages=400, slots=slots, max_step_tokens=20, depth=1, **options)
    bench.admit(fork(0))
    bench.step()
    assert copy_of(bench, "r0") == 0
    bench.admit(*others)
    bench.step()
    return bench


def test_who_shares_the_prefix_waits_while_others_go_to_another_copy():
    bench = begun(fork(1), request("other", [3, 3, 3, 3, 3], 6))
    live = bench.scheduler.live.by_rid
    assert (live["r1"].slot, copy_of(bench, "other")) == (-1, 1)
    end_all(bench)
    assert (bench.cached["r1"], bench.cached["other"]) == (100, 0)
    bench.drain()


@pytest.mark.parametrize(
    "other",
    [
        request("other", [*PREFIX[:8], *[3] * 30], 6),  # what r0 has behind the 8 tokens takes longer than they do
        request("other", [*PREFIX, 1, 2], 6, salt="another"),
        request("other", [*PREFIX[:3], 0, 0, 0, 0, 0], 6),  # less than a page
    ],
)
def test_nobody_waits_for_what_costs_more_than_it_saves(other):
    bench = begun(other)
    assert copy_of(bench, "other") == 1
    bench.drain()


def test_nobody_waits_for_a_copy_alone_because_it_has_less_to_read():
    bench = CopiesBench(2, pages=400, slots=8, max_step_tokens=20, depth=1)
    bench.admit(request("heavy", [1, 2] * 200, 30))
    while not bench.tokens["heavy"]:
        bench.step()
    bench.admit(fork(0))
    while bench.scheduler.live.by_rid["r0"].computed < 80:
        bench.step()
    bench.admit(request("other", [3, 3, 3, 3, 3], 6))
    bench.step()
    assert (copy_of(bench, "heavy"), copy_of(bench, "r0"), copy_of(bench, "other")) == (0, 1, 0)
    bench.drain()


def test_nobody_waits_behind_others_for_longer_than_the_prefix_takes():
    bench = CopiesBench(2, pages=400, slots=32, max_step_tokens=20, depth=1)
    bench.admit(request("first", PREFIX, 1))
    end_all(bench)
    computed, steps = bench.device.computed, len(bench.device.tokens)
    for index in range(8):
        bench.admit(request(f"r{index}", [*PREFIX[:100], index % 4, index // 4, *[3] * 38], 1))
    end_all(bench)
    assert bench.device.computed - computed == 8 * 40 + 100, "the other copy computes the prefix as well"
    assert len(bench.device.tokens) - steps < 8 * 40 // 20, "which takes less time than one after the other"
    bench.drain()


def test_no_more_wait_for_a_copy_than_find_a_slot_there():
    bench = begun(*(fork(index) for index in range(1, 6)))
    live = bench.scheduler.live.by_rid
    assert [live[f"r{index}"].slot >= 0 for index in range(1, 6)] == [False, False, False, True, False]
    bench.step()
    assert copy_of(bench, "r4") == 1
    end_all(bench)
    assert sorted(bench.cached.values()) == [0, 0, 100, 100, 100, 100]
    bench.drain()


def test_who_is_overtaken_again_and_again_begins_in_another_copy():
    bench = begun(fork(1), slots=32)
    live = bench.scheduler.live.by_rid
    for index in range(30):  # each takes the budget of the copy that has the prefix for about a step
        tail = [index % 4, index // 4 % 4, index // 16, *[1] * 17]
        bench.admit(request(f"urgent{index}", [*PREFIX, *tail], 1, priority=1))
        bench.step()
        if live["r1"].slot >= 0:
            break
    assert copy_of(bench, "r1") == 1 and index < 10, "the rest of r0's prompt takes 5 steps"
    bench.drain()


def test_who_came_first_waits_for_the_prefix_of_a_more_urgent_request():
    bench = CopiesBench(2, pages=400, slots=32, max_step_tokens=20, depth=1)
    bench.admit(fork(0), fork(1, priority=1))
    end_all(bench)
    assert bench.cached == {"r0": 100, "r1": 0}
    bench.drain()


def test_without_the_prefix_cache_nobody_waits():
    bench = begun(fork(1), prefix_cache=False)
    assert copy_of(bench, "r1") == 1
    bench.drain()
