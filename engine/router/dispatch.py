"""Who gets a request: the policy's choice among the workers that may take it, now or once one of them can.

    place(ticket) ──a worker has room──> Placed ──release──> the next in the queue
          └── none has: a bounded queue, by priority and arrival, until its deadline

A ticket may be bound to one worker, which holds what it is about. Workers that it was sent to in vain are left out,
until all were. Where the policy knows of no cache that holds a part, a session stays where it was sent before, unless
that worker has far more to do than others.
Left out: sending (`proxy`), and what a worker's cache holds (the policy).
"""

import asyncio
import heapq
import itertools
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from engine.errors import RequestError, counted
from engine.router.options import QueueOptions
from engine.router.policy import Arrival, Choice, RoutingPolicy
from engine.router.workers import Fleet, Worker

PATIENCE: Final = "X-Queue-Seconds"  # by which a client may wait less than --queue-seconds
MOST_SESSIONS: Final = 100_000
LEANING: Final = 8  # requests that a session's worker may have beyond twice those of the least busy one
MOST_RETRY_SECONDS: Final = 60
RATES: Final = 64  # requests that ended last, of which the rate is told
log = logging.getLogger("engine.router")


class Ticket:
    """A request on its way to a worker."""

    def __init__(
        self,
        arrival: Arrival,
        *,
        priority: int = 0,
        bound: str = "",
        seconds: float = math.inf,
        rids: Sequence[str] = (),
        key: str | None = None,
    ) -> None:
        self.arrival = arrival
        self.rids = rids  # by which it may be aborted
        self.key = key  # that its client has shown
        self.priority = priority
        self.bound = bound  # the URL of the only worker that it may go to
        self.seconds = seconds  # that it may wait
        self.tried: set[str] = set()
        self.order = -1  # its place among those of its priority, kept when it is sent again
        self.found: asyncio.Future[Placed] | None = None


class Placed(Struct):
    """A request and its worker. `waiting` characters of it count there until its first byte; `trial` says that the
    worker's breaker waits for what becomes of it."""

    worker: Worker
    choice: Choice
    waiting: int
    trial: bool


def tell(told: Callable[..., None], *what: object) -> None:
    """Tell a policy `what` came about; nothing else fails because a policy does."""
    try:
        told(*what)
    except Exception:
        log.exception("the policy failed; the router goes on without it")


