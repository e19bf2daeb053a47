"""A router follows what workers tell of their caches: ours, others, and one that misbehaves."""

import json
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import anyio.lowlevel
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from house import open_house, prompt
from real_server import over_http

from engine.config import resolve
from engine.conversation.canonical import chained, space_of
from engine.router import cache_feed
from engine.router.cache_feed import CacheFeed

pytestmark = pytest.mark.anyio
TEXT = "What a router is told of a cache is what a router would ask for. " * 10


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_feed, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("engine.actors.scheduler.HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr("engine.http.admin.cache.PAUSE_SECONDS", 0.01)


class Index:
    """A policy that keeps what it is told."""

    def __init__(self) -> None:
        self.held: dict[int, bytes] = {}  # block: its space
        self.resets = 0

    def stored(self, worker: str, space: bytes, blocks: Sequence[int]) -> None:
        self.held |= dict.fromkeys(blocks, space)

    def evicted(self, worker: str, blocks: Sequence[int]) -> None:
        for block in blocks:
            del self.held[block]

    def reset(self, worker: str) -> None:
        self.held.clear()
        self.resets += 1

    async def holds(self, wanted: dict[int, bytes]) -> None:
        with anyio.fail_after(60):
            while self.held != wanted:
                await anyio.sleep(0.005)


@asynccontextmanager
async def following(url: str, index: Index, **headers: str) -> AsyncIterator[CacheFeed]:
    """A feed that runs."""
    async with aiohttp.ClientSession() as session, anyio.create_task_group() as group:
        feed = CacheFeed(url, index, session, headers)
        group.start_soon(feed.run)
        yield feed
        group.cancel_scope.cancel()


def named(text: str, salt: str = "") -> dict[int, bytes]:
    return dict.fromkeys(chained(text, space_of(salt)), space_of(salt))


async def test_it_knows_what_an_engine_caches_and_what_it_has_forgotten() -> None:
    index = Index()
    async with (
        open_house(cache_events=True) as house,
        over_http(house.front, resolve({"port": 0, "api_key": "secret"}).server) as url,
        following(url, index, Authorization="Bearer secret") as feed,
    ):
        await house.text(prompt(TEXT, max_tokens=1))
        assert len(named(TEXT)) == 5
        await index.holds(named(TEXT))
        feed.forget()
        index.held.clear()
        await index.holds(named(TEXT))  # told anew
        await house.front.flush()
        await index.holds({})


async def test_it_ends_where_a_server_tells_nothing() -> None:
    async with (
        open_house() as house,
        over_http(house.front, resolve({"port": 0}).server) as url,
        aiohttp.ClientSession() as session,
    ):
        with anyio.fail_after(60):
            await CacheFeed(url, Index(), session).run()


# ── a worker that a test plays ───────────────────────────────────────────────────────────────


class Played:
    """Answers each request for events with the next of `answers`, then with nothing more; `asked` is what each said."""

    def __init__(self, *answers: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.query["after"])
        if not self.answers:
            return web.Response(status=404)
        return await self.answers.pop(0)(request)


def change(kind: str, *blocks: int) -> dict[str, str]:
    return {"kind": kind, "space": "", "blocks": array("Q", blocks).tobytes().hex()}


def telling(*events: tuple[int, int, list[dict[str, str]]], pieces: int = 0) -> Any:
    """Answers with these events, and ends; in so many bytes at a time, if that is said."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        data = b"".join(
            b"data: %b\n\n" % json.dumps({"after": after, "number": number, "changes": changes}).encode()
            for after, number, changes in events
        )
        for begin in range(0, len(data), pieces or len(data)):
            await response.write(data[begin : begin + (pieces or len(data))])
            if pieces:
                await anyio.lowlevel.checkpoint()
        return response

    return answer


def saying(status: int, content: str = "text/plain", text: str = "") -> Any:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, content_type=content, text=text)

    return answer


async def played(*answers: Any) -> tuple[Index, Played]:
    """What a feed that runs to its end has made of these answers."""
    worker, index = Played(*answers), Index()
    app = web.Application()
    app.router.add_get("/v1/cache/events", worker.handle)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        with anyio.fail_after(60):
            await CacheFeed(str(server.make_url("/")), index, session).run()
    return index, worker


async def test_a_gap_is_seen_and_asked_for_again() -> None:
    first = telling((0, 10, [change("reset"), change("stored", 1, 2)]), (12, 13, [change("evicted", 1)]))
    index, worker = await played(first, telling((10, 12, [change("stored", 3)]), (12, 13, [change("evicted", 1)])))
    assert set(index.held) == {2, 3} and index.resets == 1
    assert worker.asked == ["0", "10", "13"]


async def test_a_lost_connection_goes_on_where_it_was() -> None:
    whole = telling((0, 4, [change("reset"), change("stored", 5)]), (4, 4, []), pieces=7)
    index, worker = await played(saying(503), whole, telling((4, 6, [change("stored", 7)])))
    assert set(index.held) == {5, 7}
    assert worker.asked == ["0", "0", "4", "6"]


@pytest.mark.parametrize(
    "answer",
    [
        saying(200, "text/event-stream", "data: {\n\n"),
        telling((0, 1, [{"kind": "odd"}])),
        telling((0, 1, [{"kind": "stored", "blocks": "x"}])),
        saying(200, "text/event-stream", ": nothing\n\n"),
    ],
)
async def test_nonsense_is_not_believed(answer: Any) -> None:
    index, worker = await played(answer, telling((0, 2, [change("stored", 5)])))
    assert set(index.held) == {5}
    assert worker.asked == ["0", "0", "2"]


@pytest.mark.parametrize("answer", [saying(404), saying(405), saying(200, "text/html", "hello")])
async def test_it_ends_quietly_where_there_is_no_such_route(answer: Any) -> None:
    index, worker = await played(answer)
    assert worker.asked == ["0"] and not index.held


async def test_an_event_without_end_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_feed, "MOST_BYTES", 1000)
    long = change("stored", *range(100))
    index, worker = await played(telling((0, 1, [long]), pieces=500), telling((0, 1, [change("stored", 5)])))
    assert set(index.held) == {5} and worker.asked == ["0", "0", "1"]
