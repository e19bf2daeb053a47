"""A client that has said all may close its side and is answered; one that is gone is noticed."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream
from http_front import FakeFront, chunks, serving

from engine.http.half_closed import HalfClosed

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])]


def request(body: object, version: str = "1.1", more: str = "") -> bytes:
    data = json.dumps(body)
    return (
        f"POST /generate HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n{more}\r\n{data}".encode()
    )


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[SocketStream]:
    host, port = url.removeprefix("http://").split(":")
    async with await anyio.connect_tcp(host, int(port)) as stream:
        yield stream


async def all_of(stream: SocketStream) -> bytes:
    """What comes until the server closes."""
    read = b""
    with anyio.fail_after(60):
        try:
            while True:
                read += await stream.receive()
        except anyio.EndOfStream:
            return read


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_half_closed_client_is_answered(version: str, streamed: bool) -> None:
    front = FakeFront(chunks("a", "b"), pause=0.05)
    async with serving(front) as url, connected(url) as client:
        await client.send(request({"text": "x", "stream": streamed}, version))
        await client.send_eof()
        answer = await all_of(client)
    interim, _, final = answer.rpartition(f"HTTP/{version} 200 OK".encode())
    assert interim in (b"", b"HTTP/1.1 100 Continue\r\n\r\n")[: 1 + (version == "1.1")]
    assert b'"text":"ab"' in final
    assert (b"[DONE]" in final) is streamed


@pytest.mark.parametrize("more", [b"", b"GET /health HTTP/1.1", request({"text": "x"})[:-3]])
async def test_all_that_was_asked_is_answered(more: bytes) -> None:
    async with serving(FakeFront(chunks("a"), pause=0.02)) as url, connected(url) as client:
        await client.send(request({"text": "x"}) * 3 + more)
        await client.send_eof()
        assert (await all_of(client)).count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("sent", [b"", b"POST /gen", request({"text": "x"})[:-3]])
async def test_a_request_that_is_cut_off_is_not_waited_for(sent: bytes) -> None:
    front = FakeFront()
    async with serving(front) as url, connected(url) as client:
        await client.send(sent)
        await anyio.sleep(0.01)
        await client.send_eof()
        assert await all_of(client) == b""
    assert not front.asked


async def test_a_client_that_leaves_after_an_early_answer_holds_no_connection() -> None:
    async with serving(FakeFront(), api_key=("key",), max_connections=1) as url:
        async with connected(url) as client:
            await client.send(request({"text": "x"})[:-3])
            assert b" 401 " in await client.receive()
        answer = b" 503 "
        with anyio.fail_after(60):  # of the ten seconds that the server reads on for a client that is there
            while b" 503 " in answer:
                async with connected(url) as client:
                    await client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    answer = await client.receive()
        assert b" 200 " in answer


@pytest.mark.parametrize(("version", "reset"), [("1.0", True), ("1.1", True), ("1.1", False)])
async def test_a_client_that_is_gone_ends_its_request(version: str, reset: bool) -> None:
    front = FakeFront(chunks("a", "b")[:1], hangs=True)
    async with serving(front) as url, connected(url) as client:
        await client.send(request({"text": "x"}, version))
        await front.began.wait()
        if reset:
            linger = b"\1\0\0\0\0\0\0\0"  # of no seconds: closing resets the connection
            client.extra(anyio.abc.SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await client.aclose()
        with anyio.fail_after(60):
            await front.closed.wait()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_stream_whose_client_is_gone_ends_at_its_next_events(version: str) -> None:
    front = FakeFront(chunks(*"abcdefghij" * 100), pause=0.01)
    async with serving(front) as url, connected(url) as client:
        await client.send(request({"text": "x", "stream": True}, version))
        await client.receive()
        await client.send_eof()
        await client.receive()
        await client.aclose()
        with anyio.fail_after(60):  # of the ten seconds that the reply takes
            await front.closed.wait()


async def test_a_half_closed_client_that_then_goes_ends_its_request() -> None:
    front = FakeFront(chunks("a", "b")[:1], hangs=True)
    async with serving(front) as url, connected(url) as client:
        await client.send(request({"text": "x"}))
        await client.send_eof()
        with anyio.fail_after(60):
            assert (await client.receive()).startswith(b"HTTP/1.1 100")
        assert front.open
        await client.aclose()
        with anyio.fail_after(60):
            await front.closed.wait()


async def test_a_client_that_closes_once_it_is_answered_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end may come before the connection's task waits for another request."""
    looked: list[int] = []
    monkeypatch.setattr(HalfClosed, "_look", lambda self, number: looked.append(number))
    finish = HalfClosed.finish_response

    async def finish_and_end(self: HalfClosed, *args: Any) -> Any:
        finished = await finish(self, *args)
        assert self.eof_received() is False
        return finished

    monkeypatch.setattr(HalfClosed, "finish_response", finish_and_end)
    async with serving(FakeFront(chunks("a"))) as url, connected(url) as stream:
        await stream.send(request({"text": "a"}, more="Connection: close\r\n"))
        assert b"200 OK" in await all_of(stream)
    assert not looked
