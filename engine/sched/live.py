"""The requests that live: those that run, in one scheduler or in that of a copy each, and those that wait for it."""

from collections.abc import Callable, Iterable
from itertools import chain

from engine.errors import RequestError, counted
from engine.messages.assets import Bound
from engine.messages.request import Admit
from engine.plugin.specs import Policy
from engine.sched.fronts import front_of
from engine.sched.limits import rid_in_use
from engine.sched.request import Request
from engine.sched.sessions import Sessions
from engine.sched.waiting import WaitingQueue


class LiveRequests:
    """All requests `by_rid`, the `queue` of those without a slot, of which `max_waiting` may wait, and `sessions`.

    `policy` orders it; `matched` says how many tokens of a request a cache holds."""

    def __init__(self, policy: Policy, matched: Callable[[Request], int], max_waiting: int, fronts: int) -> None:
        self.by_rid: dict[str, Request] = {}
        self.queue = WaitingQueue(policy, matched)
        self.sessions = Sessions()
        self._max_waiting = max_waiting
        self._fronts = fronts  # that requests come from
        self._arrivals = 0

    def admit(
        self, admit: Admit, bound: tuple[Bound, ...], accept: Callable[[Request, Admit], None], free_slots: int
    ) -> None:
        """Queue a request, as Scheduler.admit says, unless `accept` raises."""
        rid = admit.rid
        if rid in self.by_rid:
            raise rid_in_use(rid)
        request = Request.admitted(admit, self._arrivals, bound)
        if self._fronts > 1:
            request.front = front_of(rid)
        accept(request, admit)
        if len(self.queue) >= (room := self._max_waiting + free_slots):  # who finds a slot does not wait
            raise RequestError(
                f"{counted(len(self.queue), 'request waits', 'requests wait')}, and at most {room} may; "
                "try again later",
                code="queue_full",
                status=503,
            )
        self._arrivals += 1
        self.by_rid[rid] = request
        self.queue.add(request)

    def end(self, rid: str) -> Request | None:
        """Forget a request, which waits no longer; None if no such one lives. One that runs is still to be released."""
        request = self.by_rid.pop(rid, None)
        if request is not None and request.slot < 0:
            self.queue.remove(request)
        return request

    def used(self) -> set[int]:
        """The numbers of the things on the device that they have."""
        return {bound.number for request in self.by_rid.values() for bound in request.bound}

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Assert that they are those that run and those that wait."""
        assert sorted(self.by_rid) == sorted(request.rid for request in chain(running, self.queue))
