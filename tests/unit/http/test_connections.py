"""What connections may take, in descriptors and time; and that who keeps to it notices nothing."""

import resource
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from http_front import FakeFront, chunks, serving
from http_raw import BODY, answer, bare_socket, dial, errors_counted, long_body, post, readable, refusal, until_closed

from engine.errors import ConfigError
from engine.http import connections
from engine.http.connections import connection_limits

pytestmark = pytest.mark.anyio
SLOW = 0.2  # a short read_timeout


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop of `engine serve`; other tests of the server run on asyncio's own."""
    return "asyncio", {"use_uvloop": True}


# ── how many ──────────────────────────────────────────────────────────────────────────────


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


def test_a_connection_of_one_of_several_fronts_may_need_two_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 20_000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: limits.append(given))
    assert connection_limits(8000, each=2) == (8000, 2048) and limits[-1][0] == 18_304
    with pytest.raises(ConfigError, match=r"20000 files, of which 2304 are .* takes two; ask for at most 8848"):
        connection_limits(9000, each=2)


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
