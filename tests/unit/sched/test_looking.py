"""Snapshots of the scheduler: what they tell is so, is bounded, and costs at most its share."""

from array import array
from typing import Any

import msgspec
import pytest
from simulated_device import sampling
from test_batcher import Bench

import engine.actors.looking as looking
from engine.actors.looking import Looking
from engine.cache.looking import MOST_CHILDREN, MOST_NODES, look_at_trees
from engine.cache.radix import RadixTree
from engine.messages.looking import HEAD, Snapshot
from engine.messages.request import Admit
from engine.messages.step import StepDone, StepPlan
from engine.sched.looking import look_at_cache, look_at_queue, look_at_rows, parts_of


def numbers(column: bytes) -> list[int]:
    return array("i", column).tolist()


def key(*ids: int) -> bytes:
    return array("i", ids).tobytes()


def admit(rid: str, ids: list[int], max_new: int = 8, salt: str = "") -> Admit:
    return Admit(rid, array("i", ids).tobytes(), sampling(seed=1), max_new=max_new, stop_ids=(), cache_salt=salt)


def test_rows_and_pages_are_those_that_run() -> None:
    bench = Bench(pages=16, page_size=4, slots=2, max_step_tokens=8)
    for rid, first in (("a", 0), ("b", 0), ("c", 1)):
        bench.scheduler.admit(admit(rid, [first, *range(1, 10)]))
    plan = bench.scheduler.plan()
    parts = parts_of(bench.scheduler)
    rows = look_at_rows(parts)
    assert plan is not None and numbers(rows.slots) == [0] and numbers(rows.phases) == [0]
    assert (numbers(rows.prompts), numbers(rows.computed), numbers(rows.replies)) == ([10], [8], [0])
    assert numbers(rows.pages) == [3] and numbers(look_at_queue(parts)) == [10, 10]
    pages, tree, tiers = look_at_cache(parts)
    assert sorted(pages.owners) == sorted("ssr" + 13 * ".") and pages.each == 1 and tiers == ()
    assert (numbers(tree.parents), numbers(tree.pages), numbers(tree.locks)) == ([-1], [2], [1])
    assert numbers(tree.heads) == [0, *range(1, 8), *[-1] * (HEAD - 8)]


def test_a_tree_is_told_from_its_roots_and_bounded() -> None:
    tree = RadixTree(1)
    for branch in range(3):
        for leaf in range(200):
            root, _ = tree.match(b"")
            tree.lock(root)
            end, _ = tree.extend(root, key(branch, 1, leaf), [1000 + branch, 2000 + branch, 3 * leaf + branch])
            if leaf:
                tree.unlock(end)
    told = look_at_trees([tree])
    parents, pages, hidden = numbers(told.parents), numbers(told.pages), numbers(told.hidden)
    assert parents.count(-1) == 3 and pages[:3] == [2, 2, 2] and len(parents) <= MOST_NODES
    assert [parents.count(at) for at in range(3)] == [MOST_CHILDREN] * 3 and hidden[:3] == [200 - MOST_CHILDREN] * 3
    heads = [numbers(told.heads)[at : at + HEAD] for at in range(0, HEAD * len(parents), HEAD)]
    assert {head[0] for head in heads[:3]} == {0, 1, 2} and heads[3][0] == 199  # the newest first
    assert all(parent < at for at, parent in enumerate(parents))


def test_the_text_of_a_salted_prefix_is_not_told() -> None:
    tree = RadixTree(1)
    root, _ = tree.match(b"", b"secret")
    tree.lock(root)
    tree.extend(root, key(7, 8), [0, 1])
    told = look_at_trees([tree])
    assert numbers(told.pages) == [2] and numbers(told.heads) == [-1] * HEAD


class Clock:
    """What the time module says; each look takes `costs` of CPU time."""

    def __init__(self, costs: float) -> None:
        self.now, self.costs, self.spent = 100.0, costs, 0.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        self.spent += self.costs  # a look reads it when it begins, and when it ends
        return self.spent


def look(one: Looking, scheduler: Any = None) -> Snapshot:
    about: dict[str, Any] = {"channels": (), "assets": {("grammar", "making"): 2}}
    packed = one.last() or one.look(scheduler, "ready", "", paused=False, **about)
    return msgspec.msgpack.decode(packed, type=Snapshot)


@pytest.mark.parametrize(("costs", "pause"), [(0.0, 0.45), (0.01, 5.0)])
def test_snapshots_take_a_fifth_of_a_percent_of_the_time_at_most(
    monkeypatch: pytest.MonkeyPatch, costs: float, pause: float
) -> None:
    clock = Clock(costs)
    monkeypatch.setattr(looking, "time", clock)
    one = Looking()
    began = clock.now
    assert look(one).number == 1
    clock.now = began + pause * 0.95
    assert look(one).number == 1  # the same for whoever asks too soon
    clock.now = began + pause * 1.05
    assert look(one).number == 2


def test_steps_are_noted_while_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr(looking, "time", clock)
    one = Looking()
    assert not one.watched
    look(one)
    for number, lengths in enumerate((key(1, 5), key(1, 10), plain := key(1, 1, 1), plain), start=1):
        one.planned(StepPlan(number, slots=lengths, lengths=lengths))
    for number in range(5):  # the first one was sent before anybody looked
        one.done(StepDone(number, b"", b"", 0.25, idle=0.5), clock.now)
    clock.now += 1
    told = look(one)
    steps = told.steps
    assert (steps.last, numbers(steps.rows), numbers(steps.tokens)) == (4, [2, 2, 3, 3], [6, 11, 3, 3])
    assert (array("f", steps.seconds).tolist(), array("f", steps.idle).tolist()) == ([0.25] * 4, [0.5] * 4)
    assert (told.assets[0].kind, told.assets[0].state, told.assets[0].count) == ("grammar", "making", 2)
    clock.now += 3  # nobody has asked since
    one.done(StepDone(5, b"", b"", 0.25), clock.now)
    assert not one.watched
    assert look(one).steps.seconds == b""
