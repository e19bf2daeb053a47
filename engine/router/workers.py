"""The workers of a router: what each is and does now, and the set of them, which changes while requests come.

    add ──> starting ──heartbeat──> ready <──> unready, hung, gone          (health.py says which)
                                      └──drain──> no new requests ──the last ends──> removed

A worker that leaves the set is drained: what runs there ends there. One that is added again meanwhile stays.
Left out: where their URLs come from (`discovery`, `admin`), and who gets a request (`dispatch`).
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable
from contextvars import Context
from typing import Final, Literal

import aiohttp
from msgspec import Struct

from engine.client.bench.wire import Address
from engine.errors import ConfigError, WorkerError, counted
from engine.router.breaker import Breaker
from engine.router.options import RouterConfig
from engine.router.policy import View
from engine.router.wire import Upstream

ADDRESS: Final = re.compile(r"(?:(?![?#@])[!-~])+")
REGISTERED: Final = "registration"  # the source of workers that added themselves
IDLE_SECONDS: Final = 30.0  # that a connection is kept which nobody uses
State = Literal["starting", "ready", "unready", "hung", "gone"]
log = logging.getLogger("engine.router")


class Counts(Struct):
    """What a worker did since it was added."""

    sent: int = 0  # requests
    answered: int = 0
    failed: int = 0  # broken off, or without an answer
    moved: int = 0  # sent elsewhere before their first byte
    prompt_chars: int = 0
    matched_chars: int = 0  # that the policy thought to be cached
    prompt_tokens: int = 0  # of answers that say so
    cached_tokens: int = 0
    evictions: int = 0  # blocks that left its cache, as its events have it


class Worker:
    """One server that requests may be sent to. `view` is what a policy sees of it."""

    def __init__(self, url: str, source: str, config: RouterConfig, capacity: int | None = None) -> None:
        self.url = url
        self.source = source
        self.address = Address.of(url, "a worker")
        self.view = View(url, 0, 0, capacity or config.queue.worker_limit)
        self.state: State = "starting"
        self.cause = ""
        self.draining = False
        self.breaker = Breaker(config.health.breaker_failures, config.health.breaker_seconds)
        self.models: tuple[str, ...] = ()  # none: not known
        self.counts = Counts()
        self.unanswered: set[Upstream] = set()  # connections whose first byte has not come
        self.streaming: set[Upstream] = set()
        self.emptied = asyncio.Event()  # nothing runs here
        self.emptied.set()
        self.left = asyncio.Event()  # it is a worker no more
        self.look = asyncio.Event()  # something is wrong: the next heartbeat is due at once
        self.watch: asyncio.Task[None] | None = None
        self._connect_timeout = config.health.connect_timeout
        self._idle: list[Upstream] = []

    @property
    def may_take(self) -> bool:
        """Whether a request may be sent there, if there is room."""
        return self.state == "ready" and not self.draining and self.breaker.allows(time.monotonic())

    @property
    def room(self) -> int:
        return self.view.capacity - self.view.running

    def serves(self, model: str) -> bool:
        """Whether it has `model`, as far as is known."""
        return not model or not self.models or model in self.models

    def why_not(self) -> str:
        """Why no request may be sent there now; empty if one may."""
        if self.draining:
            return "draining"
        if self.state != "ready":
            return f"{self.state}: {self.cause}" if self.cause else self.state
        if not self.breaker.allows(time.monotonic()):
            return f"its last requests failed; it is tried again in {self.breaker.left(time.monotonic()):.1f} s"
        return "" if self.room > 0 else f"{self.view.running} requests run there, the most that it takes"

    def failed(self, *, trial: bool) -> None:
        """A request had no answer here, or half of one."""
        self.look.set()
        if self.breaker.failed(time.monotonic(), trial=trial):
            log.warning("worker %s failed too often; its next request is in %.0f s", self.url,
                        self.breaker.left(time.monotonic()))  # fmt: skip

    # ── connections ──────────────────────────────────────────────────────────────────────────

    async def connection(self, *, fresh: bool = False) -> Upstream:
        """One that may be asked. Raises WorkerError."""
        now = time.monotonic()
        while self._idle and not fresh:
            kept = self._idle.pop()
            if kept.whole and now - kept.idle_since < IDLE_SECONDS:
                return kept
            kept.close()
        return await Upstream.to(self.address, self._connect_timeout)

    def give_back(self, upstream: Upstream) -> None:
        """`upstream` is used no more; it is kept if its answer has come whole."""
        self.unanswered.discard(upstream)
        self.streaming.discard(upstream)
        if upstream.whole and not self.left.is_set():
            upstream.idle_since = time.monotonic()
            self._idle.append(upstream)
        else:
            upstream.close()

    def close(self) -> None:
        """End what is open to it."""
        for upstream in (*self._idle, *self.unanswered, *self.streaming):
            upstream.fail(WorkerError(f"the worker {self.url} was removed"))
        self._idle.clear()


class Fleet:
    """The workers by URL. `on_change` is called when a request may find a place that it did not before, `on_removed`
    when a worker has left."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.workers: dict[str, Worker] = {}
        self.barred: set[str] = set()  # removed by an operator, and not to add themselves again
        self.on_added: list[Callable[[Worker], None]] = []
        self.on_ready: list[Callable[[Worker], None]] = []  # after a heartbeat that said otherwise
        self.on_change: list[Callable[[], None]] = []
        self.on_reset: list[Callable[[str], None]] = []  # its cache is empty, or unknown
        self.on_removed: list[Callable[[str], None]] = []
        self.session: aiohttp.ClientSession | None = None  # for questions of this router's own
        self._leaving: set[asyncio.Task[None]] = set()

    def add(self, url: str, source: str, capacity: int | None = None) -> Worker:
        """The worker at `url`, which is added unless it is there. Raises ConfigError for what is no URL."""
        url = named(url)
        worker = self.workers.get(url)
        if worker is not None:
            worker.source = source
            if capacity is not None:
                worker.view.capacity = capacity
            if worker.draining:
                worker.draining = False
                log.info("worker %s stays", url)
                self.changed()
            return worker
        worker = self.workers[url] = Worker(url, source, self.config, capacity)
        log.info("worker %s added by %s", url, source)
        for each in self.on_added:
            each(worker)
        return worker

    def drain(self, worker: Worker) -> None:
        """Send `worker` no more requests, and remove it once it has none."""
        if not worker.draining:
            worker.draining = True
            log.info(
                "worker %s drains; %s there", worker.url, counted(worker.view.running, "request runs", "requests run")
            )
            task = asyncio.get_running_loop().create_task(self._leave(worker), context=Context())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            self.changed()

    async def _leave(self, worker: Worker) -> None:
        while worker.draining and self.workers.get(worker.url) is worker:
            await worker.emptied.wait()
            if worker.draining and not worker.view.running:
                self.remove(worker)

    def remove(self, worker: Worker) -> None:
        """Forget `worker` now; what runs there is broken off."""
        if self.workers.get(worker.url) is not worker:
            return
        del self.workers[worker.url]
        if worker.watch is not None:
            worker.watch.cancel()
        worker.close()
        worker.left.set()
        log.info("worker %s removed", worker.url)
        for each in self.on_removed:
            each(worker.url)
        self.changed()

    def changed(self) -> None:
        """Something may be possible that was not."""
        for each in self.on_change:
            each()

    def close(self) -> None:
        """End all tasks and connections."""
        for task in self._leaving:
            task.cancel()
        for worker in list(self.workers.values()):
            if worker.watch is not None:
                worker.watch.cancel()
            worker.close()


def named(url: str) -> str:
    """`url` as a worker is named by it. Raises ConfigError for what is none."""
    url = url.strip().rstrip("/")
    if not url.startswith(("http://", "https://")) or not ADDRESS.fullmatch(url):
        raise ConfigError(f"a worker is {url!r}, but should be a URL like http://host:port or http://host:port/path")
    Address.of(url, "a worker")
    return url
