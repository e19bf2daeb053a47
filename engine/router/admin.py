"""The routes of a router's operators: workers, loads, the dry run, and its own health and metrics.

Changing workers needs the admin key (`keys`). SGLang's router has `/add_worker`, `/remove_worker` and `/list_workers`,
which do the same. Left out: routes of engines (`everywhere`, `proxy`).
"""

import time
from typing import Annotated, Literal

import anyio
from aiohttp import web
from msgspec import Meta, to_builtins

from engine.errors import ConfigError, RequestError
from engine.http.intake import read_body
from engine.http.openapi import Route
from engine.http.repeated import joined
from engine.http.wire import Body, Reply, json_response
from engine.router.asked import read_asked
from engine.router.dispatch import Ticket
from engine.router.peers import PATH as NOTES
from engine.router.proxy import ticket_of
from engine.router.router import ROUTER, Router
from engine.router.workers import REGISTERED, Worker, named

ADDED = "HTTP"  # the source of workers that were added so


class WorkerBody(Body):
    """A worker to add: `capacity` is the most requests that it takes at a time, `registered` says that it is the worker
    itself that asks, again and again while it lives."""

    url: str
    capacity: Annotated[int, Meta(ge=1)] | None = None
    registered: bool = False


class WorkerReply(Reply, frozen=True):
    """`running` and `waiting_chars` are what is there now, `may_take` says whether it gets requests, `cause`
    why not."""

    url: str
    source: str
    state: str
    cause: str
    may_take: bool
    draining: bool
    breaker: str
    models: tuple[str, ...]
    running: int
    waiting_chars: int
    capacity: int


class WorkersReply(Reply, frozen=True):
    workers: list[WorkerReply]


class UrlsReply(Reply, frozen=True):
    urls: list[str]


class RemovedReply(Reply, frozen=True):
    """`running` requests are still there, if the answer did not wait for them."""

    url: str
    removed: bool
    running: int


class TargetReply(Reply, frozen=True):
    targets: tuple[str, ...]
    labels: dict[str, str]


class CandidateReply(Reply, frozen=True):
    worker: str
    may_take: bool
    running: int
    why_not: str


class RouteReply(Reply, frozen=True):
    """`worker` is null if the request would wait. `characters` is the length of its canonical text, of which `matched`
    are thought to be in the worker's cache."""

    worker: str | None
    reason: str
    characters: int
    matched: int
    priority: int
    session: str
    workers: list[CandidateReply]


class LoadReply(Reply, frozen=True):
    url: str
    state: str
    running: int
    waiting_chars: int
    capacity: int
    sent: int
    answered: int
    failed: int
    moved: int
    prompt_chars: int
    matched_chars: int
    prompt_tokens: int
    cached_tokens: int
    evictions: int
    hit_rate: float | None


class LoadsReply(Reply, frozen=True):
    """`hit_rate` is the share of prompt tokens that workers say were cached, null if they do not say so."""

    queue: int
    most_queue: int
    refused: int
    timed_out: int
    running: int
    hit_rate: float | None
    loads: list[LoadReply]


class RouterHealthReply(Reply, frozen=True):
    status: str
    cause: str


class RouterLiveReply(Reply, frozen=True):
    status: Literal["alive"]
    seconds: float


def _described(worker: Worker) -> WorkerReply:
    view = worker.view
    return WorkerReply(
        worker.url, worker.source, worker.state, worker.why_not(), worker.may_take, worker.draining,
        worker.breaker.state, worker.models, view.running, view.waiting_chars, view.capacity,
    )  # fmt: skip


# ── workers ──────────────────────────────────────────────────────────────────────────────────


async def list_workers(request: web.Request) -> web.Response:
    """The workers, and why those that get no requests get none."""
    workers = request.app[ROUTER].fleet.workers.values()
    return json_response(WorkersReply([_described(worker) for worker in workers]))


async def add_worker(request: web.Request, body: WorkerBody) -> web.Response:
    """Add a worker, or keep one that is being drained."""
    return json_response(_described(_add(request, body)))


