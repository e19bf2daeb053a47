"""What is not quite HTTP: answered below 500, nothing else disturbed, and nothing logged as if it were our bug."""

import gzip
from urllib.parse import urlsplit

import aiohttp
import anyio
import pytest
from http_front import FakeFront, serving

pytestmark = pytest.mark.anyio
HEAD = b"Host: localhost\r\nConnection: close\r\n"
BOMB = gzip.compress(b" " * (33 * 2**20))


def post(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"POST /generate HTTP/1.1\r\n" + HEAD[:-2], *headers, b"", body])


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x00\xff\xfe garbage\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\n" + HEAD + b"\r\n", 400),
        (b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 400),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HEAD + b"\r\n", 400),
        (b"GET /v1/models/%ED%A0%80%ff%00 HTTP/1.1\r\n" + HEAD + b"\r\n", 404),
        (b"GET /v1/responses/%ff?%ED%A0%80=%ff HTTP/1.1\r\n" + HEAD + b"\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=x\r\n" + HEAD + b"\r\n", 200),
        (b"PURGE /health HTTP/1.1\r\n" + HEAD + b"\r\n", 405),
        (post(b"{}", b"Content-Length: x"), 400),
        (post(b"{}", b"Content-Length: -2"), 400),
        (post(b"0\r\n\r\n", b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400),
        (post(b"zz\r\n{}\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"), 400),
        (post(b"hello", b"Content-Length: 5", b"Content-Encoding: gzip"), 400),
        (post(b"hello", b"Content-Length: 5", b"Content-Encoding: what"), 415),
        (post(BOMB, b"Content-Length: %d" % len(BOMB), b"Content-Encoding: gzip"), 413),
        (post(b"", b"Content-Length: 0", b"Expect: miracles"), 400),
    ],
)  # fmt: skip
async def test_an_answer_below_500(raw: bytes, status: int, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(FakeFront()) as url:
        port = urlsplit(url).port
        assert port is not None
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            with anyio.fail_after(60):
                await stream.send(raw)
                line = await stream.receive()
        assert line.split()[1] == b"%d" % status
        async with aiohttp.ClientSession(url) as session, session.get("/health") as response:
            assert response.status == 200
    assert caplog.records == []


async def test_a_body_that_stops_short_ends_its_request() -> None:
    front = FakeFront()
    async with serving(front) as url:
        port = urlsplit(url).port
        assert port is not None
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(post(b"{", b"Content-Length: 100"))
        async with aiohttp.ClientSession(url) as session, session.get("/health") as response:
            assert response.status == 200
    assert front.asked == []
