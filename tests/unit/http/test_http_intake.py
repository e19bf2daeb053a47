"""What bodies may take, bytes and time; and that who keeps to it notices nothing."""

import gzip
import re
from contextlib import AsyncExitStack, ExitStack
from unittest import mock

import aiohttp
import anyio
import anyio.lowlevel
import pytest
from aiohttp.test_utils import make_mocked_request
from anyio.abc import ByteStream
from http_front import FakeFront, chunks, serving
from http_raw import BODY, answer, bare_socket, dial, errors_counted, long_body, post, readable, refusal, until_closed

from engine.config import ServerOptions
from engine.http import app, connections
from engine.http.app import ROUTES
from engine.http.intake import SMALL_BYTES, Intake
from engine.http.wire import MAX_BODY_BYTES

pytestmark = pytest.mark.anyio
BOMB = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
KEY = b"X-Api-Key: key"
SLOW = 0.2  # a short read_timeout


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop of `engine serve`; other tests of the server run on asyncio's own."""
    return "asyncio", {"use_uvloop": True}


# ── how long a body is ───────────────────────────────────────────────────────────────────────


async def test_a_length_over_the_limit_is_refused_before_a_byte_is_read() -> None:
    async with serving(FakeFront()) as url, dial(url) as stream:
        assert await refusal(stream, post(b"", length=MAX_BODY_BYTES + 1)) == (413, "body_too_large")
        assert await errors_counted(url, 413)


@pytest.mark.parametrize("coding", ["plain", "chunked", "gzip"])
async def test_a_client_that_sends_all_of_a_body_that_is_too_long_still_gets_its_answer(coding: str) -> None:
    body = b" " * (MAX_BODY_BYTES + 2**20)
    match coding:
        case "plain":
            raw = post(body)
        case "gzip":
            raw = post(body, b"Content-Encoding: gzip")  # it is not: the answer comes at once
        case _:
            chunk = b"%x\r\n%b\r\n" % (2**20, b" " * 2**20)
            raw = (
                b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                + chunk * 33
                + b"0\r\n\r\n"
            )
    async with serving(FakeFront()) as url, dial(url) as stream:
        await stream.send(raw)
        status, headers, body = await answer(stream)
        assert (status, body["error"]["code"], headers["Connection"]) == (413, "body_too_large", "close")


@pytest.mark.parametrize(("path", "status"), [(b"/nowhere", 404), (b"/flush_cache", 200)])
async def test_a_body_that_nobody_reads_is_dropped_and_then_the_connection_closed(path: bytes, status: int) -> None:
    async with serving(FakeFront(), read_timeout=SLOW) as url, dial(url) as stream:
        head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % path
        got, headers, _ = await answer(stream, head + b"1\r\nx\r\n")
        assert (got, headers["Connection"]) == (status, "close")
        await stream.send(b"this is not parsed")
        assert await until_closed(stream) == b""


async def test_the_loop_turns_while_the_parser_has_more_at_once() -> None:
    waiting, turns, bodies = [b"x"] * 50, 0, []

    def parse_on(resume_parser: bool = True) -> None:
        if waiting:
            payload.feed_data(waiting.pop())
        elif not payload.is_eof():
            payload.feed_eof()

    payload = aiohttp.StreamReader(mock.Mock(resume_reading=parse_on), 2**16)
    payload.feed_data(b"x")

    async def read() -> None:
        bodies.append(await Intake(ServerOptions()).read(make_mocked_request("POST", "/", payload=payload)))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        while not bodies:
            await anyio.lowlevel.checkpoint()
            turns += 1
    assert bodies == [b"x" * 51] and turns > 50


