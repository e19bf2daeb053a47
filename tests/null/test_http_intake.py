"""What connections and bodies may take: time, bytes, descriptors; and that who keeps to it notices nothing."""

import gzip
import itertools
import json
import re
import resource
import socket
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import aiohttp
import anyio
import anyio.lowlevel
import pytest
from aiohttp.test_utils import make_mocked_request
from anyio.abc import ByteStream
from http_front import FakeFront, chunks, serving
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ServerOptions
from engine.errors import ConfigError, RequestError
from engine.http import connections
from engine.http.connections import connection_limits
from engine.http.intake import MAX_MEMBERS, PIECE_BYTES, SMALL_BYTES, Intake, Unpacker
from engine.http.wire import MAX_BODY_BYTES

pytestmark = pytest.mark.anyio
BODY = b'{"text": "x"}'
BOMB = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
SLOW = 0.2  # a short read_timeout


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop of `engine serve`; other tests of the server run on asyncio's own."""
    return "asyncio", {"use_uvloop": True}


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS = {"gzip": gzip.compress, "deflate": zlib.compress, "raw": raw_deflate}


def post(body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    """A request; without `length`, that of `body`."""
    lines = [b"POST /generate HTTP/1.1", b"Host: localhost", b"Content-Length: %d" % (len(body) if length is None else length)]
    return b"\r\n".join([*lines, *headers, b"", body])


def long_body(size: int) -> bytes:
    return BODY[:-1] + b" " * (size - len(BODY)) + b"}"


@asynccontextmanager
async def dial(url: str) -> AsyncIterator[ByteStream]:
    port = urlsplit(url).port
    assert port is not None
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        with anyio.fail_after(30):
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
    with anyio.fail_after(30):
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


# ── what is packed ───────────────────────────────────────────────────────────────────────────


def unpack(coding: str, parts: Sequence[bytes]) -> bytes:
    unpacker = Unpacker(coding)
    pieces = [piece for part in parts for piece in unpacker.pieces(part)]
    unpacker.finish()
    assert all(len(piece) <= PIECE_BYTES for piece in pieces)
    return b"".join(pieces)


@given(
    data=st.binary(max_size=300).flatmap(lambda some: st.integers(0, 3000).map(lambda times: some * times)),
    kind=st.sampled_from(sorted(PACKERS)),
    cuts=st.lists(st.integers(0, 2000), max_size=5),
)
def test_a_packed_body_is_unpacked_however_it_comes(data: bytes, kind: str, cuts: list[int]) -> None:
    packed = PACKERS[kind](data)
    edges = [0, *sorted(min(cut, len(packed)) for cut in cuts), len(packed)]
    parts = [packed[start:end] for start, end in itertools.pairwise(edges)]
    assert unpack("gzip" if kind == "gzip" else "deflate", parts) == data


def test_the_last_byte_may_unpack_to_more_than_a_piece_has_room_for() -> None:
    for size in range(PIECE_BYTES + 100, PIECE_BYTES + 130):
        packer = zlib.compressobj(wbits=-15, strategy=zlib.Z_FIXED)
        packed = packer.compress(b" " * size) + packer.flush()
        assert unpack("deflate", [packed]) == b" " * size


@given(members=st.lists(st.binary(max_size=50), min_size=1, max_size=20), cut=st.integers(0, 200))
def test_several_members_are_one_body(members: list[bytes], cut: int) -> None:
    packed = b"".join(map(gzip.compress, members))
    assert unpack("gzip", [packed[:cut], packed[cut:]]) == b"".join(members)


@pytest.mark.parametrize(
    ("coding", "packed", "says"),
    [
        ("gzip", b"hello", "is not gzip, as its Content-Encoding says"),
        ("gzip", zlib.compress(BODY), "is not gzip"),
        ("deflate", gzip.compress(BODY), "is not deflate"),
        ("gzip", gzip.compress(BODY)[:-1], "its gzip data end too early"),
        ("gzip", gzip.compress(BODY)[:5], "its gzip data end too early"),
        ("deflate", zlib.compress(BODY)[:-1], "its deflate data end too early"),
        ("gzip", gzip.compress(BODY) + b"more", "is not gzip"),
        ("gzip", gzip.compress(BODY) + b"\0" * 8, "is not gzip"),
        ("gzip", gzip.compress(BODY)[:-8] + b"\0" * 8, "incorrect data check"),
        ("deflate", zlib.compress(BODY) + b"more", "more bytes come after the end of its deflate data"),
        ("gzip", gzip.compress(b"") * (MAX_MEMBERS + 1), "more than 1024 gzip members"),
    ],
    ids=itertools.count(),  # gzip writes the time into what it packs
)
def test_what_is_not_packed_as_it_says(coding: str, packed: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        unpack(coding, [packed])
    assert (caught.value.status, caught.value.code) == (400, "invalid_body")


async def test_packed_requests_are_answered() -> None:
    async with serving(FakeFront()) as url, dial(url) as stream:
        for coding, packed in (
            (b"gzip", gzip.compress(BODY)),
            (b"X-GZIP", gzip.compress(BODY) + gzip.compress(b"  ")),
            (b"deflate", zlib.compress(BODY)),
            (b"deflate", raw_deflate(BODY)),
            (b"identity", BODY),
        ):
            assert (await answer(stream, post(packed, b"Content-Encoding: " + coding)))[0] == 200, coding
        empty = b"POST /flush_cache HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 0\r\n\r\n"
        assert (await answer(stream, empty))[0] == 200
        assert await refusal(stream, post(b"", b"Content-Encoding: gzip")) == (400, "invalid_value")
        assert await refusal(stream, post(b"hello", b"Content-Encoding: gzip")) == (400, "invalid_body")


@pytest.mark.parametrize("fields", [[b"br"], [b"gzip, gzip"], [b"gzip", b"gzip"], [b"zstd"]])
async def test_an_unknown_coding_is_named(fields: list[bytes]) -> None:
    async with serving(FakeFront()) as url, dial(url) as stream:
        status, headers, body = await answer(stream, post(BODY, *(b"Content-Encoding: " + one for one in fields)))
    assert (status, body["error"]["code"], headers["Accept-Encoding"]) == (415, "unsupported_encoding", "gzip, deflate")
    assert repr(b", ".join(fields).decode()) in body["error"]["message"]


async def read_packed(intake: Intake, packed: bytes, coding: str = "gzip") -> bytes:
    payload = aiohttp.StreamReader(mock.Mock(), 2**16)
    payload.feed_data(packed)
    payload.feed_eof()
    return await intake.read(make_mocked_request("POST", "/", headers={"Content-Encoding": coding}, payload=payload))


async def test_the_loop_turns_while_bodies_are_unpacked() -> None:
    intake, turns = Intake(ServerOptions()), 0

    async def read(number: int) -> None:
        with pytest.raises(RequestError, match="is over 33554432 bytes"):
            await read_packed(intake, BOMB)
        running.discard(number)

    running = set(range(6))
    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(read, number)
        while running:
            await anyio.lowlevel.checkpoint()
            turns += 1
    # Four pieces a turn, of six bodies or, at the end, of fewer.
    assert turns >= 6 * (MAX_BODY_BYTES // PIECE_BYTES) // 4
    await anyio.lowlevel.checkpoint()
    assert intake._total == 0 and not intake._held


async def test_packed_bytes_that_unpack_to_nothing_are_bounded_too() -> None:
    empty_block = b"\x00\x00\x00\xff\xff"
    intake = Intake(ServerOptions(max_body_memory=1000))
    assert await read_packed(intake, empty_block * 199 + b"\x03\x00", "deflate") == b""
    with pytest.raises(RequestError, match="is over 1000 bytes"):
        await read_packed(intake, empty_block * 201, "deflate")


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
                b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 33 + b"0\r\n\r\n"
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
    front = FakeFront(hangs=True)
    async with serving(front, max_body_memory=100_000) as url, AsyncExitStack() as stack:
        for _ in range(3):  # each is decoded, and its reply goes on
            stream = await stack.enter_async_context(dial(url))
            front.began = anyio.Event()
            await stream.send(post(long_body(90_000)))
            with anyio.fail_after(10):
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


# ── connections ──────────────────────────────────────────────────────────────────────────────


async def test_one_connection_too_many_is_answered_and_closed() -> None:
    async with serving(FakeFront(), max_connections=2) as url:
        async with dial(url) as first, dial(url) as second:
            assert (await answer(first, post(BODY)))[0] == (await answer(second, post(BODY)))[0] == 200
            async with dial(url) as third:
                await third.send(post(long_body(50_000)))
                status, headers, body = await answer(third)
                assert (status, headers["Retry-After"]) == (503, "1")
                assert (
                    body["error"]["code"] == "too_many_connections" and "--max-connections" in body["error"]["message"]
                )
                assert await until_closed(third) == b""
            assert (await answer(first, post(BODY)))[0] == 200
        assert await errors_counted(url, 503)


@pytest.mark.parametrize("status", [503, 408])
async def test_a_client_that_still_sends_after_its_refusal_is_not_reset(status: int) -> None:
    async with serving(FakeFront(), max_connections=1, read_timeout=SLOW) as url, AsyncExitStack() as stack:
        if status == 503:
            only = await stack.enter_async_context(dial(url))
            assert (await answer(only, post(BODY)))[0] == 200
        with bare_socket(url, b"POST / HTTP/1.1\r\n") as bare:
            await readable(bare)
            for _ in range(3):
                bare.sendall(b"X: y\r\n")
                await anyio.sleep(0.02)
            assert b" %d " % status in bare.recv(2000)
            assert bare.recv(1) == b""


async def test_many_refused_at_once_are_all_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINGERING", 3)
    async with serving(FakeFront(), max_connections=1) as url, dial(url) as only:
        assert (await answer(only, post(BODY)))[0] == 200
        async with AsyncExitStack() as stack:
            refused = [await stack.enter_async_context(dial(url)) for _ in range(20)]
            assert {await refusal(stream) for stream in refused} == {(503, "too_many_connections")}


async def test_slow_clients_that_take_all_connections_make_room_again() -> None:
    count = 200
    async with serving(FakeFront(), max_connections=count, read_timeout=SLOW) as url:
        slow = post(b"{", length=100)
        bare = [bare_socket(url, slow[: 20 if number % 2 else None]) for number in range(count)]
        for one in bare:
            with one:
                await readable(one)
                assert b" 408 " in one.recv(1000)
        async with dial(url) as stream:
            assert (await answer(stream, post(BODY)))[0] == 200


@pytest.mark.parametrize(
    ("soft", "hard", "asked", "gives", "then"),
    [
        (20_000, 20_000, None, (4096, 2048), 20_000),
        (20_000, 20_000, 10_000, (10_000, 2048), 20_000),
        (1024, 10**6, None, (4096, 1600), 6400),
        (256, resource.RLIM_INFINITY, 9000, (9000, 2048), 11_304),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, (4096, 2048), resource.RLIM_INFINITY),
        (1024, 1024, None, (512, 256), 1024),
        (100, 100, None, (25, 25), 100),
        (1024, 2048, 1280, (1280, 512), 2048),
        (1024, 2048, 1281, None, 2048),
    ],
)
def test_connections_leave_descriptors_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, asked: int | None, gives: tuple[int, int] | None, then: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: limits.append(given))
    if gives is None:
        with pytest.raises(ConfigError, match=r"--max-connections is 1281, .* 2048 files, .* ask for at most 1280"):
            connection_limits(asked)
    else:
        assert connection_limits(asked) == gives
    assert limits[-1] == (then, hard)


# ── who reads slowly ─────────────────────────────────────────────────────────────────────────


class Counting(FakeFront):
    """Says much more than any socket holds, and counts what was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0
        text = "x" * 2**16

        def script() -> Any:
            for chunk in chunks(*[text] * 2000):
                self.taken += len(text)
                yield chunk

        self.script = script()


STREAM = post(b'{"text": "x", "stream": true}')


async def test_a_client_that_reads_nothing_holds_what_its_socket_holds() -> None:
    front = Counting()
    async with serving(front) as url, dial(url) as stream:
        await stream.send(STREAM)
        await front.began.wait()
        before = -1
        while before < front.taken:
            before = front.taken
            await anyio.sleep(0.3)
        assert front.taken < 2000 * 2**16 / 4
        await stream.receive(1)
        assert not front.closed.is_set()


@pytest.mark.skipif(not hasattr(connections.socket, "TCP_USER_TIMEOUT"), reason="the kernel cannot")
async def test_a_client_that_takes_nothing_for_long_is_disconnected() -> None:
    front = Counting()
    async with serving(front, write_timeout=0.5) as url, dial(url) as stream:
        await stream.send(STREAM)
        await front.closed.wait()
