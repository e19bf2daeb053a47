"""A client of HTTP that sends what it likes, byte by byte, and reads what comes."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import anyio
import anyio.lowlevel
from anyio.abc import ByteStream

BODY = b'{"text": "x"}'


def post(body: bytes, *headers: bytes, length: int | None = None, path: str = "/generate") -> bytes:
    """A request; without `length`, that of `body`."""
    length = len(body) if length is None else length
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Host: localhost", b"Content-Length: %d" % length]
    return b"\r\n".join([*lines, *headers, b"", body])


def long_body(size: int) -> bytes:
    return BODY[:-1] + b" " * (size - len(BODY)) + b"}"


@asynccontextmanager
async def dial(url: str) -> AsyncIterator[ByteStream]:
    port = urlsplit(url).port
    assert port is not None
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        with anyio.fail_after(60):
            yield stream


async def answer(stream: ByteStream, data: bytes = b"") -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the next answer to `data`."""
    if data:
        await stream.send(data)
    got = b""
    while b"\r\n\r\n" not in got:
        got += await stream.receive()
    head, _, body = got.partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    headers = dict(field.split(": ", 1) for field in fields)
    while len(body) < int(headers["Content-Length"]):
        body += await stream.receive()
    return int(line.split()[1]), headers, json.loads(body)


def bare_socket(url: str, data: bytes) -> socket.socket:
    """A socket that nothing reads but the test; the server finds it with `data` already there."""
    bare = socket.create_connection(("127.0.0.1", urlsplit(url).port or 0))
    bare.sendall(data)
    return bare


async def readable(bare: socket.socket) -> None:
    with anyio.fail_after(60):
        await anyio.wait_readable(bare)


async def until_closed(stream: ByteStream) -> bytes:
    got = b""
    try:
        while True:
            got += await stream.receive()
    except anyio.EndOfStream:
        return got


async def refusal(stream: ByteStream, data: bytes = b"") -> tuple[int, str]:
    """Status and code of an error in the shape of all errors."""
    status, _, body = await answer(stream, data)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return status, body["error"]["code"]


async def errors_counted(url: str, status: int) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        return f'engine_http_errors_total{{status="{status}"}}' in await response.text()
