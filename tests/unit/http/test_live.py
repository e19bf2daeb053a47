"""/live/events and `engine top`: who may look, how many, what is told, and that nobody who does not look costs any."""

import io
import json
from array import array
from collections.abc import AsyncIterator

import aiohttp
import anyio
import pytest
from http_front import FakeFront, serving
from joined_fronts import joined_fronts
from msgspec.structs import replace
from rich.console import Console
from routed import routing
from test_http_routes import Site, open_site

from engine.client.options import TopOptions
from engine.client.top import NAMES, Seen, bar, drawn, read, show
from engine.config import Config
from engine.errors import RequestError
from engine.http.page.live import MOST_VIEWERS, LiveEvent, LiveEvents, LivePages, LiveTier, heads, seconds
from engine.messages.looking import HEAD
from engine.runtime.board import Counter
from engine.runtime.front import Health

pytestmark = pytest.mark.anyio
LIVE = "/live/events"


async def told(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each event."""
    async for line in answer.content:
        if line.startswith(b"data: "):
            yield line[6:]


async def one(site: Site) -> dict[str, object]:
    async with site.session.get(LIVE) as answer:
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/event-stream")
        return json.loads(await anext(told(answer)))


async def nobody(site: Site) -> None:
    with anyio.fail_after(60):
        while site.house.front.board.total(Counter.VIEWERS):
            await anyio.sleep(0.01)


async def test_an_event_tells_what_runs() -> None:
    async with open_site(seconds=0.01) as site, anyio.create_task_group() as group:
        assert not site.house.scheduler.looking.watched
        body = {"prompt": "abcdefgh", "max_tokens": 400, "temperature": 0}
        group.start_soon(site.post, "/v1/completions", body)
        async with site.session.get(LIVE) as answer:
            events = told(answer)
            first = json.loads(await anext(events))
            assert site.house.scheduler.looking.watched
            second = json.loads(await anext(events))
        assert second["number"] == first["number"] + 1
        rows, steps = second["rows"], second["steps"]
        assert (rows["slots"], rows["prompts"], rows["phases"]) == ([0], [8], [1])
        assert rows["computed"][0] == 7 + rows["replies"][0] and rows["replies"][0] > 1
        assert steps["last"] <= second["counts"]["steps"] and steps["tokens"][-1] == steps["rows"][-1] == 1
        assert len(steps["seconds"]) == len(steps["idle"]) == len(steps["rows"])
        assert second["tree"]["heads"][0][:4] == [97, 98, 99, 100] and "s" in second["pages"]["owners"]
        actors = {each["actor"] for each in second["channels"]}
        assert actors == {"scheduler", "executor", "maker of grammar", "tokenizer", "detokenizer", "front"}
        assert (second["viewers"], second["open"], second["status"]) == (1, 1, "ready")
        group.cancel_scope.cancel()


async def test_viewers_are_few_and_share_snapshots() -> None:
    async with open_site() as site:
        answers = [await site.session.get(LIVE) for _ in range(MOST_VIEWERS)]
        numbers = {json.loads(await anext(told(answer)))["number"] for answer in answers}
        assert len(numbers) <= 2
        async with site.session.get(LIVE) as refused:
            assert refused.status == 503
            error = (await refused.json())["error"]
        assert error["code"] == "too_many_viewers" and f"at most {MOST_VIEWERS} may" in error["message"]
        for answer in answers:
            answer.close()
        await nobody(site)
        assert (await one(site))["viewers"] == 1


async def test_an_event_is_made_once_for_all_viewers_of_a_front() -> None:
    front = FakeFront()
    events, made = LiveEvents(front), await front.look()  # type: ignore[arg-type]
    first = events.event(made)
    assert events.event(made) is first
    front.state = Health("stalled", "it takes long")
    assert b'"status":"stalled"' in (second := events.event(made)) and second is not first
    assert events.event(await front.look()) is not second


def test_columns_become_lists() -> None:
    assert seconds(array("f", [0.0012345678, 0.0, 1.5]).tobytes()) == [0.001235, 0.0, 1.5]
    ids = array("i", [*range(HEAD), 5, 6, *[-1] * (HEAD - 2), *[-1] * HEAD])
    assert heads(ids.tobytes()) == [[*range(HEAD)], [5, 6], []]


async def test_viewers_of_all_fronts_count() -> None:
    async with joined_fronts(FakeFront(), FakeFront()) as joined:
        first, second = joined.sessions
        answers = [await session.get(LIVE) for session in (first, second) for _ in range(MOST_VIEWERS // 2)]
        assert {answer.status for answer in answers} == {200}
        for session in (first, second):
            async with session.get(LIVE) as refused:
                assert refused.status == 503
        answers[0].close()
        with anyio.fail_after(60):
            while joined.board.total(Counter.VIEWERS) == MOST_VIEWERS:
                await anyio.sleep(0.01)
        async with second.get(LIVE) as answer:
            assert answer.status == 200
        for answer in answers:
            answer.close()


async def test_a_server_that_drains_ends_the_stream() -> None:
    front = FakeFront()
    async with serving(front) as url, aiohttp.ClientSession(url) as session, session.get(LIVE) as answer:
        events = told(answer)
        await anext(events)
        front.draining = True
        assert len([event async for event in events]) <= 1  # and then it ends
    assert front.looks <= 2


async def test_head_gets_the_head_alone() -> None:
    async with open_site(cache_events=True) as site, aiohttp.TCPConnector(limit=1) as connector:
        async with aiohttp.ClientSession(site.url, connector=connector) as session:
            for path in (LIVE, "/v1/cache/events", "/version"):
                async with session.head(path) as answer:
                    assert answer.status == 200
            async with session.get("/version") as answer:  # over the same connection
                assert answer.status == 200 and "version" in await answer.json()
        await nobody(site)


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
async def test_without_keys_only_this_machine_looks(header: str) -> None:
    async with open_site() as site, site.session.get(LIVE, headers={header: "192.0.2.1"}) as answer:
        assert answer.status == 403 and "start the server with --api-key" in (await answer.json())["error"]["message"]
    async with open_site(api_key="sesame") as site:
        async with site.session.get(LIVE, headers={header: "192.0.2.1"}) as answer:
            assert answer.status == 200
        async with site.session.get(LIVE, headers={"Authorization": "Bearer guess"}) as answer:
            assert answer.status == 401


async def test_the_page_says_whether_a_key_is_asked_for() -> None:
    for key, said in ((None, '<html lang="en">'), ("sesame", '<html lang="en" data-keyed>')):
        async with (
            open_site(api_key=key) as site,
            aiohttp.ClientSession(site.url) as session,
            session.get("/") as answer,
        ):
            assert answer.status == 200 and said in await answer.text()
            assert "'unsafe" not in answer.headers["Content-Security-Policy"]


async def test_a_router_has_the_page_and_no_live_view() -> None:
    async with serving(FakeFront()) as worker, routing(worker) as (url, _), aiohttp.ClientSession(url) as session:
        async with session.get("/") as answer:
            assert '<html lang="en" data-router>' in await answer.text()
        async with session.get(LIVE) as answer:
            assert answer.status == 404 and "a worker's address" in (await answer.json())["error"]["message"]


async def test_top_draws_what_the_page_shows() -> None:
    async with open_site(seconds=0.01) as site, anyio.create_task_group() as group:
        group.start_soon(site.post, "/v1/completions", {"prompt": "abcdefgh", "max_tokens": 400, "temperature": 0})
        async with site.session.get(LIVE) as answer:
            events = told(answer)
            before = read(await anext(events))
            after = read(await anext(events))
        group.cancel_scope.cancel()
    lines = text_of(Seen(after.event, before.at + 2.0), before)
    steps = after.event.counts["steps"] - before.event.counts["steps"]
    assert f"steps/s {steps / 2:.0f}" in lines[0] and "running 1" in lines[0] and "waiting 0" in lines[0]
    assert "ms, 1 row, 1 token" in lines[1] and lines[2].startswith("batch") and "1 decode" in lines[2]
    assert any(line.startswith("tree") and "1 node, 2 pages, 2 of them used by requests" in line for line in lines)
    assert "tokens/s" not in "".join(text_of(after, None)[:1])


def text_of(seen: Seen, before: Seen | None) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(drawn(seen, before, 100))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


async def test_top_draws_tiers_by_what_becomes_of_their_pages() -> None:
    async with serving(FakeFront()) as url, aiohttp.ClientSession(url) as session, session.get(LIVE) as answer:
        event = read(await anext(told(answer))).event
    assert event.tiers == []
    tiers = [
        LiveTier("host", 4096, 1204, LivePages(1, "aaic....")),
        LiveTier("store", 0, 7, LivePages(1, "cc")),
    ]
    counts = {"prompt_tokens_total": 8, "cached_tokens_total": 2}
    lines = text_of(Seen(replace(event, tiers=tiers, counts=counts, ceiling=0.5), 0.0), None)
    assert "hits 25.0% of at most 50.0%" in lines[0]
    host, store = (next(line for line in lines if line.startswith(tier)) for tier in ("host", "store"))
    room = 100 - NAMES - 2 - len("1204 of 4096 ")
    shades = [host.count(shade) for shade in "▓█▒░"]
    assert shades == pytest.approx([room * share / 8 for share in (2, 1, 1, 4)], abs=1) and sum(shades) == room
    assert host.split()[1:4] == ["1204", "of", "4096"] and "7 pages ▒▒▒▒" in store and "░" not in store


def test_a_bar_of_top_is_as_wide_as_there_is_room() -> None:
    for room in range(100):
        assert len(bar("raskioc.", room)) == len(bar("rrc.", room)) == room
    assert bar("", 9).plain == ""


async def test_top_prints_one_look_and_says_why_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    async with open_site() as site:
        await anyio.to_thread.run_sync(show, TopOptions(url=site.url, once=True), Config())
    assert "running 0" in capsys.readouterr().out
    async with open_site(api_key="sesame") as site:
        with pytest.raises(RequestError, match="API key is missing"):
            await anyio.to_thread.run_sync(show, TopOptions(url=site.url, once=True), Config())


def test_events_are_what_the_document_says() -> None:
    assert {"counts", "rows", "steps", "pages", "tree", "channels"} <= {*LiveEvent.__struct_fields__}
