"""What clients and workers may send that is odd, or that would lead elsewhere."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from http_raw import answer as answered
from http_raw import dial, post, until_closed
from routed import RawWorker, Script, chunk, raw_worker, routing, says, until, whole

from engine.errors import ConfigError, WorkerError
from engine.router.dispatch import PATIENCE
from engine.router.policy import Arrival, Choice, RoutingPolicy, View
from engine.router.wire import Chunks, Head
from engine.router.workers import named

pytestmark = pytest.mark.anyio
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def raw(data: bytes, *, closes: bool = False) -> Script:
    """Answers with these bytes."""

    async def script(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        writer.write(data)
        if closes:
            await writer.drain()
            writer.close()

    return script


# ── clients ──────────────────────────────────────────────────────────────────────────────────


async def test_a_request_is_framed_anew_however_it_was_framed() -> None:
    chunked = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    async with raw_worker(says(b"{}")) as worker, routing(worker.url) as (url, _):
        async with dial(url) as client:
            wanted = b"Expect: 100-continue\r\nConnection: content-length, x-mine\r\nX-Mine: 1\r\n\r\n"
            await client.send(chunked + wanted)
            assert await client.receive() == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nX-Trailer: 1\r\n\r\n")
            assert (await answered(client))[0] == 200
            await client.send(post(b"1") + post(b"22", path="/second"))  # at once
            assert [(await answered(client))[0] for _ in range(2)] == [200, 200]
        heads, bodies = zip(*worker.asked, strict=True)
        assert bodies == (b"abcde", b"1", b"22")
        for head, body in worker.asked:
            assert head.lower().count(b"content-length:") == 1 and b"Content-Length: %d\r\n" % len(body) in head
        assert not any(word in heads[0].lower() for word in (b"transfer-encoding", b"expect", b"x-mine", b"trailer"))


async def test_each_connection_header_names_what_is_not_passed_on() -> None:
    ours = b"Connection: \xff, x-a\r\nX-A: 1\r\nX-B: 1\r\nX-C: 1\r\nConnection: keep-alive\r\nconnection: X-B"
    said = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nX-B: 1\r\nX-C: 1\r\nConnection: x-a\r\nConnection: close, X-B"
    framed = b"\r\nConnection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    async with raw_worker(raw(said + framed)) as worker, routing(worker.url) as (url, _), dial(url) as client:
        await client.send(b"GET /a HTTP/1.1\r\nHost: localhost\r\n%b, close\r\n\r\n" % ours)
        head, _, body = (await until_closed(client)).partition(b"\r\n\r\n")
        for passed in (head, worker.asked[0][0]):
            assert b"X-C: 1" in passed and b"X-A" not in passed and b"X-B" not in passed
        assert body == b"2\r\nok\r\n0\r\n\r\n" and b"Transfer-Encoding: chunked" in head
    assert Head.read(said).closes and not Head.read(said.replace(b"close", b"close-not")).closes


@pytest.mark.parametrize("name", [b"Authorization", b"x-api-key", PATIENCE.encode()])
async def test_what_is_no_list_is_refused_when_it_has_two_values(name: bytes) -> None:
    twice = (name + b": Bearer 1", name + b": Bearer 2")
    async with raw_worker(says(b"{}")) as worker, routing(worker.url) as (url, _), dial(url) as client:
        path = "/v1/completions" if name == PATIENCE.encode() else "/flush_cache"
        status, _, said = await answered(client, post(b"{}", *twice, path=path))
        assert (status, said["error"]["param"]) == (400, name.decode())
        assert "comes with 2 values" in said["error"]["message"]
        assert not worker.asked
        assert (await answered(client, post(b"{}", b"Authorization: Bearer 1", path="/flush_cache")))[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: localhost\r\nX: a\nContent-Length: 5\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    ],
)
async def test_what_can_be_read_in_two_ways_reaches_no_worker(sent: bytes) -> None:
    async with raw_worker(says(b"{}")) as worker, routing(worker.url) as (url, _):
        async with dial(url) as client:
            await client.send(sent + b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await until_closed(client)).split()[1] == b"400"
        assert not worker.asked


@pytest.mark.parametrize(
    ("target", "seen"),
    [
        (b"http://localhost/a?b=%20", b"/a?b=%20"),
        (b"//elsewhere/a", b"//elsewhere/a"),
        (b"/../../%2e%2e/a%0Ab", b"/../../%2e%2e/a%0Ab"),
        (b"/a%2Fb;c", b"/a%2Fb;c"),
        (b"/a/http://elsewhere/", b"/a/http://elsewhere/"),
    ],
)
async def test_any_path_leads_to_a_worker_below_its_prefix(target: bytes, seen: bytes) -> None:
    async with raw_worker(says(b"{}")) as worker, routing(wait=False) as (url, router):
        router.fleet.add(f"{worker.url}/pre/fix/", "test").state = "ready"
        async with dial(url) as client:
            assert (await answered(client, b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % target))[0] == 200
        asked = [head for head, _ in worker.asked if b"/pre/fix/readyz" not in head and b"/v1/" not in head]
        assert asked[0].startswith(b"GET /pre/fix%b HTTP/1.1\r\nHost: 127.0.0.1:" % seen)


async def test_another_host_in_the_target_is_refused() -> None:
    async with raw_worker(says(b"{}")) as worker, routing(worker.url) as (url, _):
        async with dial(url) as client:
            await client.send(
                b"GET http://elsewhere.example/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            assert b"host_not_allowed" in await until_closed(client)
        async with dial(url) as client:
            await client.send(b"CONNECT elsewhere.example:80 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert (await until_closed(client)).startswith(b"HTTP/1.1 4")
        assert not worker.asked


async def test_an_upgrade_is_asked_of_no_worker() -> None:
    async with raw_worker(says(b"{}")) as worker, routing(worker.url) as (url, _):
        async with dial(url) as client:
            wanted = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA")
            for _ in range(2):  # as Java's client asks, again and again
                assert (await answered(client, post(b"{}", *wanted)))[0] == 200
        async with dial(url) as client:
            lines = b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            assert (await answered(client, b"GET /ws HTTP/1.1\r\n%b\r\n" % lines))[0] == 200
        assert [body for _, body in worker.asked] == [b"{}", b"{}", b""]
        assert not any(b"upgrade" in head.lower() or b"http2-settings" in head.lower() for head, _ in worker.asked)


async def test_large_bodies_and_bad_ones_go_by_load() -> None:
    large = json.dumps({"prompt": "a" * (10 * 2**20)}).encode()
    bad = (b"{", b"[1]", b"\xff\xfe", b'{"prompt": {"a": [1]}, "model": 7, "messages": 3}', b"[" * 100_000, b"null")
    async with (
        raw_worker(says(b"{}")) as worker,
        routing(worker.url, policy="cache_aware") as (url, _),
        aiohttp.ClientSession() as session,
    ):
        for body in (large, *bad):
            async with session.post(f"{url}/v1/completions", data=body) as said:
                assert said.status == 200
            assert worker.asked.pop()[1] == body


async def test_what_is_a_workers_needs_the_key_whatever_its_path_looks_like() -> None:
    other = (("PUT", "/workers"), ("POST", "/router%2Fnotes"), ("GET", "/workers%2Ftargets"), ("POST", "/metrics"))
    options = {"api_key": ("client",), "admin_key": ("admin",)}
    async with raw_worker(says(b"{}")) as worker, routing(worker.url, **options) as (url, _):

        async def status(method: str, path: str, key: bytes = b"") -> int:
            async with dial(url) as client:
                head = b"%b %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n%bConnection: close\r\n\r\n"
                bearer = b"Authorization: Bearer %b\r\n" % key if key else b""
                await client.send(head % (method.encode(), path.encode(), bearer))
                return int((await until_closed(client)).split()[1])

        for method, path in other:
            assert await status(method, path) == 401, (method, path)
            assert await status(method, path, b"admin") == 401, (method, path)
        assert not worker.asked
        for method, path in other:
            assert await status(method, path, b"client") == 200
        assert len(worker.asked) == len(other)
        assert await status("GET", "/metrics") == await status("GET", "/%6Detrics") == 200
        for path in ("/workers", "/%77orkers", "/add_worker?url=http://x", "/remove_worker", "/router/notes"):
            assert await status("POST", path) == await status("POST", path, b"client") == 401
        assert await status("DELETE", f"/workers?url={worker.url}", b"client") == 401
        assert await status("GET", "/workers", b"admin") == await status("GET", "/workers", b"client") == 200
        assert len(worker.asked) == len(other)


async def test_an_id_leads_to_no_other_route() -> None:
    async with raw_worker(says(b"{}", 404)) as worker, routing(worker.url) as (url, _), aiohttp.ClientSession() as own:
        for id in ("..", "../models", "a?b", "a#b", "%2e%2e"):
            async with own.post(f"{url}/v1/responses", json={"input": "a", "previous_response_id": id}) as said:
                assert said.status == 404
        paths = [head.split()[1] for head, _ in worker.asked]
        assert paths == [b"/v1/responses/" + id for id in (b"..", b"..%2Fmodels", b"a%3Fb", b"a%23b", b"%252e%252e")]


# ── workers ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sent", "body"),
    [
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 3000 + OK, b"ok"),
        (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok and more", b"ok"),
        (b"HTTP/1.1 204 None\r\n\r\nmore", b""),
    ],
)
async def test_odd_answers_that_can_be_read(sent: bytes, body: bytes) -> None:
    async with (
        raw_worker(raw(sent)) as worker,
        routing(worker.url) as (url, router),
        aiohttp.ClientSession() as session,
    ):
        for _ in range(2):  # what follows an answer is not the beginning of the next one
            async with session.get(f"{url}/a") as said:
                assert said.status in (200, 204) and await said.read() == body
        assert next(iter(router.fleet.workers.values())).breaker.state == "closed"


@pytest.mark.parametrize("coding", [b"identity", b"chunked, gzip"])
async def test_a_body_in_another_coding_ends_with_its_connection(coding: bytes) -> None:
    sent = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %b\r\nContent-Length: 1\r\n\r\nall of it" % coding
    async with raw_worker(raw(sent, closes=True)) as worker, routing(worker.url) as (url, _), dial(url) as client:
        await client.send(b"GET /a HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head, _, body = (await until_closed(client)).partition(b"\r\n\r\n")
        assert body == b"all of it" and b"Connection: close" in head and b"Content-Length" not in head


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 42 Odd\r\n\r\n",
        b"HTTP/1.1 2000 Odd\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\nSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_answers_that_can_be_read_in_two_ways_are_none(sent: bytes) -> None:
    async with (
        raw_worker(raw(sent)) as worker,
        routing(worker.url, retries=0) as (url, _),
        aiohttp.ClientSession() as session,
        session.get(f"{url}/a") as said,
    ):
        assert (said.status, (await said.json())["error"]["code"]) == (502, "worker_failed")


@pytest.mark.parametrize("size", [b"0x5", b"+5", b"-5", b"0_5", b" 5", b"", b"5 5", b"\xd9\xa5", b"g", b"\r"])
async def test_a_chunk_has_hexadecimal_digits_for_its_size_and_nothing_else(size: bytes) -> None:
    with pytest.raises(WorkerError, match="where the size of a chunk belongs"):
        Chunks().end(size + b"\r\nhello\r\n0\r\n\r\n")
    for good in (b"5", b"05", b"5;x=y", b"5 ;x", b"5\t"):
        assert Chunks().end(good + b"\r\nhello\r\n0\r\n\r\n")
    assert Chunks().end(b"A\r\n" + b"x" * 10 + b"\r\n0\r\n\r\n")


async def test_a_worker_may_answer_before_it_has_read_the_body() -> None:
    refused = whole(b'{"large": 1}', 413, b"Connection: close\r\n")

    async def impatient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(refused if head.startswith(b"POST") else whole(b'{"data": [{"id": "a"}]}'))
        while await reader.read(1 << 16):
            pass
        writer.close()

    server = await asyncio.start_server(impatient, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, routing(wait=False) as (url, router), aiohttp.ClientSession() as session:
        router.fleet.add(address, "test")
        await until(lambda: router.fleet.workers[address].may_take)
        for _ in range(2):
            async with session.post(f"{url}/v1/completions", data=b"x" * (10 * 2**20)) as said:
                assert (said.status, await said.read()) == (413, b'{"large": 1}')


async def test_a_chunk_that_is_cut_off_is_no_whole_answer() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with (
        raw_worker(raw(head + chunk(b"whole") + b"ff\r\nhalf", closes=True)) as worker,
        routing(worker.url) as (url, _),
        aiohttp.ClientSession() as session,
        session.get(f"{url}/a") as said,
    ):
        with pytest.raises(aiohttp.ClientPayloadError):
            await said.read()


async def test_a_worker_of_http_1_0_is_asked_once_a_connection() -> None:
    async with (
        raw_worker(raw(OK.replace(b"1.1", b"1.0"))) as worker,
        routing(worker.url) as (url, router),
        aiohttp.ClientSession() as session,
    ):
        for _ in range(2):
            async with session.get(f"{url}/a") as said:
                assert await said.read() == b"ok"
            assert not router.fleet.workers[worker.url]._idle


async def test_a_worker_on_ipv6() -> None:
    worker = RawWorker(says(b"{}"))
    try:
        server = await asyncio.start_server(worker.handle, "::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    port = server.sockets[0].getsockname()[1]
    async with server, routing(f"http://[::1]:{port}/") as (url, _), dial(url) as client:
        assert (await answered(client, post(b"{}")))[0] == 200
        assert b"\r\nHost: [::1]:%d\r\n" % port in worker.asked[0][0]


@pytest.mark.parametrize(
    "url",
    ["http://", "http://a:99999", "http://a:b", "http://[::1", "http://a/x?y", "http://u:p@a", "http://a/x#y",
     "http://a b", "http://a/x\r\nX: y", "http://a/ü", "ftp://a", "a:1"],
)  # fmt: skip
async def test_what_is_no_url_of_a_worker_is_told(url: str) -> None:
    with pytest.raises(ConfigError, match="a worker is"):
        named(url)
    async with routing() as (router, _), aiohttp.ClientSession() as session:
        for sent in (
            session.post(f"{router}/workers", json={"url": url}),
            session.post(f"{router}/add_worker", params={"url": url}),
        ):
            async with sent as said:
                assert (said.status, (await said.json())["error"]["param"]) == (400, "url")


# ── policies ─────────────────────────────────────────────────────────────────────────────────


class Raises(RoutingPolicy):
    """Raises whatever it is asked or told."""

    def choose(self, arrival: Arrival, workers: Any) -> Choice:
        raise ZeroDivisionError

    def fail(self, *what: object) -> None:
        raise ZeroDivisionError

    sent = answered = removed = stored = evicted = reset = tidy = fail  # type: ignore[assignment]


async def test_a_policy_that_raises_stops_neither_heartbeats_nor_events() -> None:
    asked = asyncio.Event()

    async def tells(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        kinds = [{"kind": kind, "blocks": "00" * 8} for kind in ("stored", "evicted", "reset")]
        for after, number in ((0, 3), (3, 6)):
            event = {"after": after, "number": number, "changes": kinds}
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" if not after else b"")
            writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await asked.wait()

    async with raw_worker(tells) as one, routing(wait=False) as (_, router):
        one.tells = True
        router.policy = router.dispatcher.policy = router.feeds._policy = Raises()
        worker = router.fleet.add(one.url, "test")
        await until(lambda: worker.counts.evictions == 2)
        router.health._become(worker, "gone", "test")
        await until(lambda: worker.state == "ready")
        assert worker.watch is not None and not worker.watch.done()
        router.fleet.remove(worker)
        asked.set()


async def test_a_full_model_costs_those_of_others_nothing() -> None:
    """Of many that wait for one worker, one is tried when another worker has room."""
    held = asyncio.Event()

    async def hold(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        await held.wait()
        writer.write(whole(b"{}"))

    async with (
        raw_worker(hold, "a") as a,
        raw_worker(says(b"{}"), "b") as b,
        routing(a.url, b.url, worker_limit=1) as (url, router),
        aiohttp.ClientSession() as session,
    ):

        async def ask(model: str) -> int:
            async with session.post(f"{url}/v1/completions", json={"prompt": "x", "model": model}) as said:
                return said.status

        waiting = [asyncio.create_task(ask("a")) for _ in range(40)]
        await until(lambda: router.dispatcher.waiting == 39)
        looked = 0
        candidates = router.dispatcher.candidates

        def counted(ticket: Any) -> Any:
            nonlocal looked
            looked += 1
            return candidates(ticket)

        router.dispatcher.candidates = counted  # type: ignore[method-assign]
        assert await ask("b") == 200
        assert looked <= 8
        held.set()
        assert await asyncio.gather(*waiting) == [200] * 40


async def test_a_worker_that_is_removed_keeps_no_connection() -> None:
    async with raw_worker(says(b"{}")) as one, routing(one.url) as (_, router):
        worker = router.fleet.workers[one.url]
        connection = await worker.connection()
        router.fleet.remove(worker)
        worker.give_back(connection)
        assert not connection.open and not worker._idle


async def test_the_bound_of_the_index_is_an_option() -> None:
    async with routing(policy="cache_aware", index_chars=2**14) as (_, router):
        assert router.policy.index.limit == 2**14 // 128  # type: ignore[attr-defined]
        seen = View("w", 0, 0, 1)
        for number in range(100):
            arrival = Arrival("", f"{number:128}" * 8)
            router.policy.choose(arrival, [seen])
            router.policy.sent(arrival, "w")
            router.policy.tidy(1.0)
        assert router.policy.index.held("w") <= 2**14 // 128  # type: ignore[attr-defined]
