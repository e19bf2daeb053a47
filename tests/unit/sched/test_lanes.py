"""Lanes of a pipeline: steps of different rows follow each other, and chunks of prompts suit the stages."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batcher import Bench, request

from engine.messages.step import NOTHING, TOKEN, StepPlan
from engine.sched.chunks import LEAST, ChunkRule
from engine.testing.steps import rows_of


def decoding(plan: StepPlan) -> set[int]:
    """The slots of rows that compute one token and yield the next."""
    return {slot for slot, _, length, yields in rows_of(plan) if (length, yields) == (1, TOKEN)}


def planned(bench: Bench, count: int) -> list[StepPlan]:
    """The next plans, each sent before the result of the one `depth` before it has come."""
    plans = []
    for _ in range(count):
        if len(bench.flying) == bench.depth:
            bench.commit()
        plan = bench.plan()
        assert plan is not None
        plans.append(plan)
    return plans


@pytest.mark.parametrize("fronts", [1, 3])
@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_rows_are_divided_over_lanes_that_take_turns(lanes: int, fronts: int) -> None:
    bench = Bench(slots=12, pages=400, lanes=lanes, depth=lanes + 1, fronts=fronts)
    for index in range(12):
        bench.admit(request(format(index, "x"), [index % 4, 1], max_new=60, seed=index))
    planned(bench, 6 + 2 * lanes)
    steps = planned(bench, 3 * lanes)
    turn = [plan.lane for plan in steps[:lanes]]
    assert sorted(turn) == list(range(lanes)) and [plan.lane for plan in steps] == turn * 3
    for place in range(lanes):
        own = [decoding(plan) for plan in steps[place::lanes]]
        assert all(rows == own[0] and len(rows) == 12 // lanes for rows in own)  # each stays in its lane
    assert set().union(*map(decoding, steps[:lanes])) == set(range(12))


def test_no_row_follows_a_token_that_is_on_its_way_while_other_lanes_have_rows() -> None:
    """Once rows decode, what a step reads was drawn a turn of all lanes before."""
    bench = Bench(slots=8, pages=400, lanes=4, depth=5)
    for index in range(8):
        bench.admit(request(format(index, "x"), [index % 4], max_new=40, seed=index))
    planned(bench, 16)
    steps = [decoding(plan) for plan in planned(bench, 20)]
    for first in range(len(steps) - 3):
        assert sum(len(rows) for rows in steps[first : first + 4]) == 8
        assert len(set().union(*steps[first : first + 4])) == 8


def test_lanes_are_evened_out_when_requests_end() -> None:
    bench = Bench(slots=8, pages=400, lanes=2, depth=3)
    for index in range(8):
        bench.admit(request(format(index, "x"), [index % 4], max_new=60, seed=index))
    one, two = planned(bench, 8)[-2:]
    by_slot = {bench.device.admits[slot].sampling.seed: slot for slot in range(8)}
    for seed, slot in by_slot.items():
        if slot in decoding(one):  # all of one lane
            bench.told(bench.scheduler.abort(format(seed, "x")))
    planned(bench, 4)
    one, two = planned(bench, 2)
    assert (len(decoding(one)), len(decoding(two))) == (2, 2)
    bench.drain()


def test_a_prompts_chunks_follow_each_other_before_any_has_come_out() -> None:
    bench = Bench(pages=100, max_step_tokens=8, lanes=2, depth=3)
    bench.admit(request("long", [1] * 40, max_new=2))
    plans = planned(bench, 3)  # nothing is committed
    assert [next(iter(rows_of(plan)))[1:] for plan in plans] == [
        (0, 8, NOTHING),
        (8, 8, NOTHING),
        (16, 4, NOTHING),
    ]
    assert [plan.lane for plan in plans] == [1, 0, 1]
    bench.drain()


def test_the_chunks_of_a_prompt_cost_the_same() -> None:
    """A model whose token costs twice as much behind 32,768 tokens, on steps of 8,192 tokens."""
    rule = ChunkRule(most=8192, stages=2, attention=1 / 32768)
    start, chunks, costs = 0, [], []
    while start < 128 * 1024:
        length = rule.length(start, rule.work(0, 8192))
        chunks.append(length)
        costs.append(rule.work(start, length))
        start += length
    assert chunks[0] == 8192 and chunks == sorted(chunks, reverse=True)
    assert 1800 < chunks[-1] < 2100  # 1 + 4 times as dear
    assert max(costs) / min(costs) < 1.001


def test_what_is_left_for_all_stages_is_shared() -> None:
    rule = ChunkRule(most=8192, stages=2, attention=0.0)

    def steps(*lengths: int) -> float:
        bench = Bench(pages=20000, slots=8, max_step_tokens=8192, lanes=2)
        bench.admit(*(request(str(index), [1] * length, max_new=1) for index, length in enumerate(lengths)))
        return rule.budget(bench.scheduler._queue)

    assert steps(100) == LEAST
    assert steps(800, 16) == LEAST
    assert steps(900, 900, 900, 900) == 900
    assert steps() == LEAST


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, 1 << 20),
    work=st.floats(0.0, 1e6),
    attention=st.sampled_from([0.0, 1e-6, 3e-5, 1e-3, 1.0]),
    most=st.integers(1, 16384),
)
def test_a_chunk_takes_its_work_or_the_least(start: int, work: float, attention: float, most: int) -> None:
    rule = ChunkRule(most, 2, attention)
    length = rule.length(start, work)
    assert 0 <= length <= most and (length > 0) == (work > 0.0)
    if length > max(1, min(LEAST, int(work))):
        assert rule.work(start, length) <= work * (1 + 1e-9)
    if length < most and work > 0.0:
        assert rule.work(start, length + 1) > work * (1 - 1e-9)


def test_decode_rows_and_chunks_share_a_step() -> None:
    bench = Bench(pages=200, slots=4, max_step_tokens=16, lanes=2, depth=3)
    bench.admit(request("0", [1], max_new=50), request("1", [2], max_new=50))
    planned(bench, 6)
    bench.admit(request("2", [3] * 40, max_new=3))
    plans = planned(bench, 6)
    chunks = [length for plan in plans for _, _, length, yields in rows_of(plan) if yields == NOTHING]
    assert sum(chunks) < 40 and len(chunks) >= 3
    assert all(len(decoding(plan)) >= 1 for plan in plans)
    assert array("i", plans[0].lengths)[0] == 1
    bench.drain()
