"""The load generator of `engine bench serve`: what it reads off a socket, and its client processes."""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import anyio
import anyio.abc
import pytest
from http_front import FakeFront, chunks, serving

from engine.client.bench import clients as clients_module
from engine.client.bench.asking import Api, Asker, Target
from engine.client.bench.clients import ClientLoad, clients_of, started, warnings
from engine.client.bench.load import Clock, Record, play
from engine.client.bench.report import client_lines, one_token_share, report_of, samples_of
from engine.client.bench.traffic import Turn
from engine.client.bench.wire import Address
from engine.errors import ConfigError, WorkerError

pytestmark = pytest.mark.anyio
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
SAID = b'data: {"choices":[{"text":"a","finish_reason":"length"}],"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n'
Speak = Callable[[anyio.abc.SocketStream, int], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def read_request(stream: anyio.abc.SocketStream) -> bytes:
    """The next request; raises EndOfStream when its client leaves."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive()
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += await stream.receive()
    return head + b"\r\n\r\n" + body


@asynccontextmanager
async def speaking(speak: Speak) -> AsyncIterator[tuple[str, list[int]]]:
    """The URL of a server that answers with `speak`, which gets the number of its connection; and which there were."""
    connections: list[int] = []

    async def handle(stream: anyio.abc.SocketStream) -> None:
        connections.append(len(connections))
        async with stream:
            await speak(stream, connections[-1])

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, handle)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        with anyio.fail_after(60):
            yield f"http://127.0.0.1:{port}", connections
        group.cancel_scope.cancel()


async def asked(url: str, times: int = 1, api: Api = "openai", **given: Any) -> list[Record]:
    """What is recorded of some requests, one after another."""
    records = []
    with closing(Asker(Target(url, "m", api, **given))) as ask:
        for _ in range(times):
            records.append(record := Record(0.0, []))
            (await ask(["p"], 1, record, Clock(0.0)))()
    return records


async def whole(stream: anyio.abc.SocketStream, data: bytes) -> None:
    """Answer one request with `data`, and wait until the client leaves."""
    await read_request(stream)
    await stream.send(data)
    with pytest.raises(anyio.EndOfStream):
        await stream.receive()


# ── what is read off a socket ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + b"\r\n" + chunk(SAID) + b"0\r\n\r\n",
        CHUNKED + b"\r\n" + chunk(SAID[:50]) + chunk(SAID[50:]) + b"0\r\n\r\n",
        CHUNKED + b"\r\n" + chunk(SAID).replace(b"\r\n", b";name=value\r\n", 1) + b"0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(SAID) + SAID,
    ],
    ids=["a chunk", "chunks", "an extension", "a length"],
)
@pytest.mark.parametrize("size", [1, 3, 10_000])
async def test_an_answer_is_read_however_it_is_framed_and_cut(answer: bytes, size: int) -> None:
    async def speak(stream: anyio.abc.SocketStream, number: int) -> None:
        await read_request(stream)
        for start in range(0, len(answer), size):
            await stream.send(answer[start : start + size])
            await anyio.lowlevel.checkpoint()
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()

    async with speaking(speak) as (url, _):
        (record,) = await asked(url)
    assert (record.error, record.output_tokens, len(record.pieces)) == (None, 1, 1)


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async def speak(stream: anyio.abc.SocketStream, number: int) -> None:
        await read_request(stream)
        await stream.send(b"HTTP/1.0 200 OK\r\n\r\n" + SAID)

    async with speaking(speak) as (url, connections):
        first, second = await asked(url, 2)
    assert (first.error, second.error) == (None, None)
    assert connections == [0, 1]


async def test_a_connection_is_kept_and_one_that_was_closed_meanwhile_is_replaced() -> None:
    async def speak(stream: anyio.abc.SocketStream, number: int) -> None:
        for _ in range(2):
            await read_request(stream)
            await stream.send(CHUNKED + b"\r\n" + chunk(SAID) + b"0\r\n\r\n")
        await read_request(stream)  # the third, and no answer

    async with speaking(speak) as (url, connections):
        records = await asked(url, 5)
    assert [record.error for record in records] == [None] * 5
    assert connections == [0, 1, 2]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "closed the connection before it answered"),
        (CHUNKED + b"\r\n" + chunk(SAID[:60]), "before its reply ended"),
        (CHUNKED + b"\r\nno size\r\n0\r\n\r\n", "where the size of a chunk belongs"),
    ],
)
async def test_an_answer_that_breaks_off_is_a_failed_request(answer: bytes, said: str) -> None:
    async def speak(stream: anyio.abc.SocketStream, number: int) -> None:
        await read_request(stream)
        if answer:
            await stream.send(answer)

    async with speaking(speak) as (url, _):
        (record,) = await asked(url)
    assert said in (record.error or "")


async def test_a_server_that_says_nothing_runs_into_the_timeout() -> None:
    async def speak(stream: anyio.abc.SocketStream, number: int) -> None:
        await whole(stream, b"HTTP/1.1 200 OK\r\n")

    async with speaking(speak) as (url, _):
        (record,) = await asked(url, timeout=0.05)
    assert "took longer than 0.05 s" in (record.error or "")
    assert "takes no connection" in ((await asked(url))[0].error or "")


async def test_what_is_sent() -> None:
    heads: list[bytes] = []

    async def speak(stream: anyio.abc.SocketStream, number: int) -> None:
        heads.append(await read_request(stream))
        await stream.send(CHUNKED + b"\r\n" + chunk(SAID) + b"0\r\n\r\n")

    async with speaking(speak) as (url, _):
        await asked(f"{url}/below", api="chat", api_key="secret", extra={"ignore_eos": None, "top_k": 5})
    (said,) = heads
    assert said.startswith(b"POST /below/v1/chat/completions HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer secret\r\n" in said
    assert b'"messages":[{"role":"user","content":"p"}]' in said
    assert b'"top_k":5' in said
    assert b"ignore_eos" not in said


def test_a_chat_alternates_its_roles() -> None:
    body = Target("http://h", "m", "chat").body(["a", "b", "c"], 4)
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert Target("http://h", "m", "native").body(["a", "b"], 4)["text"] == "ab"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a", Address("a", 80, "", False)),
        ("https://a/b/", Address("a", 443, "/b", True)),
        ("http://[::1]:8000", Address("::1", 8000, "", False)),
    ],
)
def test_an_address(url: str, address: Address) -> None:
    assert Address.of(url) == address
    assert b"\r\nHost: [::1]:8000\r\n" in Address.of("http://[::1]:8000").request("/", b"", {})
    with pytest.raises(ConfigError, match="ftp://a"):
        Address.of("ftp://a")


# ── several processes ────────────────────────────────────────────────────────────────────────


async def test_clients_share_a_load() -> None:
    front = FakeFront(chunks("Hello", ", ", "world", finish="length"))
    conversations = [(Turn(f"p{number}", 3), Turn("more", 3)) for number in range(5)]
    ended: list[int] = []
    async with serving(front) as url, started(2) as clients:
        for _ in range(2):  # they can be asked again
            run, loads = await clients.play(
                Target(url, "fake"), conversations, concurrency=3, on_replies=lambda count: ended.append(count)
            )
            assert (run.asked, len(run.answered), len(loads)) == (10, 10, 2)
    expected = sorted(text for number in range(5) for text in (f"p{number}", f"p{number}Hello, worldmore"))
    assert sorted(request.text or "" for request in front.asked) == sorted(expected * 2)
    assert sum(record.output_tokens for record in run.records) == 30
    assert all(len(record.pieces) == 3 for record in run.records)
    assert [record.sent for record in run.records] == sorted(record.sent for record in run.records)
    assert sum(ended) <= 20
    assert all(load.cpu >= 0 and 0 <= load.late_p99 <= load.late_most for load in loads)


async def test_a_client_process_that_is_gone_is_told() -> None:
    front = FakeFront(hangs=True)
    async with serving(front) as url, started(1) as clients:
        ((child, _),) = clients._children

        async def kill() -> None:
            while not front.asked:
                await anyio.sleep(0.001)
            os.kill(child.process.pid, signal.SIGKILL)

        async with anyio.create_task_group() as group:
            group.start_soon(kill)
            with pytest.raises(WorkerError, match="SIGKILL"):
                await clients.play(Target(url, "fake"), [(Turn("p", 3),)])


async def test_arrivals_are_divided_between_clients() -> None:
    async def ask(said: Any, length: int, record: Record, now: Clock) -> Any:
        record.pieces.append(now())
        record.ended = now()
        return lambda: ""

    alone = await play([(Turn("p", 1),)] * 6, ask, rate=2000.0, seed=1)
    sent = []
    for number in range(2):
        run = await play([(Turn("p", 1),)] * 3, ask, rate=2000.0, seed=1, share=(number, 2))
        sent += [record.sent for record in run.records]
    assert sorted(sent) == [record.sent for record in alone.records]


def test_how_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients_module, "processors", lambda: 16)
    assert [clients_of("auto", streams) for streams in (1, 64, 65, 256, 4096, None)] == [1, 1, 2, 4, 4, 4]
    monkeypatch.setattr(clients_module, "processors", lambda: 2)
    assert clients_of("auto", 256) == 1
    assert [clients_of("3", streams) for streams in (2, 8, None)] == [2, 3, 3]
    for wrong in ("0", "-1", "many", ""):
        with pytest.raises(ConfigError, match="--clients"):
            clients_of(wrong, 8)


# ── what is said of it ───────────────────────────────────────────────────────────────────────


def test_the_share_of_events_with_one_token() -> None:
    assert one_token_share([Record(0.0, [0.1] * 4, output_tokens=4)]) == 1.0
    assert one_token_share([Record(0.0, [0.1] * 3, output_tokens=4)]) == pytest.approx(2 / 3)
    assert one_token_share([Record(0.0, [0.1] * 2, output_tokens=40), Record(0.0, [0.1] * 2, output_tokens=2)]) == 0.5
    assert one_token_share([]) == 0.0


def test_a_client_that_is_the_limit_is_named() -> None:
    fine, busy, late = ClientLoad(0.5, 0.001, 0.01), ClientLoad(0.95, 0.001, 0.01), ClientLoad(0.5, 0.03, 0.2)
    assert warnings([fine]) == []
    (said,) = warnings([fine, busy])
    assert "client process 2 of 2 used 95% of a core" in said and "--clients" in said
    assert "30 ms too late" in warnings([late])[0]
    record = Record(0.0, [0.1, 0.2], 0.5, output_tokens=2)
    run = clients_module.run_of([record], 1)
    report = report_of("serve", {}, [run], samples_of([run]), [fine, busy])
    assert client_lines(report) == [
        "4 events/s, at least 100.0% of them with one token",
        "2 client processes, the busiest: 95% of a core, woke at most 10.0 ms too late",
    ]
    assert client_lines(report_of("throughput", {}, [run], samples_of([run]))) == []
