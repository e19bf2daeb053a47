"""A web server on loopback of which no two paths behave alike: it redirects, stalls, lies and never ends."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import unquote

from fake_media import encoded, picture

PICTURE = encoded(picture())


class OddWeb:
    """`url` is where it listens; `asked` counts requests by path, `open` those that are not answered whole."""

    def __init__(self) -> None:
        self.url = ""
        self.port = 0
        self.asked: Counter[str] = Counter()
        self.open = 0
        self.sent = 0  # bytes without end
        self.go_on = asyncio.Event()  # what /wait waits for

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split(" ")[1]
                self.asked[path] += 1
                name, _, rest = path.strip("/").partition("/")
                answering = asyncio.ensure_future(getattr(self, f"on_{name}")(writer, unquote(rest)))
                leaving = asyncio.ensure_future(reader.read())
                try:
                    await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
                    if answering.done():
                        await answering
                        await writer.drain()
                finally:
                    answering.cancel()
                    leaving.cancel()
        finally:
            self.open -= 1
            writer.close()

    def _head(self, writer: asyncio.StreamWriter, status: str = "200 OK", **headers: object) -> None:
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([f"HTTP/1.1 {status}", *lines, "Connection: close", "", ""]).encode())

    def _picture(self, writer: asyncio.StreamWriter, data: bytes = PICTURE, **headers: object) -> None:
        self._head(writer, Content_Type="image/png", Content_Length=len(data), **headers)
        writer.write(data)

    async def on_picture(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._picture(writer)

    async def on_fresh(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._picture(writer, Cache_Control="public, max-age=60")

    async def on_unkept(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._picture(writer, Cache_Control="max-age=60\r\nCache-Control: no-store")

    async def on_wait(self, writer: asyncio.StreamWriter, rest: str) -> None:
        await self.go_on.wait()
        self._picture(writer)

    async def on_to(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._head(writer, "302 Found", Location=rest)

    async def on_twice(self, writer: asyncio.StreamWriter, rest: str) -> None:
        """A redirect or a picture, a header of which comes twice; with the same value, if `rest` ends with "same"."""
        name, _, same = rest.partition("/")
        first, second = {"Location": ("/picture", "/fresh"), "Content-Type": ("image/png", "text/html")}[name]
        status, data = ("302 Found", b"") if name == "Location" else ("200 OK", PICTURE)
        both = f"{first}\r\n{name}: {first if same else second}"
        self._head(writer, status, **{name: both, "Content-Length": len(data)})
        writer.write(data)

    async def on_circle(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._head(writer, "302 Found", Location="/circle")

    async def on_status(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._head(writer, f"{rest} Odd", Content_Length=0)

    async def on_stall(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._head(writer, Content_Type="image/png", Content_Length=1000)
        writer.write(b"x")
        await writer.drain()
        await asyncio.Event().wait()

    async def on_endless(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._head(writer, Content_Type="image/png")
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()
            self.sent += 1 << 16

    async def on_long(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._head(writer, Content_Type="image/png", Content_Length=1 << 40)
        writer.write(PICTURE)
        await writer.drain()
        await asyncio.Event().wait()

    async def on_short(self, writer: asyncio.StreamWriter, rest: str) -> None:
        """Promises more than it sends."""
        self._head(writer, Content_Type="image/png", Content_Length=len(PICTURE) + 10)
        writer.write(PICTURE)

    async def on_less(self, writer: asyncio.StreamWriter, rest: str) -> None:
        """Sends more than it promises."""
        self._head(writer, Content_Type="image/png", Content_Length=100)
        writer.write(PICTURE)

    async def on_empty(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._picture(writer, b"")

    async def on_page(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._head(writer, Content_Type="text/html; charset=utf-8", Content_Length=9)
        writer.write(b"<html/>  ")

    async def on_packed(self, writer: asyncio.StreamWriter, rest: str) -> None:
        self._head(writer, Content_Type="image/png", Content_Encoding="gzip", Content_Length=5)
        writer.write(b"12345")

    async def on_noise(self, writer: asyncio.StreamWriter, rest: str) -> None:
        writer.write(b"\0\1\2 no http\r\n\r\n")


@asynccontextmanager
async def odd_web() -> AsyncIterator[OddWeb]:
    web = OddWeb()
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(web.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    web.port = server.sockets[0].getsockname()[1]
    web.url = f"http://127.0.0.1:{web.port}"
    try:
        yield web
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
