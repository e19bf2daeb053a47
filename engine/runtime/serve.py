"""Serve over HTTP: the device process first, then all else, until a signal or a failure.

    serve ── early worker: imports torch ──────────────> boots when the front knows that it can be of use
      └────── launch, http: imported meanwhile ──> front

The worker's imports take longer than all that this process does before it is ready. So what this module imports at its
top is what starting the worker takes.
"""

import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import anyio
from msgspec.structs import replace

from engine import __version__
from engine.config import Config
from engine.errors import WorkerError
from engine.logs import set_up_logging
from engine.messages.control import Preload, WorkerReady
from engine.runtime.allocator import give_back_large_blocks
from engine.runtime.channel import BlockingFrames
from engine.runtime.process import Process, Start, placement, spawn

log = logging.getLogger("engine")


@contextmanager
def early_worker(config: Config) -> Iterator[Start]:
    """Starts a device process that imports while the front still makes sure that it can be of use, and ends it with the
    block; what it yields starts workers for `core_actors`, this one first."""
    early: list[tuple[socket.socket, Process]] = [spawn("engine.worker")]
    sock, process = early[0]
    try:
        with suppress(ConnectionError):  # then the executor says why it has ended
            BlockingFrames(sock, receives=None).send(Preload(config, spare=False))
        yield lambda: early.pop() if early else spawn("engine.worker")
    finally:
        process.kill()
        process.wait()
        sock.close()


def serve(config: Config) -> int:
    """Serve over HTTP until a signal or a failure; the process's exit code."""
    began = time.monotonic()
    set_up_logging(config.process.log_level)
    give_back_large_blocks()
    log.info("engine %s: starting %s", __version__, config.model.model)
    if config.process.spare_worker is None:
        config = replace(config, process=replace(config.process, spare_worker=True))
    with early_worker(config) if placement(config) == "single" else nullcontext() as start:
        return anyio.run(_serve, config, start, began, backend_options={"use_uvloop": True})


async def _serve(config: Config, start: Start | None, began: float) -> int:
    from engine.http.app import ROUTES
    from engine.http.app import serve as serve_http
    from engine.http.exporting import tracing_to
    from engine.http.keys import Keys
    from engine.http.origins import Access
    from engine.http.plugins import with_plugins
    from engine.plugin.registry import Plugins
    from engine.runtime.core import core_actors
    from engine.runtime.launch import open_front

    core = None if start is None else partial(core_actors, start=start)
    Access.of(config.server)  # what is wrong with who may call, or with tracing, is said before anything is started
    tracing_to(config.server.otlp_endpoint)
    keyed = Keys(config.server).asked
    plugins = Plugins.load(config.model.plugins)
    routes = with_plugins(ROUTES, plugins)
    code = 0
    async with open_front(config, core, plugins) as front, anyio.create_task_group() as group:
        listening = anyio.Event()
        url = ""

        def started(at: str) -> None:
            nonlocal url
            url = at
            listening.set()

        async def http() -> None:
            await serve_http(front, config.server, routes, started=started)

        async def announce() -> None:
            await listening.wait()
            with suppress(WorkerError):  # `failure` says so
                say_ready(url, await front.ready())

        def say_ready(url: str, info: WorkerReady) -> None:
            phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in info.phases.items())
            log.info("worker on %s: %s", info.device, phases)
            if info.embedding_size:
                log.info("vectors of %d numbers, of at most %d tokens", info.embedding_size, info.max_model_len)
            else:
                size, tokens = info.page_size, info.pages * info.page_size
                log.info("KV cache: %d tokens in pages of %d; attention: %s", tokens, size, info.attention)
            log.info("ready after %.1f s on %s", time.monotonic() - began, url)
            embeds = info.embedding_size > 0
            print(try_line(url, front.model_name, keyed=keyed, embeds=embeds), flush=True)

        async def signals() -> None:
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
                async for _ in received:
                    if front.draining:
                        break
                    if front.open:
                        log.info(
                            "draining: %s open and may go on for up to %.0f s; a second signal ends what is open",
                            _requests(front.open), config.server.drain_seconds,
                        )  # fmt: skip
                    group.start_soon(drain)
            close()

        async def drain() -> None:
            await front.drain(config.server.drain_seconds)
            close()

        def close() -> None:
            if left := front.end():
                log.warning("%s still open and now ended with an error", _requests(left))
            group.cancel_scope.cancel()

        async def failure() -> None:
            nonlocal code
            log.error("%s", await front.failed())
            code = 1
            group.cancel_scope.cancel()

        for task in (http, announce, signals, failure):
            group.start_soon(task)
    return code


def _requests(count: int) -> str:
    return "1 request is" if count == 1 else f"{count} requests are"


def try_line(url: str, model: str, *, keyed: bool = False, embeds: bool = False) -> str:
    """A curl command that a newcomer can paste; `keyed` says that an API key is asked for."""
    key = "-H 'Authorization: Bearer YOUR_KEY' " if keyed else ""
    path = "chat/completions"
    said = '"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 60, "stream": true'
    if embeds:
        path, said = "embeddings", '"input": ["Say hello."]'
    body = f'{{"model": "{model}", {said}}}'
    return f"\nTry:\n  curl -N {url}/v1/{path} {key}-H 'Content-Type: application/json' -d '{body}'\n"