class Dispatcher:
    """The queue before all workers. `outside` are requests that other routers have at a worker, by its URL."""

    def __init__(self, fleet: Fleet, policy: RoutingPolicy, options: QueueOptions) -> None:
        self.fleet = fleet
        self.policy = policy
        self.outside: dict[str, int] = {}
        self.on_sent: list[Callable[[Arrival, str], None]] = []
        self.refused = 0
        self.timed_out = 0
        self._options = options
        self._order = itertools.count()
        self._queue: list[tuple[int, int, Ticket]] = []
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._ends: deque[float] = deque(maxlen=RATES)
        fleet.on_change.append(self.pump)
        fleet.on_removed.append(self._forget)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    # ── choosing ─────────────────────────────────────────────────────────────────────────────

    def candidates(self, ticket: Ticket) -> list[Worker]:
        """The workers that it may be sent to, if they have room."""
        all_ = [each for each in self.fleet.workers.values() if each.may_take and each.url not in ticket.tried]
        if ticket.bound:
            return [each for each in all_ if each.url == ticket.bound]
        model = ticket.arrival.model
        return [each for each in all_ if each.serves(model)] or all_

    def choose(self, ticket: Ticket) -> tuple[Worker, Choice] | None:
        """Where it would go now; None if nowhere. Changes nothing."""
        able = [each for each in self.candidates(ticket) if each.room > 0]
        if not able:
            return None
        if ticket.bound:
            return able[0], Choice(0, 0, "holds what the request is about")
        choice = self._chosen(ticket.arrival, able)
        program = ticket.arrival.program
        if program and not choice.matched and (kept := self._kept(able, self._sessions.get(program, ""))) is not None:
            return kept, Choice(0, 0, "its session is there")
        return able[choice.worker], choice

    def _kept(self, able: Sequence[Worker], url: str) -> Worker | None:
        """The worker at `url`, if it is there and not much busier than the others."""
        found = next((each for each in able if each.url == url), None)
        if found is None or found.view.running > 2 * min(each.view.running for each in able) + LEANING:
            return None
        return found

    def _chosen(self, arrival: Arrival, able: Sequence[Worker]) -> Choice:
        views = [each.view for each in able]
        if outside := self.outside:
            views = [replace(view, running=view.running + outside.get(view.name, 0)) for view in views]
        try:
            choice = self.policy.choose(arrival, views)
            if 0 <= choice.worker < len(views) and choice.matched >= 0:
                return choice
            log.error(
                "the policy chose worker %d of %d and a match of %d; the least busy one is taken",
                choice.worker, len(views), choice.matched,
            )  # fmt: skip
        except Exception:
            log.exception("the policy failed; the least busy worker is taken")
        least = min(range(len(views)), key=lambda index: views[index].running)
        return Choice(least, 0, "the policy failed: least requests")

    # ── placing ──────────────────────────────────────────────────────────────────────────────

    async def place(self, ticket: Ticket) -> Placed:
        """A place for it, which `release` gives back. Raises RequestError: 429 if the queue is full, 503 if there is
        no worker at all, or none has taken it before its deadline."""
        if ticket.order < 0:
            ticket.order = next(self._order)
        if (placed := self._take(ticket)) is not None:
            return placed
        if not self.fleet.workers:
            raise RequestError("no worker is known; add one with POST /workers", code="no_worker", status=503)
        if len(self._queue) >= self._options.max_queue:
            self.refused += 1
            raise RequestError(
                f"{counted(len(self._queue), 'request')} wait for a worker, and at most {self._options.max_queue} may "
                f"(--max-queue); {self.state()}; try again in {self.retry_seconds()} s",
                code="queue_full",
                status=429,
            )
        return await self._wait(ticket)

    async def _wait(self, ticket: Ticket) -> Placed:
        found: asyncio.Future[Placed] = asyncio.get_running_loop().create_future()
        ticket.found = found
        entry = (-ticket.priority, ticket.order, ticket)
        heapq.heappush(self._queue, entry)
        seconds = min(ticket.seconds, self._options.queue_seconds)
        try:
            async with asyncio.timeout(seconds):
                return await found
        except BaseException as error:
            if (
                found.done() and not found.cancelled() and found.exception() is None
            ):  # it came too late: its client has left, or was told so
                self.release(found.result())
            elif entry in self._queue:
                self._queue.remove(entry)
                heapq.heapify(self._queue)
            if not isinstance(error, TimeoutError):
                raise
            self.timed_out += 1
            raise RequestError(
                f"no worker took the request within {seconds:g} s "
                f"({'--queue-seconds' if seconds < ticket.seconds else PATIENCE}); {self.state()}; try again in "
                f"{self.retry_seconds()} s",
                code="queue_timeout",
                status=503,
            ) from None
        finally:
            ticket.found = None

    def _take(self, ticket: Ticket) -> Placed | None:
        """Send it now, if that can be."""
        chosen = self.choose(ticket)
        if chosen is None:
            return None
        worker, choice = chosen
        arrival, view = ticket.arrival, worker.view
        placed = Placed(worker, choice, max(0, len(arrival.text) - choice.matched), worker.breaker.sent())
        view.running += 1
        view.waiting_chars += placed.waiting
        worker.emptied.clear()
        worker.counts.sent += 1
        worker.counts.prompt_chars += len(arrival.text)
        worker.counts.matched_chars += choice.matched
        self._stays(arrival.program, worker.url)
        tell(self.policy.sent, arrival, worker.url)
        for told in self.on_sent:
            told(arrival, worker.url)
        return placed

    def learn(self, arrival: Arrival, url: str) -> None:
        """Another router has sent it to the worker at `url`."""
        self._stays(arrival.program, url)
        tell(self.policy.sent, arrival, url)

    def answered(self, arrival: Arrival, worker: Worker, cached: float | None) -> None:
        """The answer came whole, and says what share of the prompt was cached, or does not."""
        if arrival.text:
            tell(self.policy.answered, arrival, worker.url, cached)

    def _stays(self, program: str, url: str) -> None:
        """The calls of `program` go to the worker at `url` from now on."""
        if program:
            self._sessions[program] = url
            self._sessions.move_to_end(program)
            if len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)

    def answering(self, placed: Placed) -> None:
        """The first byte has come, so its prompt is read."""
        placed.worker.view.waiting_chars -= placed.waiting
        placed.waiting = 0

    def release(self, placed: Placed) -> None:
        """The request is over, there."""
        self.answering(placed)
        view = placed.worker.view
        view.running -= 1
        if not view.running:
            placed.worker.emptied.set()
        self._ends.append(time.monotonic())
        if self._queue:
            self.pump()

    def pump(self) -> None:
        """Send what waits and can be sent, the first first. Of tickets that may go to the same workers, one is tried in
        vain and not all: many may wait for one model, while workers of others have room."""
        passed: list[tuple[int, int, Ticket]] = []  # those for workers that have no room, while others have some
        full: set[tuple[str, str]] = set()  # what was tried in vain
        while self._queue and any(each.room > 0 and each.may_take for each in self.fleet.workers.values()):
            entry = heapq.heappop(self._queue)
            ticket = entry[2]
            if ticket.found is None or ticket.found.done():
                continue
            alike = ticket.bound, ticket.arrival.model
            if alike in full and not ticket.tried:
                passed.append(entry)
            elif (placed := self._take(ticket)) is None:
                passed.append(entry)
                if not ticket.tried:
                    full.add(alike)
            else:
                ticket.found.set_result(placed)
        for entry in passed:
            heapq.heappush(self._queue, entry)

    def abort(self, rid: str | None, key: str | None = None) -> int:
        """End those requests in the queue that have this id and came with this `key`, or all; how many."""
        queued = [each[2] for each in self._queue]
        found = [each for each in queued if rid is None or (rid in each.rids and each.key == key)]
        for ticket in found:
            if ticket.found is not None and not ticket.found.done():
                message = "the request was aborted while it waited for a worker"
                ticket.found.set_exception(RequestError(message, code="aborted", status=409))
        return len(found)

    # ── words ────────────────────────────────────────────────────────────────────────────────

    def state(self) -> str:
        """The workers in words."""
        workers = self.fleet.workers.values()
        able = [each for each in workers if each.may_take]
        if not able:
            why = "".join(f", as {each.url} is {each.why_not()}" for each in list(workers)[:1])
            return f"none of {counted(len(workers), 'worker')} takes requests{why}"
        running = sum(each.view.running for each in able)
        room = sum(each.view.capacity for each in able)
        take = counted(len(able), "worker takes", "workers take")
        return f"{take} requests, of {len(workers)}, and {running} of at most {room} requests run there"

    def retry_seconds(self) -> int:
        """When the queue of now will be empty, at the rate of late."""
        if len(self._ends) < 2:
            return 1
        rate = (len(self._ends) - 1) / max(time.monotonic() - self._ends[0], 1e-3)
        return min(MOST_RETRY_SECONDS, max(1, math.ceil(len(self._queue) / rate)))

    def _forget(self, url: str) -> None:
        self.outside.pop(url, None)
        tell(self.policy.removed, url)