async def test_the_bodies_of_all_requests_share_a_bound() -> None:
    front = FakeFront()
    async with serving(front, max_body_memory=100_000) as url, dial(url) as first, dial(url) as second:
        body = long_body(90_000)
        await first.send(post(body)[:-10])
        while True:  # until the first body has been taken in
            status, headers, said = await answer(second, post(body))
            if status == 503:
                break
        assert (said["error"]["code"], headers["Retry-After"]) == ("too_many_bytes", "1")
        assert "may hold 100000 (--max-body-memory)" in said["error"]["message"]
        async with dial(url) as third:
            packed = post(gzip.compress(body), b"Content-Encoding: gzip")
            assert await refusal(third, packed) == (503, "too_many_bytes")  # what it unpacks to counts
        async with dial(url) as third:
            assert (await answer(third, post(BODY)))[0] == 200  # a small one that comes whole does not
        assert (await answer(first, post(body)[-10:]))[0] == 200
        async with dial(url) as third:
            assert (await answer(third, packed))[0] == 200
            assert await refusal(third, post(long_body(100_001))) == (413, "body_too_large")
    assert SMALL_BYTES < 90_000


async def test_a_body_is_held_until_it_is_decoded_or_its_client_leaves() -> None:
    front = FakeFront(chunks("a"), hangs=True)
    async with serving(front, max_body_memory=100_000) as url, AsyncExitStack() as stack:
        for _ in range(3):  # each is decoded, and its reply goes on
            stream = await stack.enter_async_context(dial(url))
            front.began = anyio.Event()
            await stream.send(post(long_body(90_000)))
            with anyio.fail_after(60):
                await front.began.wait()
        async with dial(url) as stream:
            await stream.send(post(long_body(90_000))[:-10])
            await anyio.sleep(0.1)
        front.hangs = False
        async with dial(url) as stream:
            assert await refusal(stream, post(long_body(90_000)[:-1] + b"x")) == (400, "invalid_json")
        statuses = set()
        while 200 not in statuses:  # until the server has seen it leave
            async with dial(url) as stream:
                statuses.add((await answer(stream, post(long_body(90_000))))[0])


async def test_the_bodies_of_open_requests_share_a_bound_until_they_are_over() -> None:
    front = FakeFront(hangs=True)
    body = post(long_body(90_000), KEY)
    async with serving(front, max_open_memory=200_000, api_key=("a", "b", "key")) as url, AsyncExitStack() as stack:
        for key in (b"X-Api-Key: a", b"X-Api-Key: b"):  # decoded, and going on
            stream = await stack.enter_async_context(dial(url))
            front.began = anyio.Event()
            await stream.send(post(long_body(90_000), key))
            with anyio.fail_after(60):
                await front.began.wait()
        async with dial(url) as third:
            status, headers, said = await answer(third, body)
            assert (status, said["error"]["code"]) == (503, "too_many_bytes")
            assert headers["Retry-After"] == "1"
            assert "have bodies of 180" in said["error"]["message"]
            assert "and may have 200000 (--max-open-memory); send" in said["error"]["message"]
        async with dial(url) as third:
            assert await refusal(third, post(long_body(200_001), KEY)) == (413, "body_too_large")
        front.script, front.hangs = list(chunks("a")), False
        await stack.aclose()  # their clients leave
        statuses = set()
        while 200 not in statuses:
            async with dial(url) as third:
                statuses.add((await answer(third, body))[0])
        for _ in range(3):
            async with dial(url) as third:
                assert (await answer(third, body))[0] == 200


@pytest.mark.parametrize("keyed", [True, False])
async def test_a_client_with_many_open_bodies_is_refused_while_another_is_served(keyed: bool) -> None:
    """By its key, or else by its address."""
    front = FakeFront(hangs=True)
    options = {"api_key": ("one", "two")} if keyed else {}
    async with serving(front, max_open_memory=800_000, **options) as url, AsyncExitStack() as stack:

        async def dialled(client: str) -> tuple[ByteStream, bytes]:
            """A connection of that client, and a request for it."""
            host = "127.0.0.2" if client == "two" and not keyed else "127.0.0.1"
            stream = await anyio.connect_tcp("127.0.0.1", int(url.rpartition(":")[2]), local_host=host)
            headers = [f"X-Api-Key: {client}".encode()] if keyed else []
            return await stack.enter_async_context(stream), post(long_body(100_000), *headers)

        with anyio.fail_after(60):
            for clients in (["one"] * 6, ["two"]):  # three quarters of the bound; and one where a quarter is left
                for client in clients:
                    stream, request = await dialled(client)
                    front.began = anyio.Event()
                    await stream.send(request)
                    await front.began.wait()
                status, _, said = await answer(*await dialled(clients[0]))
                assert (status, said["error"]["code"]) == (503, "too_many_bytes")
                assert "of this API key or address have bodies of " in said["error"]["message"]
                assert "are left of 800000 (--max-open-memory); send" in said["error"]["message"]
            front.script, front.hangs = list(chunks("a")), False
            await stack.aclose()  # they leave
            served = 0
            while served < 6:
                served += (await answer(*await dialled("one")))[0] == 200