def _add(request: web.Request, body: WorkerBody) -> Worker:
    router = request.app[ROUTER]
    barred = router.fleet.barred
    try:
        if body.registered and named(body.url) in barred:
            raise RequestError(
                f"{body.url} was removed from this router, so it cannot register itself; an operator may add it again",
                param="url",
                code="worker_barred",
                status=409,
            )
        worker = router.fleet.add(body.url, REGISTERED if body.registered else ADDED, body.capacity)
    except ConfigError as error:
        raise RequestError(str(error), param="url") from None
    barred.discard(worker.url)
    return worker


async def remove_worker(request: web.Request) -> web.Response:
    """Drain the worker at `url` and remove it; with `wait=false`, answer before it is empty. After `seconds`, what
    still runs there is broken off. With `registered=true` it is the worker itself that asks, and it may come again."""
    router, query = request.app[ROUTER], request.query
    seconds = _seconds(query.get("seconds"))
    worker = _drained(request, itself=query.get("registered") == "true")
    if query.get("wait", "true") != "false":
        with anyio.move_on_after(seconds) as scope:
            await worker.left.wait()
        if scope.cancelled_caught:
            router.fleet.remove(worker)
    return json_response(RemovedReply(worker.url, worker.left.is_set(), worker.view.running))


def _drained(request: web.Request, *, itself: bool) -> Worker:
    """The worker that the query names, which gets no more requests from now on."""
    router = request.app[ROUTER]
    worker = _worker_of(router, request.query.get("url", ""))
    router.fleet.drain(worker)
    if not itself:
        router.fleet.barred.add(worker.url)
    return worker


def _seconds(said: str | None) -> float | None:
    try:
        seconds = None if said is None else float(said)
    except ValueError:
        seconds = -1.0
    if seconds is not None and not seconds >= 0:
        raise RequestError(f"seconds is {said!r}; send a number, 0 or more", param="seconds")
    return seconds


def _worker_of(router: Router, url: str) -> Worker:
    try:
        found = router.fleet.workers.get(named(url))
    except ConfigError as error:
        raise RequestError(str(error), param="url") from None
    if found is None:
        known = ", ".join(router.fleet.workers) or "none"
        raise RequestError(
            f"there is no worker {url!r}; the workers are {known}", param="url", code="worker_not_found", status=404
        )
    return found


async def sglang_add(request: web.Request) -> web.Response:
    """Add the worker at `url`, as SGLang's router does."""
    return json_response(_described(_add(request, WorkerBody(url=request.query.get("url", "")))))


async def sglang_remove(request: web.Request) -> web.Response:
    """Drain the worker at `url` and remove it, as SGLang's router does; the answer does not wait."""
    worker = _drained(request, itself=False)
    return json_response(RemovedReply(worker.url, worker.left.is_set(), worker.view.running))


async def sglang_list(request: web.Request) -> web.Response:
    """The URLs of the workers, as SGLang's router has them."""
    return json_response(UrlsReply(list(request.app[ROUTER].fleet.workers)))


async def scrape_targets(request: web.Request) -> web.Response:
    """Where Prometheus scrapes the workers' own metrics: an answer for its http_sd_configs."""
    found = []
    for worker in request.app[ROUTER].fleet.workers.values():
        address = worker.address
        host = f"[{address.host}]" if ":" in address.host else address.host
        labels = {
            "__scheme__": "https" if address.secure else "http",
            "__metrics_path__": f"{address.prefix}/metrics",
            "worker": worker.url,
        }
        found.append(TargetReply((f"{host}:{address.port}",), labels))
    return json_response(to_builtins(found))


# ── what it does now ─────────────────────────────────────────────────────────────────────────


