"""HTTP over a front, and over the real model, on a port that is free: files of tests run beside each other."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio

from engine import Engine
from engine.config import ServerOptions, resolve
from engine.http.app import serve
from engine.lang import Server
from engine.runtime.front import Front
from engine.runtime.launch import open_front

MODEL = "smollm2-135m"


@asynccontextmanager
async def over_http(front: Front, options: ServerOptions) -> AsyncIterator[str]:
    """The URL of HTTP over `front`, for the length of the context."""
    urls: list[str] = []
    listening = anyio.Event()

    def started(url: str) -> None:
        urls.append(url)
        listening.set()

    async def run() -> None:
        await serve(front, options, started=started)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await listening.wait()
        yield urls[0]
        group.cancel_scope.cancel()


@contextmanager
def served(engine: Engine) -> Iterator[Server]:
    """The server of `engine`, as programs see it, for the length of the context."""
    serving = over_http(engine.inner.front, ServerOptions(port=0))
    with engine.portal.wrap_async_context_manager(serving) as url, Server(url) as server:
        yield server


@asynccontextmanager
async def real_server() -> AsyncIterator[str]:
    """The URL of a server of the default model, for the length of the context."""
    config = resolve({"model": MODEL, "max_model_len": 1024, "port": 0})
    async with open_front(config) as front:
        await front.ready()
        async with over_http(front, config.server) as url:
            yield url