@pytest.mark.parametrize("bound", ["max_body_memory", "max_open_memory"])
async def test_a_bound_below_the_size_of_small_bodies_holds_for_these(bound: str) -> None:
    async with serving(FakeFront(chunks("a")), **{bound: 1000}) as url:
        async with dial(url) as stream:
            assert await refusal(stream, post(long_body(1001))) == (413, "body_too_large")
        async with dial(url) as stream:
            assert (await answer(stream, post(long_body(1000))))[0] == 200


@pytest.mark.parametrize("path", [route.path for route in ROUTES if route.takes is not None and route.method == "POST"])
async def test_no_route_holds_a_body_for_longer_than_its_request(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    intakes: list[Intake] = []
    monkeypatch.setattr(app, "Intake", lambda *given: intakes.append(Intake(*given)) or intakes[0])
    empty, packed = b"{" + b" " * 100_000 + b"}", gzip.compress(b"{]" * 50_000)
    async with serving(FakeFront()) as url:
        async with dial(url) as stream:
            await answer(stream, post(empty, path=path))  # it may be all that the route needs
            assert intakes[0].held == 0
            assert await refusal(stream, post(empty[1:], path=path)) == (400, "invalid_json")
            assert await refusal(stream, post(packed, b"Content-Encoding: gzip", path=path)) == (400, "invalid_json")
            cut = post(packed[:-9], b"Content-Encoding: gzip", path=path)
            assert await refusal(stream, cut) == (400, "invalid_body")
            assert intakes[0].held == 0
        async with dial(url) as stream:
            await stream.send(post(empty[:70_000], length=100_000, path=path))
            while not intakes[0].held:
                await anyio.sleep(0.005)
        with anyio.fail_after(60):
            while intakes[0].held:
                await anyio.sleep(0.005)


# ── how fast ─────────────────────────────────────────────────────────────────────────────────


async def trickle(stream: ByteStream, data: bytes, seconds: float) -> None:
    try:
        for byte in data:
            await stream.send(bytes([byte]))
            await anyio.sleep(seconds)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        pass


@pytest.mark.parametrize("slow", [b"POST / HTTP/1.1\r\nX: ", post(b"{", length=100)], ids=["head", "body"])
@pytest.mark.parametrize("trickles", [False, True])
async def test_a_client_that_stalls_is_told_so(slow: bytes, trickles: bool) -> None:
    async with serving(FakeFront(), read_timeout=SLOW) as url:
        async with dial(url) as stream, anyio.create_task_group() as group:
            await stream.send(slow)
            if trickles:
                group.start_soon(trickle, stream, b"xyz" * 20, SLOW / 2)
            status, headers, body = await answer(stream)
            assert (status, body["error"]["code"], headers["Connection"]) == (408, "request_timeout", "close")
            assert "0.2 seconds" in body["error"]["message"]
            group.cancel_scope.cancel()
        assert await errors_counted(url, 408)


async def test_a_second_head_has_its_deadline_too_and_the_first_does_not_touch_it() -> None:
    async with serving(FakeFront(), read_timeout=SLOW) as url, dial(url) as stream:
        raw = post(BODY)
        await stream.send(raw[:20])
        assert (await answer(stream, raw[20:]))[0] == 200
        await anyio.sleep(SLOW * 1.5)  # the first head's deadline is over, and an idle client is not late
        assert (await answer(stream, raw))[0] == 200
        assert await refusal(stream, raw[:20]) == (408, "request_timeout")
        assert await until_closed(stream) == b""


async def test_a_slow_client_that_goes_on_is_waited_for() -> None:
    async with serving(FakeFront(), read_timeout=1) as url, dial(url) as stream:
        body = long_body(2000)
        await stream.send(post(b"", length=len(body)))
        for start in range(0, len(body), 60):
            await stream.send(body[start : start + 60])
            await anyio.sleep(0.05)
        assert (await answer(stream))[0] == 200


async def test_a_client_may_wait_for_100_continue() -> None:
    async with serving(FakeFront(), read_timeout=SLOW) as url, dial(url) as stream:
        await stream.send(post(b"", b"Expect: 100-continue", length=len(BODY)))
        assert await stream.receive() == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await answer(stream, BODY))[0] == 200
        assert (await answer(stream, post(BODY, b"Expect: 200-ok")))[0] == 200