async def loads(request: web.Request) -> web.Response:
    """Load, hits, retries, evictions and queue, by worker."""
    router = request.app[ROUTER]
    found, cached, prompts = [], 0, 0
    for worker in router.fleet.workers.values():
        view, counts = worker.view, worker.counts
        cached, prompts = cached + counts.cached_tokens, prompts + counts.prompt_tokens
        found.append(
            LoadReply(
                url=worker.url, state="draining" if worker.draining else worker.state, running=view.running,
                waiting_chars=view.waiting_chars, capacity=view.capacity,
                hit_rate=_share(counts.cached_tokens, counts.prompt_tokens), **to_builtins(counts),
            )
        )  # fmt: skip
    dispatcher = router.dispatcher
    return json_response(
        LoadsReply(
            dispatcher.waiting, router.config.queue.max_queue, dispatcher.refused, dispatcher.timed_out,
            sum(load.running for load in found), _share(cached, prompts), found,
        )
    )  # fmt: skip


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


async def dry_run(request: web.Request) -> web.Response:
    """Where a request would go now, and why; it is not sent. The request is the body, for the path in `path`."""
    router = request.app[ROUTER]
    asked = read_asked(request, await read_body(request), request.query.get("path", "/v1/chat/completions"))
    ticket: Ticket = await ticket_of(router, request, asked)
    chosen = router.dispatcher.choose(ticket)
    workers = [
        CandidateReply(each.url, each.may_take, each.view.running, each.why_not())
        for each in router.fleet.workers.values()
    ]
    reason = f"it would wait: {router.dispatcher.state()}" if chosen is None else chosen[1].reason
    return json_response(
        RouteReply(
            None if chosen is None else chosen[0].url, reason, len(asked.arrival.text),
            0 if chosen is None else chosen[1].matched, asked.priority, asked.arrival.program, workers,
        )
    )  # fmt: skip


async def health(request: web.Request) -> web.Response:
    """Whether a request would find a worker."""
    status, cause = request.app[ROUTER].health_now()
    return json_response(RouterHealthReply(status, cause), status=200 if status == "ready" else 503)


async def live(request: web.Request) -> web.Response:
    """Whether the router lives, whatever its workers do."""
    return json_response(RouterLiveReply("alive", time.time() - request.app[ROUTER].began))


async def metrics(request: web.Request) -> web.Response:
    """The router's metrics, for Prometheus."""
    body, content_type = request.app[ROUTER].metrics.page(joined(request.headers, "Accept"))
    return web.Response(body=body, headers={"Content-Type": content_type})


async def notes(request: web.Request) -> web.Response:
    """What another router of the same workers did; in a form that only routers write."""
    request.app[ROUTER].peers.take(await read_body(request))
    return web.Response(status=204)


ROUTES = (
    Route("GET", "/workers", list_workers, gives=WorkersReply),
    Route("POST", "/workers", add_worker, takes=WorkerBody, gives=WorkerReply),
    Route("DELETE", "/workers", remove_worker, gives=RemovedReply),
    Route("GET", "/workers/targets", scrape_targets, open=True),
    Route("POST", "/add_worker", sglang_add, gives=WorkerReply),
    Route("POST", "/remove_worker", sglang_remove, gives=RemovedReply),
    Route("GET", "/list_workers", sglang_list, gives=UrlsReply),
    Route("GET", "/v1/loads", loads, gives=LoadsReply),
    Route("POST", "/v1/route", dry_run, gives=RouteReply),
    Route("POST", NOTES, notes, content=""),
    Route("GET", "/readyz", health, gives=RouterHealthReply, open=True),
    Route("GET", "/health", health, gives=RouterHealthReply, open=True),
    Route("GET", "/ping", health, gives=RouterHealthReply, open=True),
    Route("POST", "/ping", health, gives=RouterHealthReply, open=True),
    Route("GET", "/livez", live, gives=RouterLiveReply, open=True),
    Route("GET", "/metrics", metrics, content="text/plain", open=True),
)
# Those that need the admin key.
CHANGES = frozenset(
    {("POST", "/workers"), ("DELETE", "/workers"), ("POST", "/add_worker"), ("POST", "/remove_worker"), ("POST", NOTES)}
)
