"""One request, from its body to the last byte of its answer.

    read ──> place (dispatch) ──> ask a worker ──first byte──> relay ──> the end: counted, policy told
                 ^                     └── no byte came, or 429, 502, 503, 504, and another may take it ──┐
                 └──────────────────────────────── tried elsewhere, --retries times ─────────────────────┘

Nothing goes to the client before the first byte of the body has come from the worker (or its end), so until then a
request can be moved; after that a worker that breaks off breaks the client's connection, because an answer that is not
whole must not look whole. A client that leaves cancels this, which closes the connection to the worker: its abort.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from aiohttp import web
from msgspec import Struct

from engine.errors import RequestError, WorkerError, counted, shut_down
from engine.http.intake import read_body, release_body
from engine.http.keys import KEY
from engine.http.repeated import joined, once
from engine.router.asked import RESPONSE_ID, Asked, cached_share, read_asked
from engine.router.dispatch import PATIENCE, Placed, Ticket
from engine.router.keys import CREDENTIALS, Caller
from engine.router.relay import relay, request_head
from engine.router.wire import BrokenConnection, Head, Upstream
from engine.router.workers import Worker

if TYPE_CHECKING:
    from engine.router.router import Router

ELSEWHERE: Final = frozenset({429, 502, 503, 504})  # statuses of a worker that another one may do without
FAILURES: Final = frozenset({502, 504})
PASSED: Final = ("anthropic-version", "Via")
log = logging.getLogger("engine.router")


class Decision(Struct):
    """What the access log says of a request."""

    worker: str = ""
    reason: str = ""
    tries: int = 0
    matched: int = 0
    chars: int = 0
    first: float | None = None  # seconds to the first byte


DECISION = web.RequestKey("decision", Decision)


class Moved(WorkerError):
    """The worker has not answered, and nothing went to the client."""


def passed(request: web.Request) -> Caller:
    """Who has sent `request`, for questions beside the request itself. Raises RequestError for several keys of one
    kind."""
    own = {name: once(request.headers, name) for name in CREDENTIALS}
    own |= {name: joined(request.headers, name) or None for name in PASSED}
    return Caller({name: value for name, value in own.items() if value is not None}, request.get(KEY))


async def ticket_of(router: "Router", request: web.Request, asked: Asked) -> Ticket:
    """Where `request` may go, and how long it may wait. Raises RequestError, 404 if what it is about is gone."""
    bound = await router.holder(asked, passed(request)) if asked.response else ""
    seconds = math.inf
    if (said := once(request.headers, PATIENCE)) is not None:
        try:
            seconds = float(said)
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            raise RequestError(
                f"{PATIENCE} is {said[:80]!r}; send the seconds that the request may wait, above 0", param=PATIENCE
            )
    key, rids = request.get(KEY), asked.rids
    return Ticket(asked.arrival, priority=asked.priority, bound=bound, seconds=seconds, rids=rids, key=key)


async def proxied(router: "Router", request: web.Request) -> web.StreamResponse:
    """The answer of a worker to `request`. Raises RequestError where no worker can answer it."""
    if router.draining:
        raise shut_down()
    body = await read_body(request)
    asked = read_asked(request, body)
    return await Journey(router, request, body, asked, await ticket_of(router, request, asked)).run()


class Journey:
    """One request on its way to one worker, or to several, one after another."""

    def __init__(self, router: "Router", request: web.Request, body: bytes, asked: Asked, ticket: Ticket) -> None:
        self._router = router
        self._request = request
        self._body = body
        self._asked = asked
        self._ticket = ticket
        self._began = time.perf_counter()
        self._decision = request[DECISION] = Decision(chars=len(asked.arrival.text))

    async def run(self) -> web.StreamResponse:
        """The answer."""
        decision, dispatcher = self._decision, self._router.dispatcher
        while True:
            placed = await dispatcher.place(self._ticket)
            decision.worker, decision.reason, decision.matched = (
                placed.worker.url, placed.choice.reason, placed.choice.matched,
            )  # fmt: skip
            decision.tries += 1
            try:
                return await self._at(placed)
            except Moved as error:
                if decision.tries > self._router.config.queue.retries:
                    raise RequestError(
                        f"{error}; the request was sent {counted(decision.tries, 'time')} (--retries) and never "
                        "answered; send it again later",
                        code="worker_failed",
                        status=502,
                    ) from None
                self._move(placed.worker, error)
            finally:
                dispatcher.release(placed)

    async def _at(self, placed: Placed) -> web.StreamResponse:
        """The answer of the worker that the request is placed at. Raises Moved if it has none."""
        worker, places, rids = placed.worker, self._router.places, self._asked.rids
        places.begin(rids, worker.url)
        upstream: Upstream | None = None
        verdict: Callable[[], None] = partial(worker.breaker.undecided, trial=placed.trial)
        try:
            upstream, head = await self._begun(worker)
            self._decision.first = time.perf_counter() - self._began
            self._router.metrics.first_byte.observe(self._decision.first)
            if head.status in ELSEWHERE and self._others(worker):
                raise Moved(f"the worker {worker.url} answered {head.status}")
            release_body(self._request)
            self._router.dispatcher.answering(placed)
            if id := head.names.get(b"x-request-id", b"").decode("latin-1"):
                places.begin((id,), worker.url)
                rids = (*rids, id)
            if self._request.path == "/v1/responses" and (found := RESPONSE_ID.search(upstream.seen()[0])) is not None:
                places.learn(found[1].decode(), worker.url)
            worker.streaming.add(upstream)
            broken = partial(worker.failed, trial=placed.trial)
            response = await self._relayed(worker, upstream, head, broken)
            if head.status not in ELSEWHERE:
                verdict = worker.breaker.succeeded
            return response
        except Moved:
            if upstream is None or head.status in FAILURES:
                verdict = partial(worker.failed, trial=placed.trial)
            raise
        finally:
            verdict()
            places.end(rids, worker.url)
            if upstream is not None:
                worker.give_back(upstream)

    async def _begun(self, worker: Worker) -> tuple[Upstream, Head]:
        """The connection over which an answer has begun to come, and its head. Raises Moved if none does."""
        request = self._request
        router, body = self._router, self._body
        head = request_head(request, worker.address, len(body), router.worker_keys.of(worker.url), router.via)
        fresh = False
        while True:
            try:
                upstream = await worker.connection(fresh=fresh)
            except WorkerError as error:
                raise Moved(str(error)) from None
            worker.unanswered.add(upstream)
            try:
                answer = await upstream.ask(head, body)
                if not upstream.ended:
                    await upstream.woken()
                worker.unanswered.discard(upstream)
                return upstream, answer
            except BaseException as error:
                upstream.close()
                worker.give_back(upstream)
                if isinstance(error, BrokenConnection) and error.unused:
                    fresh = True  # the worker had closed it meanwhile, which says nothing
                    continue
                if isinstance(error, WorkerError):
                    raise Moved(f"{error} ({worker.url})") from None
                raise

    async def _relayed(
        self, worker: Worker, upstream: Upstream, head: Head, broken: Callable[[], None]
    ) -> web.StreamResponse:
        """Answer the client; what the answer says of itself is noted, and `broken` is called if it is not whole."""
        try:
            response = await relay(self._request, upstream, head)
        except WorkerError as error:
            broken()
            worker.counts.failed += 1
            log.warning("%s; its answer had begun, so the client's connection is closed", error)
            raise ConnectionResetError("the worker broke off") from None
        worker.counts.answered += 1
        said = cached_share(upstream.seen()[1]) if head.status == 200 else None
        if said is not None:
            worker.counts.cached_tokens += said[0]
            worker.counts.prompt_tokens += said[1]
        self._router.dispatcher.answered(self._asked.arrival, worker, None if said is None else said[0] / said[1])
        return response

    def _others(self, worker: Worker) -> bool:
        """Whether another worker than this one would take the request now."""
        tried = self._ticket.tried
        if self._ticket.bound or worker.url in tried or self._decision.tries > self._router.config.queue.retries:
            return False
        tried.add(worker.url)
        found = self._router.dispatcher.choose(self._ticket) is not None
        tried.discard(worker.url)
        return found

    def _move(self, worker: Worker, error: Moved) -> None:
        """Try elsewhere next; or there again, where nobody else is left."""
        log.info("%s; the request is sent again", error)
        worker.counts.moved += 1
        worker.look.set()
        tried = self._ticket.tried
        tried.add(worker.url)
        if not any(each.url not in tried and not each.draining for each in self._router.fleet.workers.values()):
            tried.clear()
