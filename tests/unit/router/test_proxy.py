"""The router's way of a request: bytes unchanged, back-pressure, clients that leave, and workers that die."""

import asyncio
import json
import random
import socket
from typing import Any

import aiohttp
import anyio
import pytest
from http_front import FakeFront, chunks, serving
from http_raw import dial, post, until_closed
from routed import STREAM, RawWorker, chunk, raw_worker, routing, says, until, whole

from engine.errors import WorkerError
from engine.router.wire import Chunks

pytestmark = pytest.mark.anyio


async def body_of(url: str, path: str = "/v1/completions", **fields: Any) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.post(url + path, json={"prompt": "a"} | fields) as answer:
        return answer.status, await answer.read()


# ── bytes ────────────────────────────────────────────────────────────────────────────────────


async def test_a_stream_is_the_workers_byte_for_byte() -> None:
    pieces = [b"data: 1\n\n", b"0\r\n\r\n", b"x" * 100_000, "größer\n".encode(), b"\r\n0\r\n\r\n", b"last"]

    async def stream(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        writer.write(STREAM)
        for piece in pieces:  # ends of chunks, where a look at the last bytes alone would see the end of the body
            data = chunk(piece)
            for cut in (data[:3], data[3:-2], data[-2:]):
                writer.write(cut)
                await asyncio.sleep(0.002)
        writer.write(b"0\r\n\r\n")

    async with raw_worker(stream) as worker, routing(worker.url) as (url, _):
        wanted = STREAM.partition(b"\r\n\r\n")[2] + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"
        for _ in range(2):  # the second time over the same connection to the worker
            async with dial(url) as client:
                await client.send(post(b"{}", b"Connection: close", path="/v1/chat/completions?a=%20b"))
                head, _, body = (await until_closed(client)).partition(b"\r\n\r\n")
            assert body == wanted
            assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked")
        sent = worker.asked[0][0]
        assert sent.startswith(b"POST /v1/chat/completions?a=%20b HTTP/1.1\r\nHost: 127.0.0.1:")
        assert sent.count(b"Host:") == 1 and b"close" not in sent.lower()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_the_end_of_chunks_is_found_however_they_are_cut(size: int) -> None:
    body = chunk(b"0\r\n\r\n") + b"5;name=x\r\nhello\r\n" + chunk(b"z" * 300) + b"0\r\nTrailer: x\r\n\r\n"
    chunks_ = Chunks()
    cuts = [body[at : at + size] for at in range(0, len(body), size)]
    assert [chunks_.end(cut) for cut in cuts] == [False] * (len(cuts) - 1) + [True]


def test_the_end_of_chunks_is_found_where_each_comes_by_itself() -> None:
    whole = [chunk(b"a"), chunk(b"0\r\n\r\n"), chunk(b"z" * 300), chunk(b"a"), b"5;n=1\r\nhello\r\n", b"005\nhello\r\n"]
    end = b"0\r\n\r\n"
    for pieces in ([*whole, end], [b"6\r\n", chunk(b"a"), b"\r\n", end], [b"0\r\n", chunk(b"a"), b"\r\n"]):
        chunks_ = Chunks()
        assert [chunks_.end(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for broken in (b"0x5\r\nhello\r\n", b"-5\r\nhello\r\n", end + chunk(b"a"), b"\r\n\r\n"):
        chunks_ = Chunks()
        assert not any(map(chunks_.end, whole))
        with pytest.raises(WorkerError):
            chunks_.end(broken)


async def test_answers_keep_status_reason_headers_and_bodies_of_any_kind() -> None:
    blob = random.Random(1).randbytes(300_000)
    headers = b"X-Request-Id: theirs\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nKeep-Alive: timeout=5\r\n"
    async with (
        raw_worker(says(blob, 418, headers)) as worker,
        routing(worker.url) as (url, _),
        aiohttp.ClientSession() as session,
        session.put(f"{url}/anything/at%2Fall", data=blob, headers={"X-Own": "1", "Content-Type": "x/y"}) as answer,
    ):
        assert (answer.status, answer.reason, await answer.read()) == (418, "Said", blob)
        assert answer.headers.getall("Set-Cookie") == ["a=1", "b=2"]
        assert answer.headers["X-Request-Id"] == "theirs" and "Keep-Alive" not in answer.headers
        head, body = worker.asked[0]
        assert head.startswith(b"PUT /anything/at%2Fall HTTP/1.1") and body == blob
        assert b"X-Own: 1" in head and b"Content-Type: x/y" in head


async def test_heads_and_clients_of_http_1_0_are_answered() -> None:
    async def answer(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        if head.startswith(b"HEAD"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n")
        elif b" HTTP/1.0\r\n" in head:  # which takes no chunks
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: 1\n\n")
            await writer.drain()
            writer.close()

    async with raw_worker(answer) as worker, routing(worker.url) as (url, _):
        async with aiohttp.ClientSession() as session:
            for _ in range(2):
                async with session.head(f"{url}/docs") as head:
                    assert (head.status, head.headers["Content-Length"]) == (200, "1234")
        async with dial(url) as client:
            await client.send(b"GET /v1/x HTTP/1.0\r\nHost: localhost\r\n\r\n")
            head_, _, body = (await until_closed(client)).partition(b"\r\n\r\n")
            assert head_.startswith(b"HTTP/1.0 200") and body == b"data: 1\n\n"


async def test_a_router_that_drains_refuses_what_is_new() -> None:
    async with raw_worker(says(b"{}")) as worker, routing(worker.url) as (url, router):
        router.draining = True
        status, body = await body_of(url)
        assert (status, json.loads(body)["error"]["code"]) == (503, "draining") and not worker.asked


async def test_an_answer_that_ends_with_its_connection_is_passed_on_whole() -> None:
    async def old(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nall ")
        await asyncio.sleep(0.01)
        writer.write(b"of it")
        await writer.drain()
        writer.close()

    async with raw_worker(old) as worker, routing(worker.url) as (url, _):
        assert await body_of(url) == (200, b"all of it")


async def test_an_engine_answers_as_it_does_without_the_router() -> None:
    front = FakeFront(chunks("Hello", ", ", "world"))
    async with serving(front) as worker, routing(worker) as (url, router):
        for path, fields in (
            ("/v1/completions", {"stream": True}), ("/v1/completions", {}), ("/generate", {"text": "a"}),
            ("/v1/completions", {"no_such_field": 1}), ("/v1/nothing", {}),
        ):  # fmt: skip
            fields = fields if "text" in fields else {"prompt": "a"} | fields
            answers = []
            for root in (worker, url):
                async with (
                    aiohttp.ClientSession(headers={"X-Request-Id": "mine"}) as session,
                    session.post(root + path, json=fields) as answer,
                ):
                    text = (await answer.text()).replace("chatcmpl", "cmpl")
                    answers.append((answer.status, answer.content_type, len(text), answer.headers["X-Request-Id"]))
            assert answers[0] == answers[1]
        (only,) = router.fleet.workers.values()
        assert (only.view.running, only.view.waiting_chars, only.counts.sent) == (0, 0, 5)


# ── slow clients, and clients that leave ─────────────────────────────────────────────────────


async def test_a_slow_client_stops_its_worker() -> None:
    """What the router holds stays small, and the client gets all of it in the end."""
    written, total = 0, 64 * 2**20

    async def flood(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        nonlocal written
        writer.write(STREAM)
        while written < total:
            writer.write(chunk(b"x" * 2**16))
            written += 2**16
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async with raw_worker(flood) as worker, routing(worker.url) as (url, _):
        async with dial(url) as client:
            await client.send(post(b"{}"))
            await until(lambda: written > 0)
            before = -1
            while before != written:  # until it stands still
                before = written
                await anyio.sleep(0.2)
            assert written < total / 2  # the kernel's buffers hold some MiB on each side
            got = 0
            while got < total:
                got += len(await client.receive(2**20))
        await until(lambda: written == total)


async def test_a_client_that_leaves_ends_its_request_at_the_worker() -> None:
    front = FakeFront(hangs=True)
    async with serving(front) as worker, routing(worker) as (url, router):
        async with dial(url) as client:
            await client.send(post(b'{"prompt": "a", "stream": true}', path="/v1/completions"))
            await client.receive()
            await front.began.wait()
            assert not front.closed.is_set()
        with anyio.fail_after(60):
            await front.closed.wait()
        (only,) = router.fleet.workers.values()
        await until(lambda: not only.view.running)


async def test_a_client_that_leaves_before_the_answer_begins_ends_it_too() -> None:
    async def never(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        await asyncio.sleep(60)

    async with raw_worker(never) as worker, routing(worker.url) as (url, router):
        async with dial(url) as client:
            await client.send(post(b"{}"))
            await until(lambda: bool(worker.asked))
        await until(lambda: worker.left == 1)
        assert not any(each.view.running for each in router.fleet.workers.values())


async def test_a_client_that_sends_no_more_is_answered() -> None:
    async with raw_worker(says(b"{}")) as worker, routing(worker.url) as (url, _), dial(url) as client:
        await client.send(post(b"{}"))
        await client.send_eof()
        assert (await until_closed(client)).endswith(b"\r\n\r\n{}")


# ── workers that die ─────────────────────────────────────────────────────────────────────────


async def test_a_worker_that_dies_before_the_first_byte_is_not_noticed() -> None:
    async def dies(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        writer.write(STREAM)  # a head alone is no answer
        await writer.drain()
        writer.transport.abort()

    async with (
        raw_worker(dies) as bad,
        raw_worker(says(b'"well"')) as good,
        routing(bad.url, good.url) as (url, router),
    ):
        for number in range(4):
            assert await body_of(url) == (200, b'"well"'), number
        assert len(bad.asked) >= 2
        counts = router.fleet.workers[bad.url].counts
        assert counts.moved == len(bad.asked) and counts.answered == 0


async def test_a_worker_that_breaks_off_breaks_the_stream() -> None:
    async def half(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        writer.write(STREAM + chunk(b"data: half\n\n"))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async with raw_worker(half) as bad, raw_worker(half) as other, routing(bad.url, other.url) as (url, router):
        async with dial(url) as client:
            await client.send(post(b"{}", b"Connection: close"))
            got = b""
            with pytest.raises((anyio.BrokenResourceError, anyio.EndOfStream)):
                while True:
                    got += await client.receive()
        assert got.endswith(chunk(b"data: half\n\n"))
        assert len(bad.asked) + len(other.asked) == 1  # it is not sent again
        assert sum(each.counts.failed for each in router.fleet.workers.values()) == 1


async def test_busy_workers_are_passed_over_and_the_last_ones_word_is_passed_on() -> None:
    async with (
        raw_worker(says(b'"full"', 503, b"Retry-After: 7\r\n")) as full,
        raw_worker(says(b'"well"')) as good,
        routing(full.url, good.url) as (url, router),
    ):
        for _ in range(3):
            assert await body_of(url) == (200, b'"well"')
        good.script = says(b'"slow down"', 429)
        assert (await body_of(url))[0] in (429, 503)
        assert router.fleet.workers[full.url].counts.moved >= 1


async def test_errors_of_the_request_itself_are_not_tried_elsewhere() -> None:
    async with (
        raw_worker(says(b'"bug"', 500)) as one, raw_worker(says(b'"bug"', 500)) as two,
        routing(one.url, two.url) as (url, _),
    ):  # fmt: skip
        assert await body_of(url) == (500, b'"bug"')
        assert len(one.asked) + len(two.asked) == 1


async def test_a_request_that_kills_workers_is_given_up() -> None:
    async def dies(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        writer.transport.abort()

    async with (
        raw_worker(dies) as one, raw_worker(dies) as two,
        routing(one.url, two.url, retries=2) as (url, _),
    ):  # fmt: skip
        status, body = await body_of(url)
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (502, "worker_failed") and "3 times (--retries)" in error["message"]
        assert len(one.asked) + len(two.asked) == 3


async def test_a_connection_that_the_worker_closed_meanwhile_is_no_failure() -> None:
    closing: list[asyncio.StreamWriter] = []

    async def keeps(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        if len(worker.asked) == 2 and not closing:
            closing.append(writer)
            writer.transport.abort()  # as one that closes an idle connection just as a request comes
            return
        writer.write(whole(b"{}"))

    async with raw_worker(keeps) as worker, routing(worker.url) as (url, router):
        for _ in range(2):
            assert (await body_of(url))[0] == 200
        (only,) = router.fleet.workers.values()
        assert only.counts.moved == 0 and len(worker.asked) == 3


@pytest.mark.parametrize(
    "answer", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"]
)
async def test_what_is_not_http_is_a_worker_that_fails(answer: bytes) -> None:
    async def odd(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        writer.write(answer)
        await writer.drain()
        await asyncio.sleep(5)

    async with raw_worker(odd) as worker, routing(worker.url, retries=0) as (url, _):
        status, body = await body_of(url)
        assert status == 502 and json.loads(body)["error"]["code"] == "worker_failed"


async def test_nobody_listens_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    async with routing(dead, wait=False, queue_seconds=0.2) as (url, router):
        await until(lambda: router.fleet.workers[dead].state == "gone")
        status, body = await body_of(url)
        message = json.loads(body)["error"]["message"]
        assert status == 503 and "within 0.2 s" in message
        assert f"none of 1 worker takes requests, as {dead} is gone" in message
