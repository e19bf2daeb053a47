"""What a decode step costs on the host, in calls: time depends on the machine, but how much is called does not."""

import sys
from array import array
from collections.abc import Callable

import pytest
from simulated_device import sampling

from engine.messages.request import Admit
from engine.messages.step import StepDone
from engine.sched import Scheduler
from engine_plugins.policies.order import FirstComeFirstServed

PAGE = 16
ONE = array("i", [1]).tobytes()
MOST_CALLS = 28  # of plan and commit together, but for what keeps each token


def decoding(rows: int) -> tuple[Scheduler, int]:
    """A scheduler whose `rows` requests decode, and the number of its next step. None is due for a page."""
    scheduler = Scheduler(
        pages=64 * rows, page_size=PAGE, slots=rows, max_model_len=1000, max_step_tokens=4096,
        policy=FirstComeFirstServed(), prefix_cache=True, max_waiting=rows,
    )  # fmt: skip
    for index in range(rows):
        ids = array("i", [index, *range(2)]).tobytes()
        scheduler.admit(Admit(str(index), ids, sampling(0, "", -1, -1, b""), (), 900))
    for step in range(1, 4):
        plan = scheduler.plan()
        assert plan is not None
        scheduler.commit(StepDone(step, ONE * rows, ONE * rows, 0.0))
    return scheduler, 4


def calls_of(plan: Callable[[], object], commit: Callable[[StepDone], object], done: StepDone) -> list[str]:
    """What one plan and one commit call, in Python and in C."""
    seen: list[str] = []

    def note(frame, event, argument):
        if event == "call":
            seen.append(frame.f_code.co_name)
        elif event == "c_call":
            seen.append(argument.__qualname__)

    sys.setprofile(note)
    try:
        plan()
        commit(done)
    finally:
        sys.setprofile(None)
    assert seen.pop() == "setprofile"
    return seen


@pytest.mark.parametrize("rows", [1, 2, 256])
def test_a_decode_step_calls_no_more_for_many_rows_than_for_one_but_to_keep_each_token(rows):
    scheduler, step = decoding(rows)
    done = StepDone(step, ONE * rows, ONE * rows, 0.0)
    calls = calls_of(scheduler.plan, scheduler.commit, done)
    assert calls.count("array.append") == rows
    assert len(calls) - rows <= MOST_CALLS, calls


def test_rows_are_looked_at_only_in_the_step_in_which_they_need_a_page():
    scheduler, step = decoding(256)
    results = [StepDone(step + n, ONE * 256, ONE * 256, 0.0) for n in range(2 * PAGE)]
    counts = [len(calls_of(scheduler.plan, scheduler.commit, done)) - 256 for done in results]
    dear = [n for n, count in enumerate(counts) if count > MOST_CALLS]
    assert len(dear) == 2 and dear[1] - dear[0] == PAGE, counts
