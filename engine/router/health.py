"""Heartbeats: whether a worker answers, whether it would serve, and which models it has.

Each worker is asked for /readyz once in `--health-seconds`, or for /health where it has no /readyz. It is `ready` with
a 200, `unready` with any other status, `gone` where nobody listens, and `hung` after `--health-failures` heartbeats in
a row without an answer in time. What has not begun to be answered by a worker that hangs is sent elsewhere; what has
begun is broken off after `--broken-seconds`. A failed request makes the next heartbeat due at once.
A worker that was gone has lost its cache, so policies are told.
"""

import asyncio
import logging
import time
from contextvars import Context
from typing import Final

import aiohttp
from yarl import URL

from engine.errors import WorkerError
from engine.router.asked import object_in
from engine.router.keys import NOBODY, Caller, WorkerKeys
from engine.router.workers import REGISTERED, Fleet, State, Worker

PATHS: Final = ("/readyz", "/health")
LOOP: Final = 508  # the status of an answer to a request that has been here before
MODELS_SECONDS: Final = 30.0  # how old what is known of the models may be
FORGET_SECONDS: Final = 600.0  # after which a worker that registered itself and is gone is forgotten
MOST_CAUSE: Final = 200
log = logging.getLogger("engine.router")


class Health:
    """Watches the workers of a fleet, one task for each."""

    def __init__(self, fleet: Fleet, keys: WorkerKeys, via: str) -> None:
        self._fleet = fleet
        self._via = via
        self._options = fleet.config.health
        self._keys = keys
        fleet.on_added.append(self._begin)

    def _begin(self, worker: Worker) -> None:
        # It is of no request, though one may have added the worker.
        worker.watch = asyncio.get_running_loop().create_task(self._watch(worker), context=Context())

    async def _watch(self, worker: Worker) -> None:
        failures, path, models_at, well_at = 0, 0, -MODELS_SECONDS, time.monotonic()
        while True:
            worker.look.clear()
            state, cause = await self._beat(worker, PATHS[path])
            if state == "unready" and cause == "404" and not path:
                path = 1
                continue
            failures = failures + 1 if state == "hung" else 0
            now = time.monotonic()
            if state != "hung" or failures >= self._options.health_failures:
                self._become(worker, state, cause)
            if state == "ready":
                well_at = now
                if now - models_at >= MODELS_SECONDS and await self._learn_models(worker):
                    models_at = now
            elif now - well_at > self._options.broken_seconds:
                for upstream in list(worker.streaming):
                    upstream.fail(WorkerError(f"the worker {worker.url} is {state} and has been so for too long"))
                if worker.source == REGISTERED and now - well_at > FORGET_SECONDS:
                    log.warning("worker %s is %s for long, and forgotten", worker.url, state)
                    self._fleet.remove(worker)
            self._fleet.changed()  # a breaker may have come to its end
            try:
                async with asyncio.timeout(self._options.health_seconds):
                    await worker.look.wait()
                await asyncio.sleep(self._options.health_seconds / 10)  # many failures are one
            except TimeoutError:
                pass

    async def _beat(self, worker: Worker, path: str) -> tuple[State, str]:
        """What one heartbeat says."""
        try:
            status, body = await self.ask(worker, path)
        except aiohttp.ClientConnectorError as error:
            return "gone", error.os_error.strerror or "no connection"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return "hung", f"no answer within {self._options.health_timeout:g} s ({type(error).__name__})"
        if status == 200:
            return "ready", ""
        if status == LOOP:
            return "unready", "its URL leads back to this router"
        said = object_in(body).get("cause") if status != 404 else None
        return "unready", str(said)[:MOST_CAUSE] if said else str(status)

    def _become(self, worker: Worker, state: State, cause: str) -> None:
        before, worker.state, worker.cause = worker.state, state, cause
        if before == state:
            return
        log.log(
            logging.INFO if state == "ready" else logging.WARNING,
            "worker %s is %s%s", worker.url, state, f": {cause}" if cause else "",
        )  # fmt: skip
        if before == "gone":
            for reset in self._fleet.on_reset:
                reset(worker.url)
        if state == "ready":
            for told in self._fleet.on_ready:
                told(worker)
        if state in ("hung", "gone"):
            for upstream in list(worker.unanswered):
                upstream.fail(WorkerError(f"the worker {worker.url} is {state}: {cause}"))

    async def _learn_models(self, worker: Worker) -> bool:
        """Whether the worker has said which models it has, or that it says no such thing. Else it is asked again."""
        try:
            status, body = await self.ask(worker, "/v1/models")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
        data = object_in(body).get("data") if status == 200 else None
        if isinstance(data, list):
            names = [each.get("id") for each in data if isinstance(each, dict)]
            worker.models = tuple(name for name in names if isinstance(name, str))
        return status < 500

    async def ask(
        self,
        worker: Worker,
        path: str,
        *,
        method: str = "GET",
        body: bytes = b"",
        caller: Caller = NOBODY,
        seconds: float | None = None,
    ) -> tuple[int, bytes]:
        """A question of the router's own, or one for `caller`: the status and the body of the answer.
        Raises aiohttp.ClientError, OSError, and TimeoutError after `seconds`, by default those of a heartbeat."""
        assert self._fleet.session is not None, "it is opened with the router"
        timeout = aiohttp.ClientTimeout(total=seconds or self._options.health_timeout)
        said = caller.towards(self._keys.of(worker.url)) | ({"Content-Type": "application/json"} if body else {})
        said["Via"] = f"{said['Via']}, {self._via}" if "Via" in said else self._via
        url = URL(worker.url + path, encoded=True)  # which would take dots out of a path
        async with self._fleet.session.request(
            method, url, data=body or None, headers=said, timeout=timeout, allow_redirects=False
        ) as answer:
            return answer.status, await answer.read()
