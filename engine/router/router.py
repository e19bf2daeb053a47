"""A router: its workers, its policy, its queue, and what it knows; `app` serves it.

discovery, admin ──> Fleet ──> Health (one task a worker)
                       └──> Dispatcher (policy, queue) <── proxy <── clients
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import quote

import aiohttp
from aiohttp import web

from engine.errors import ConfigError, RequestError, did_you_mean
from engine.plugin.registry import Plugins
from engine.router.asked import Asked
from engine.router.discovery import discover
from engine.router.dispatch import Dispatcher, tell
from engine.router.feeds import Feeds
from engine.router.health import Health
from engine.router.keys import Caller, WorkerKeys, admin_keys
from engine.router.metrics import FleetFigures, RouterMetrics
from engine.router.options import RouterConfig
from engine.router.peers import Peers
from engine.router.places import Places
from engine.router.policy import RoutingPolicy
from engine.router.workers import Fleet, Worker

TIDY_SECONDS: Final = 0.25  # between two looks for what the policy may forget: each wakes a router that idles
TIDY_BUDGET: Final = 0.002
log = logging.getLogger("engine.router")


def policy_named(name: str, plugins: tuple[str, ...]) -> RoutingPolicy:
    """Raises ConfigError for a policy that is not known."""
    loaded = Plugins.load(plugins)
    entries = loaded.entries("routing")
    if name not in entries:
        raise ConfigError(f"--policy is {name!r}, but takes {', '.join(entries)}{did_you_mean(name, entries)}")
    made: RoutingPolicy = loaded.code("routing", name)()
    return made


class Router:
    """Everything of one router but its HTTP. Raises ConfigError for options that cannot work."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.via = f"1.1 engine-router-{secrets.token_hex(8)}"  # in all that it asks: what comes back with it is a loop
        self.policy = policy_named(config.router.policy, config.router.plugins)
        self.policy.bound(config.router.index_chars)
        self.fleet = Fleet(config)
        self.fleet.on_reset.append(lambda url: tell(self.policy.reset, url))
        self.worker_keys = WorkerKeys(config.router.worker_key_file)
        self.admin_keys = admin_keys(config)
        self.health = Health(self.fleet, self.worker_keys, self.via)
        self.feeds = Feeds(self.fleet, self.policy, self.worker_keys)
        self.dispatcher = Dispatcher(self.fleet, self.policy, config.queue)
        self.places = Places()
        self.metrics = RouterMetrics()
        self.peers = Peers(self.dispatcher, self.places)
        self.metrics.registry.register(FleetFigures(self.fleet, self.dispatcher))
        self.draining = False
        self.began = time.time()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch the workers, and what says which there are, for the length of the context."""
        async with aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), connector=aiohttp.TCPConnector(limit=0)
        ) as session:
            self.fleet.session = session
            tasks = [asyncio.create_task(each()) for each in (self._tidy, self.peers.run, *discover(self.fleet))]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                self.feeds.close()
                self.fleet.close()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _tidy(self) -> None:
        while True:
            try:
                more = self.policy.tidy(TIDY_BUDGET)
            except Exception:
                log.exception("the policy failed to tidy up")
                more = False
            self.peers.outside()
            await asyncio.sleep(0.0 if more else TIDY_SECONDS)

    async def holder(self, asked: Asked, caller: Caller) -> str:
        """The URL of the worker that has the response that a request of `caller` is about. Raises RequestError (404) if
        none."""
        id, workers = asked.response, self.fleet.workers
        url = self.places.response(id)
        if not url:
            url = await self._who_has(id, caller)
            if url:
                self.places.learn(id, url)
        if url in workers:
            return url
        gone = f"the worker that had it, {url}, has gone" if url else f"none of the {len(workers)} workers has it"
        raise RequestError(
            f"there is no response {id[:80]!r}: {gone}; send the whole conversation as input",
            param=asked.field,
            code="response_not_found" if asked.field == "response_id" else "previous_response_not_found",
            status=404,
        )

    async def _who_has(self, id: str, caller: Caller) -> str:
        """The URL of a worker that says that it has the response `id` of `caller`; empty if none does. Those that would
        not answer are not asked."""

        async def has(worker: Worker) -> str:
            try:
                status, _ = await self.health.ask(worker, f"/v1/responses/{quote(id, safe='')}", caller=caller)
            except (aiohttp.ClientError, TimeoutError, OSError):
                return ""
            return worker.url if status == 200 else ""

        asked = [worker for worker in self.fleet.workers.values() if worker.state not in ("hung", "gone")]
        found = await asyncio.gather(*map(has, asked))
        return next(filter(None, found), "")

    @property
    def open(self) -> int:
        """Requests that wait or run."""
        return self.dispatcher.waiting + sum(worker.view.running for worker in self.fleet.workers.values())

    def health_now(self) -> tuple[str, str]:
        """`ready`, or why not: a status and its cause."""
        if self.draining:
            return "draining", "the router is shutting down"
        if any(worker.may_take for worker in self.fleet.workers.values()):
            return "ready", ""
        return "unready", self.dispatcher.state()


ROUTER = web.AppKey("router", Router)
