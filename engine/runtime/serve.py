"""Serve over HTTP: the device process first, then all else, until a signal or a failure.

    serve ── early workers: import torch ─────────────> boot when the front knows that they can be of use
      └────── launch, http: imported meanwhile ──> front

A worker's imports take longer than all that this process does before it is ready. So what this module imports at its
top is what starting the workers takes. Several fronts are processes of their own (supervisor.py).
"""

import logging
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

import anyio
from anyio.abc import TaskGroup
from msgspec.structs import replace

from engine import __version__
from engine.config import Config
from engine.errors import WorkerError, counted
from engine.logs import set_up_logging
from engine.messages.control import Preload, WorkerReady
from engine.runtime.allocator import give_back_large_blocks, keep_for_good
from engine.runtime.channel import BlockingFrames
from engine.runtime.copies import check_copies
from engine.runtime.meeting import check_hosts
from engine.runtime.process import Start, end_early, fronts, placement, spawn

if TYPE_CHECKING:
    from engine.router.register import Registration

log = logging.getLogger("engine")


@contextmanager
def early_workers(config: Config) -> Iterator[Start]:
    """Starts the device processes, which import while the front still makes sure that they can be of use, and ends them
    with the block; what it yields starts workers for `core_actors`, these first."""
    early = [spawn("engine.worker") for _ in range(config.parallel.node_ranks)]
    left = list(early)
    try:
        for sock, _ in early:
            with suppress(ConnectionError):  # then the executor says why it has ended
                BlockingFrames(sock, receives=None).send(Preload(config, spare=False))
        yield lambda: left.pop(0) if left else spawn("engine.worker")
    finally:
        end_early(early)


def serve(config: Config) -> int:
    """Serve over HTTP until a signal or a failure; or, as another host than the first, serve that one. The process's
    exit code."""
    check_hosts(config.parallel)
    check_copies(config)
    if config.parallel.node_rank:
        from engine.runtime.node import run_node

        return run_node(config)
    began = time.monotonic()
    set_up_logging(config.process.log_level)
    give_back_large_blocks()
    log.info("engine %s: starting %s", __version__, config.model.model)
    if config.process.spare_worker is None:
        config = replace(config, process=replace(config.process, spare_worker=True))
    if (count := fronts(config)) > 1:
        return _serve_several(config, count, began)
    with early_workers(config) if placement(config) == "single" else nullcontext() as start:
        return anyio.run(_serve, config, start, began, backend_options={"use_uvloop": True})


async def _serve(config: Config, start: Start | None, began: float) -> int:
    from engine.http.app import ROUTES
    from engine.http.app import serve as serve_http
    from engine.http.plugins import with_plugins
    from engine.plugin.registry import Plugins
    from engine.runtime.core import core_actors
    from engine.runtime.launch import open_front

    keyed = check_server(config)
    plugins = Plugins.load(config.model.plugins)
    core = None if start is None else partial(core_actors, start=start, plugins=plugins)
    routes = with_plugins(ROUTES, plugins)
    async with open_front(config, core, plugins) as front, anyio.create_task_group() as group:
        service = Service(front, config, group, began=began, keyed=keyed)
        group.start_soon(partial(serve_http, front, config.server, routes, started=service.started))
        service.start()
    return service.code


def _serve_several(config: Config, count: int, began: float) -> int:
    """As `serve`, with so many front processes."""
    from engine.runtime.supervisor import early_fronts, open_fronts

    async def run() -> int:
        keyed = check_server(config)
        async with open_fronts(config, early, start) as fronts, anyio.create_task_group() as group:
            service = Service(fronts, config, group, began=began, keyed=keyed)
            service.start()
            await fronts.listening.wait()
            service.started(early.url)
        return service.code

    with early_workers(config) as start, early_fronts(config, count) as early:
        return anyio.run(run, backend_options={"use_uvloop": True})


def registration_of(config: Config) -> "Registration | None":
    """What tells routers of the engine; None where none is to be told. Raises ConfigError."""
    if not config.register.register:
        return None
    from engine.router.register import Registration

    return Registration(config.register, config.server)


def check_server(config: Config) -> bool:
    """Raise ConfigError for what is wrong with who may call, with tracing or with registration, before anything is
    started; whether an API key is asked for."""
    options = config.server
    from engine.http.exporting import tracing_to
    from engine.http.keys import Keys
    from engine.http.origins import Access

    Access.of(options)
    tracing_to(options.otlp_endpoint)
    registration_of(config)
    return Keys(options).asked


