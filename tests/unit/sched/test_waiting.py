"""What a policy sees of the waiting queue."""

from array import array
from collections.abc import Sequence

import pytest

from engine.messages.request import Admit
from engine.params.sampling import Sampling
from engine.plugin import Waiting
from engine.sched.request import Request
from engine.sched.waiting import WaitingQueue


class Watching:
    needs_match = True

    def __init__(self) -> None:
        self.seen: list[Waiting] = []

    def order(self, waiting: Sequence[Waiting], matched: Sequence[int]) -> list[int]:
        self.seen = list(waiting)
        return list(range(len(waiting)))[::-1]


def request(arrival: int, length: int, priority: int = 0) -> Request:
    ids = array("i", range(length)).tobytes()
    sampling = Sampling(0.0, 0, 1.0, 0.0, 1)
    return Request.admitted(Admit(f"r{arrival}", ids, sampling, (), 7, priority, ""), arrival)


def test_a_policy_sees_views_that_it_cannot_change() -> None:
    policy = Watching()
    queue = WaitingQueue(policy, lambda request: 0)
    late, early, urgent = request(1, 5), request(0, 3), request(2, 4, priority=1)
    again = request(3, 6)
    again.ids.extend([1, 2])  # it was retracted after two tokens
    for each in (late, early, urgent, again):
        queue.add(each)
    assert queue.ordered() == [urgent, again, late, early]  # its order, within a priority
    told = [(view.arrival, view.priority, view.prompt_len, view.length, view.max_new) for view in policy.seen]
    assert told == [(2, 1, 4, 4, 7), (0, 0, 3, 3, 7), (1, 0, 5, 5, 7), (3, 0, 6, 8, 5)]
    with pytest.raises(AttributeError):
        policy.seen[0].priority = 9  # type: ignore[misc]
    queue.remove(early)
    assert queue.ordered() == [urgent, again, late]
    assert [view.arrival for view in policy.seen] == [2, 1, 3]
