"""The waiting queue: kept by priority and arrival, offered in the order of a policy.

Higher priority goes first under every policy; a policy orders within a priority, and calls of one program that wait
go together. Only the head of the queue is offered, so that a step's cost does not grow with the queue.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from engine.plugin.specs import Policy, Waiting
from engine.sched.request import Request, rank

OFFERED = 256  # most requests a policy is asked to order
MATCHED = 128  # longest queue whose prefixes are looked up for a policy; beyond, it orders by arrival


class WaitingQueue:
    """Requests without a slot. `matched` says how many tokens of a request the cache holds."""

    def __init__(self, policy: Policy, matched: Callable[[Request], int]) -> None:
        self._policy = policy
        self._matched = matched
        self._requests: list[Request] = []  # by rank
        self._views: list[Waiting] = []  # what the policy sees of each; no request changes while it waits

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Put `request` at its place: one that ran before keeps its arrival."""
        index = bisect_left(self._requests, rank(request), key=rank)
        self._requests.insert(index, request)
        self._views.insert(index, _view(request))

    def remove(self, request: Request) -> None:
        """Take out `request`, which waits."""
        index = bisect_left(self._requests, rank(request), key=rank)
        assert self._requests[index] is request
        del self._requests[index], self._views[index]

    def ordered(self) -> list[Request]:
        """The requests to try now, first to run first."""
        head = self._requests[:OFFERED]
        if len(head) <= 1:
            return head
        if self._policy.needs_match and len(self._requests) <= MATCHED:
            matched = [self._matched(request) for request in head]
        else:
            matched = [0] * len(head)
        order = [head[index] for index in self._policy.order(self._views[:OFFERED], matched)]
        if any(request.program for request in head):
            order = together(order)
        if head[0].priority != head[-1].priority:
            order.sort(key=lambda request: -request.priority)
        return order


def together(order: Sequence[Request]) -> list[Request]:
    """`order`, with the calls of a program right behind its first."""
    groups: dict[object, list[Request]] = {}
    for request in order:
        groups.setdefault(request.program or request, []).append(request)
    return [request for group in groups.values() for request in group]


def _view(request: Request) -> Waiting:
    return Waiting(
        arrival=request.arrival,
        priority=request.priority,
        prompt_len=request.prompt_len,
        length=len(request.ids),
        max_new=request.limit - len(request.ids),
    )