class Served(Protocol):
    """An engine as who serves it sees it: a front, or several (fronts.py)."""

    model_name: str
    draining: bool

    @property
    def chats(self) -> bool: ...
    @property
    def open(self) -> int: ...
    async def ready(self) -> WorkerReady: ...
    async def failed(self) -> str: ...
    async def drain(self, seconds: float) -> int: ...
    def end(self) -> int: ...


Task = Literal["chat", "completions", "embeddings"]  # what a newcomer is to try
TRIES: Mapping[Task, tuple[str, str]] = MappingProxyType(
    {
        "chat": (
            "chat/completions",
            '"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 60, "stream": true',
        ),
        "completions": ("completions", '"prompt": "Once upon a time", "max_tokens": 60, "stream": true'),
        "embeddings": ("embeddings", '"input": ["Say hello."]'),
    }
)


class Service:
    """What a server does beside its actors and HTTP: say that it is ready, heed signals, and end where the engine
    fails.

    The first thing to end cancels `group`; `code` is the process's exit code then."""

    def __init__(self, front: Served, config: Config, group: TaskGroup, *, began: float, keyed: bool) -> None:
        self.code = 0
        self._front = front
        self._options = config.server
        self._registration = registration_of(config)
        self._group = group
        self._began = began
        self._keyed = keyed  # an API key is asked for
        self._listening = anyio.Event()
        self._url = ""

    def start(self) -> None:
        """Begin all that."""
        for task in (self.announce, self.signals, self.failure):
            self._group.start_soon(task)

    def started(self, url: str) -> None:
        """Requests to `url` are answered from now on."""
        self._url = url
        self._listening.set()

    async def announce(self) -> None:
        """Say what the worker is and where to ask, once both are ready."""
        await self._listening.wait()
        with suppress(WorkerError):  # `failure` says so
            info = await self._front.ready()
            keep_for_good()
            self._say_ready(info)
            if self._registration is not None:
                await self._registration.run(self._url)

    def _say_ready(self, info: WorkerReady) -> None:
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in info.phases.items())
        log.info("worker on %s: %s", info.device, phases)
        if info.embedding_size:
            log.info("vectors of %d numbers, of at most %d tokens", info.embedding_size, info.max_model_len)
        else:
            size, tokens = info.page_size, info.pages * info.page_size
            each = f" in each of {info.copies} copies" if info.copies > 1 else ""
            log.info("KV cache: %d tokens%s, in pages of %d; attention: %s", tokens, each, size, info.attention)
        log.info("ready after %.1f s on %s", time.monotonic() - self._began, self._url)
        task: Task = "embeddings" if info.embedding_size else "chat" if self._front.chats else "completions"
        print(try_line(self._url, self._front.model_name, task, keyed=self._keyed), flush=True)

    async def signals(self) -> None:
        """The first lets what is open come to its end, for a while; the second does not."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            told = False
            async for _ in received:
                if told or self._front.draining:
                    break
                told = True
                if self._front.open:
                    log.info(
                        "draining: %s open and may go on for up to %.0f s; a second signal ends what is open",
                        _requests(self._front.open), self._options.drain_seconds,
                    )  # fmt: skip
                self._group.start_soon(self._drain)
        self._close()

    async def _drain(self) -> None:
        if self._registration is not None:
            await self._registration.leave()
        await self._front.drain(self._options.drain_seconds)
        self._close()

    def _close(self) -> None:
        if left := self._front.end():
            log.warning("%s still open and now ended with an error", _requests(left))
        self._group.cancel_scope.cancel()

    async def failure(self) -> None:
        log.error("%s", await self._front.failed())
        self.code = 1
        self._group.cancel_scope.cancel()


def _requests(count: int) -> str:
    return counted(count, "request is", "requests are")


def try_line(url: str, model: str, task: Task, *, keyed: bool = False) -> str:
    """A curl command that a newcomer can paste; `keyed` says that an API key is asked for."""
    key = "-H 'Authorization: Bearer YOUR_KEY' " if keyed else ""
    path, said = TRIES[task]
    body = f'{{"model": "{model}", {said}}}'
    return f"\nTry:\n  curl -N {url}/v1/{path} {key}-H 'Content-Type: application/json' -d '{body}'\n"
