"""A router in this process, and workers that do byte by byte what a test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio

from engine.router.app import serve
from engine.router.options import resolve_router
from engine.router.router import Router

Script = Callable[["RawWorker", asyncio.StreamWriter, bytes, bytes], Awaitable[None]]
FAST = {"health_seconds": 0.05, "health_timeout": 0.3, "breaker_seconds": 0.1}


class RawWorker:
    """Answers heartbeats by itself, and all else by `script`, which gets the head and the body of the request."""

    def __init__(self, script: Script, models: str = "fake") -> None:
        self.script = script
        self.models = models
        self.status = 200  # of heartbeats
        self.hangs = False  # answers nothing at all
        self.mute = 0  # how many questions for its models it answers with 503
        self.tells = False  # asks `script` for the events of its cache too
        self.asked: list[tuple[bytes, bytes]] = []
        self.left = 0  # requests whose client has closed the connection before the answer was whole
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.strip().split(b"\r\n")[1:])
                body = await reader.readexactly(int(fields.get(b"content-length", 0)))
                if self.hangs:
                    await asyncio.sleep(30)
                if head.startswith(b"GET /readyz"):
                    writer.write(whole(b"{}", status=self.status))
                elif head.startswith(b"GET /v1/cache/events") and not self.tells:
                    writer.write(whole(b"{}", status=404))
                elif head.startswith(b"GET /v1/models") and self.mute:
                    self.mute -= 1
                    writer.write(whole(b"{}", status=503))
                elif head.startswith(b"GET /v1/models"):
                    writer.write(whole(b'{"data":[{"id":"%b"}]}' % self.models.encode()))
                else:
                    self.asked.append((head, body))
                    gone = asyncio.create_task(reader.read(1))
                    script = asyncio.create_task(self.script(self, writer, head, body))
                    await asyncio.wait({gone, script}, return_when=asyncio.FIRST_COMPLETED)
                    if not script.done():
                        self.left += 1
                        script.cancel()
                        return
                    gone.cancel()
                    await asyncio.wait({gone})
                    script.result()
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def whole(body: bytes, status: int = 200, headers: bytes = b"") -> bytes:
    """An answer of known length."""
    head = b"HTTP/1.1 %d Said\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
    return head % (status, headers, len(body)) + body


def says(body: bytes, status: int = 200, headers: bytes = b"") -> Script:
    """Answers each request with `body`."""

    async def script(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, sent: bytes) -> None:
        writer.write(whole(body, status, headers))

    return script


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def raw_worker(script: Script, models: str = "fake", port: int = 0) -> AsyncIterator[RawWorker]:
    worker = RawWorker(script, models)
    server = await asyncio.start_server(worker.handle, "127.0.0.1", port)
    worker.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield worker
    finally:
        server.close()


@asynccontextmanager
async def routing(*urls: str, wait: bool = True, **options: Any) -> AsyncIterator[tuple[str, Router]]:
    """The URL of a router of the workers at `urls`, and the router, once all workers are ready."""
    router = Router(resolve_router({"workers": tuple(urls), "port": 0, "policy": "round_robin"} | FAST | options, {}))
    urls_: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with anyio.create_task_group() as group:
        group.start_soon(partial(serve, router, started=urls_.set_result))
        with anyio.fail_after(60):
            url = await urls_
            while wait and not all(each.state == "ready" and each.models for each in router.fleet.workers.values()):
                await anyio.sleep(0.005)
        yield url, router
        group.cancel_scope.cancel()


async def until(said: Callable[[], bool]) -> None:
    """Until it is so."""
    with anyio.fail_after(60):
        while not said():
            await anyio.sleep(0.005)
