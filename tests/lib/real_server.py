"""HTTP over a front, and over the real model, on a port that is free: files of tests run beside each other."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from engine.config import ServerOptions, resolve
from engine.http.app import serve
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


@asynccontextmanager
async def real_server() -> AsyncIterator[str]:
    """The URL of a server of the default model, for the length of the context."""
    config = resolve({"model": MODEL, "max_model_len": 1024, "port": 0})
    async with open_front(config) as front:
        await front.ready()
        async with over_http(front, config.server) as url:
            yield url