@pytest.mark.parametrize(
    "more, length, status", [(b"Origin: http://x", 9, 403), (b"X-No: key", 9, 401), (KEY, 2**26, 413)]
)
async def test_a_body_that_would_be_refused_is_not_asked_for(more: bytes, length: int, status: int) -> None:
    async with serving(FakeFront(), api_key=("key",)) as url, dial(url) as stream:
        asked = post(b"", b"Expect: 100-continue", more, length=length)
        assert (await answer(stream, asked))[0] == status


async def test_a_body_that_is_not_whole_at_the_servers_end_is_answered() -> None:
    with ExitStack() as sockets:
        async with serving(FakeFront()) as url:
            headers = ([], [b"Content-Encoding: gzip"])
            clients = [sockets.enter_context(bare_socket(url, post(b"", *more, length=9))) for more in headers]
            await anyio.sleep(0.1)
        for client in clients:
            await readable(client)
            said = client.recv(2000)
            assert said.startswith(b"HTTP/1.1 503 ") and b'"draining"' in said and b"\nRetry-After: " in said


async def test_an_idle_connection_is_closed_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connections.KEEP_ALIVE_SECONDS == 75
    monkeypatch.setattr(connections, "KEEP_ALIVE_SECONDS", 0.1)
    async with serving(FakeFront()) as url, dial(url) as silent, dial(url) as idle, dial(url) as slow:
        await slow.send(post(BODY)[:20])
        assert (await answer(idle, post(BODY)))[0] == 200
        assert await until_closed(idle) == await until_closed(silent) == b""
        assert (await answer(slow, post(BODY)[20:]))[0] == 200  # a head that has begun is not idle


async def test_a_body_that_cannot_be_parsed_ends_the_request_that_waits_for_it() -> None:
    async with serving(FakeFront()) as url, dial(url) as stream:
        await stream.send(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        await anyio.sleep(0.05)
        assert await refusal(stream, b"zz\r\n") == (400, "invalid_body")
        assert await until_closed(stream) == b""


async def test_what_is_not_http_gets_an_error_in_the_common_shape() -> None:
    async with serving(FakeFront()) as url, dial(url) as stream:
        assert await refusal(stream, b"\x00\xff garbage\r\n\r\n") == (400, "invalid_http")
        assert await until_closed(stream) == b""
        assert await errors_counted(url, 400)


async def test_answers_without_a_request_have_ids_too() -> None:
    async with serving(FakeFront(), max_connections=1, read_timeout=SLOW) as url:
        ids = []
        for sent in (b"\x00\xff garbage\r\n\r\n", b"GET /health HTTP/1.1\r\nHost", post(BODY)):
            async with dial(url) as stream, dial(url) as one_too_many:
                for each in (stream, one_too_many):
                    ids.append((await answer(each, sent))[1]["X-Request-Id"])
    assert len(set(ids)) == 6


async def test_pipelined_requests_are_answered_in_order() -> None:
    packed = post(gzip.compress(long_body(300_000)), b"Content-Encoding: gzip")
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with serving(FakeFront()) as url, dial(url) as stream:
        await stream.send(post(BODY) + packed + head + post(b"", b"Content-Encoding: br") + health[:-4])
        await stream.send(health[-4:])
        got = b""
        while (statuses := re.findall(rb"HTTP/1.1 (\d+)", got))[4:] == []:
            got += await stream.receive()
    assert statuses == [b"200", b"200", b"200", b"415", b"200"]
