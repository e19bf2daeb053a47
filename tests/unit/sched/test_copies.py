"""Copies of attention: whatever happens, each request gets the tokens it would get alone, in the copy that suits it."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from msgspec.structs import replace
from simulated_copies import SimulatedCopies
from simulated_device import sampling
from test_batcher import POLICIES, AnythingHappens, Bench, request
from test_step_cost import calls_of

from engine.errors import RequestError
from engine.messages.request import Admit
from engine.messages.step import StepDone
from engine.sched.chunks import ChunkRule
from engine.sched.copies import Copies
from engine.sched.fronts import front_of, numbers_of
from engine.sched.shares import gathered
from engine.testing.fake import FakeDevice
from engine.testing.steps import rows_of
from engine.worker.steps.copies import Copy
from engine_plugins.policies.order import FirstComeFirstServed


class CopiesBench(Bench):
    """As a Bench, of `copies`, which have `slots` together and `pages` each."""

    def __init__(
        self, copies=2, pages=64, page_size=4, slots=8, max_step_tokens=64, policy="fcfs", prefix_cache=True, depth=2,
        max_model_len=1000, max_waiting=1000, fronts=1, held_steps=0, busy_rows=0,
        lanes=1, attention=0.0,
    ):  # fmt: skip
        super().__init__(depth=depth)
        self.scheduler = Copies(
            copies, pages, page_size, slots=slots, max_model_len=max_model_len, max_step_tokens=max_step_tokens,
            policy=POLICIES[policy](), prefix_cache=prefix_cache,
            max_waiting=max_waiting, fronts=fronts, held_steps=held_steps, busy_rows=busy_rows,
            chunks=ChunkRule(max_step_tokens, lanes, attention, least=2) if lanes > 1 else None,
        )  # fmt: skip
        self.device = SimulatedCopies(copies, pages, page_size, slots, max_step_tokens)

    def commit(self):
        for told in self.scheduler.commit_each(self.flying.popleft(), self.now):
            self.told(told)


class AnythingHappensToCopies(AnythingHappens):
    @initialize(
        copies=st.integers(2, 4),
        pages=st.integers(2, 16),
        page_size=st.integers(1, 4),
        slots=st.integers(4, 9),
        max_step_tokens=st.sampled_from([1, 3, 7, 30]),
        policy=st.sampled_from(sorted(POLICIES)),
        prefix_cache=st.sampled_from([True, True, True, False]),
        depth=st.integers(1, 4),
        held_steps=st.sampled_from([0, 3]),
        lanes=st.sampled_from([1, 1, 2, 3]),
        attention=st.sampled_from([0.0, 0.5]),
    )
    def start(self, **options):
        self.bench = CopiesBench(**options, max_model_len=24)
        self.capacity = options["pages"] * options["page_size"]
        self.next = 0


AnythingHappensToCopies.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestAnythingToCopies = AnythingHappensToCopies.TestCase


# ── what is promised, one by one ─────────────────────────────────────────────────────────────


def copy_of(bench, rid):
    """The copy that a request runs in."""
    return bench.scheduler.live.by_rid[rid].slot // bench.device.slots


def end_all(bench):
    """As Bench.drain, which then flushes the caches."""
    while bench.live:
        bench.step()


def running(bench):
    return [each.running for each in bench.scheduler.counts()["copies"]]


def test_requests_go_where_least_is_read_and_one_step_has_prompts_of_all_copies():
    bench = CopiesBench(copies=3, slots=9)
    bench.admit(*(request(f"r{index}", [index % 4] * length, 9) for index, length in enumerate((20, 9, 4, 6))))
    plan = bench.plan()
    assert bench.device.tokens == [(20, 9, 10)]
    assert [copy_of(bench, f"r{index}") for index in range(4)] == [0, 1, 2, 2]
    slots = [slot for slot, *_ in rows_of(plan)]
    assert slots == sorted(slots) == [0, 3, 6, 7]  # numbered over all copies, rows in the order of these
    bench.drain()


def test_a_prefix_brings_a_request_to_its_copy_unless_that_has_far_more_to_read():
    bench = CopiesBench(pages=400, slots=8)
    stems = [[index] * 40 for index in range(2)]
    bench.admit(*(request(f"stem{index}", stem, 1) for index, stem in enumerate(stems)))
    end_all(bench)
    for index in (1, 0, 1):  # cached pages that nobody uses are no load
        bench.admit(request(f"r{index}{len(bench.admitted)}", [*stems[index], 2], 4))
        bench.plan()
        rid = list(bench.admitted)[-1]
        assert (copy_of(bench, rid), bench.scheduler.live.by_rid[rid].cached) == (index, 40)
    end_all(bench)
    bench.admit(request("long", [*stems[0], *[3] * 750], 2))  # 640 tokens to be computed cost more than it reads
    while bench.scheduler.live.by_rid["long"].slot < 0 or bench.scheduler.live.by_rid["long"].computed < 790:
        bench.step()
    assert copy_of(bench, "long") == 0
    bench.admit(request("away", [*stems[0], 2], 4))
    bench.plan()
    assert (copy_of(bench, "away"), bench.scheduler.live.by_rid["away"].cached) == (1, 0)
    bench.drain()


def test_a_request_must_fit_into_one_copy():
    bench = CopiesBench(copies=2, pages=4, page_size=4)
    with pytest.raises(RequestError, match="need 5 KV pages of 4 tokens, but there are 4"):
        bench.admit(request("long", [1] * 15, 3))
    assert bench.scheduler.counts()["pages"] == 8


def test_requests_are_held_for_few_steps_and_only_while_many_decode():
    bench = CopiesBench(copies=2, slots=8, held_steps=3, busy_rows=1, depth=1)
    bench.admit(request("first", [1], 30))
    bench.step()
    assert running(bench) == [1, 0]
    bench.admit(request("alone", [2], 30))  # one row is less than one a copy: nothing is held
    bench.step()
    assert running(bench) == [1, 1]
    bench.admit(request("held", [3], 30))
    for _ in range(3):
        bench.step()
        assert (running(bench), bench.scheduler.counts()["waiting"]) == ([1, 1], 1)
    bench.step()
    assert (running(bench), bench.scheduler.counts()["waiting"]) == ([2, 1], 0)
    bench.admit(request("two", [3], 30), request("at once", [3], 30))
    bench.step()
    assert (running(bench), bench.scheduler.counts()["waiting"]) == ([2, 3], 0)
    bench.drain()


def test_a_request_that_has_to_give_way_may_go_on_in_another_copy_and_what_it_left_in_flight_is_dropped():
    bench = CopiesBench(pages=6, page_size=2, slots=4, depth=4, prefix_cache=False)
    for index in range(12):
        bench.admit(request(f"r{index}", [index % 4] * (1 + index % 3), 9, seed=index, logprobs=0))
    copies: dict[str, set[int]] = {}
    while bench.live:
        bench.step()
        for rid, each in bench.scheduler.live.by_rid.items():
            if each.slot >= 0:
                copies.setdefault(rid, set()).add(copy_of(bench, rid))
    bench.drain()  # Bench.told compares the tokens
    assert sum(len(each) == 2 for each in copies.values()) > 2


@given(data=st.data(), fronts=st.integers(2, 4), copies=st.integers(2, 3))
@settings(max_examples=30, deadline=None)
def test_each_front_is_told_of_all_its_requests_and_no_others(data, fronts, copies):
    bench = CopiesBench(copies=copies, slots=9, fronts=fronts, max_step_tokens=20)
    told = bench.told

    def of_one_front(message):
        assert len({front_of(rid) for rid in message.rids}) == 1
        told(message)

    bench.told = of_one_front
    numbers = [numbers_of(front, 0) for front in range(fronts)]
    for seed in range(12):
        rid = format(next(numbers[data.draw(st.integers(0, fronts - 1))]), "x")
        ids = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=30))
        scored = data.draw(st.sampled_from([-1, -1, 1]))
        bench.admit(request(rid, ids, data.draw(st.integers(1, 9)), seed=seed, logprobs=scored, prompt_logprobs=scored))
        for _ in range(data.draw(st.integers(0, 2))):
            bench.step()
    bench.drain()


def test_vectors_come_from_the_copy_that_made_them():
    scheduler = Copies(
        2,
        0,
        4,
        slots=4,
        max_model_len=100,
        max_step_tokens=20,
        policy=FirstComeFirstServed(),
        prefix_cache=True,
        max_waiting=100,
    )
    for index in range(4):
        ids = array("i", [index] * (index + 3)).tobytes()
        scheduler.admit(Admit(f"r{index}", ids, sampling(0), (), 0))
    parts, plan = [], scheduler.plan()
    for number in range(2):  # a fake device makes the sum of the ids and their count a vector
        own, among = Copy(number, 2, 2).own(plan)
        parts.append(among.numbered(FakeDevice().step(own)))
    said = {}
    for message in scheduler.commit_each(gathered(parts)):
        said |= {message.rids[row]: array("f", vector).tolist() for row, vector in message.vectors}
    assert said == {f"r{index}": [index * (index + 3), index + 3] for index in range(4)}
    scheduler.check_integrity()
    assert scheduler.counts()["running"] == 0


def test_who_cannot_go_on_is_found_in_its_copy():
    bench = CopiesBench(copies=2, slots=4, depth=1)
    bench.admit(*(request(f"r{index}", [index], 9) for index in range(4)))
    bench.plan()
    done = replace(bench.flying[0], stuck=((1, "one"), (2, "two")))
    assert copy_of(bench, "r0") == copy_of(bench, "r2") == 0
    assert bench.scheduler.stuck(done) == [("r2", "one"), ("r1", "two")]
    bench.drain()


def test_a_decode_step_calls_no_more_for_many_rows_than_for_few():
    calls = []
    for rows in (2, 256):
        scheduler = Copies(
            2,
            64 * rows,
            16,
            slots=rows,
            max_model_len=1000,
            max_step_tokens=4096,
            policy=FirstComeFirstServed(),
            prefix_cache=True,
            max_waiting=rows,
        )
        for index in range(rows):
            ids = array("i", [index, *range(2)]).tobytes()
            scheduler.admit(Admit(str(index), ids, sampling(0), (), 900))
        ones = array("i", [1] * rows).tobytes()
        for step in range(1, 4):
            scheduler.plan()
            scheduler.commit_each(StepDone(step, ones, ones, 0.0))
        seen = calls_of(scheduler.plan, scheduler.commit_each, StepDone(4, ones, ones, 0.0))
        assert seen.count("array.append") == rows
        calls.append(len(seen) - rows)
    assert calls[0] == calls[1] <= 127


def test_all_that_runs_goes_back_to_the_queue_where_the_server_is_paused():
    bench = CopiesBench(copies=2, slots=6, depth=1)
    bench.admit(*(request(f"r{index}", [index % 4] * 9, 9, seed=index) for index in range(8)))
    for _ in range(4):
        bench.step()
    assert running(bench) == [3, 3]
    bench.scheduler.retract_all()
    bench.scheduler.check_integrity()
    counts = bench.scheduler.counts()
    assert (running(bench), counts["waiting"], counts["retractions_total"]) == ([0, 0], 8, 6)
    bench.drain()  # Bench.told compares the tokens
