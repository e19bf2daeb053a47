"""Sessions over HTTP: named in a body or in a header, and listed and ended by those alone who named them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import pytest
from house import House, open_house
from http_front import FakeFront, serving
from real_server import over_http

from engine.client import held
from engine.client.options import HeldOptions
from engine.config import CacheOptions, resolve
from engine.http.admin.cache import TierReply, tiers_held
from engine.http.keys import digest_of
from engine.messages.control import Stats, TierStats
from engine.messages.sessions import ProgramUse, SessionUse

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "Hi."}]
ROUTES = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "Hi."},
    "/v1/responses": {"input": "Hi."},
    "/v1/messages": {"messages": HI, "max_tokens": 4},
    "/generate": {"text": "Hi."},
}
TEXT = {"prompt": "one two three four five six seven eight nine ten " * 4, "max_tokens": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of sessions come with heartbeats."""
    monkeypatch.setattr("engine.actors.scheduler.HEARTBEAT_SECONDS", 0.05)


@asynccontextmanager
async def engine(**options: Any) -> AsyncIterator[tuple[House, aiohttp.ClientSession]]:
    """A whole engine without a device."""
    server = resolve({"port": 0, **options}).server
    async with (
        open_house(max_model_len=4000) as house,
        over_http(house.front, server) as url,
        aiohttp.ClientSession(url) as session,
    ):
        yield house, session


async def asked(
    session: aiohttp.ClientSession, method: str, path: str, body: Any = None, key: str = "", **headers: str
) -> tuple[int, Any]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    sent |= {"Authorization": f"Bearer {key}"} if key else {}
    async with session.request(method, path, json=body, headers=sent) as response:
        return response.status, await response.json()


async def listed(session: aiohttp.ClientSession, query: str = "", key: str = "") -> dict[str, dict[str, Any]]:
    status, said = await asked(session, "GET", f"/v1/sessions{query}", key=key)
    assert status == 200 and said["object"] == "list"
    return {each["id"]: each for each in said["data"]}


# ── how a request names its session ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ROUTES)
async def test_a_request_names_its_session_in_its_body_or_in_a_header(path: str) -> None:
    front = FakeFront()
    async with serving(front) as url, aiohttp.ClientSession(url) as session:
        body = ROUTES[path]
        for sent, headers in (
            ({"session_id": "a b"}, {}),
            ({}, {"X_Session_Id": "a b"}),
            ({"session_id": "a b"}, {"X_Session_Id": "a b"}),
        ):
            status, said = await asked(session, "POST", path, {**body, **sent}, **headers)
            assert status == 200, said
        assert (await asked(session, "POST", path, {**body, "session_id": None}))[0] == 200
        use = SessionUse(b"", "a b", 3600.0)
        assert [job.session for job in front.asked] == [use, use, use, None]
        for sent, headers, param in (
            ({"session_id": ""}, {}, "session_id"),
            ({"session_id": "ä"}, {}, "session_id"),
            ({}, {"X_Session_Id": "x" * 257}, "X-Session-Id"),
            ({"session_id": "a"}, {"X_Session_Id": "b"}, "session_id"),
        ):
            status, said = await asked(session, "POST", path, {**body, **sent}, **headers)
            assert status == 400 and param in said["error"]["message"], said
        assert len(front.asked) == 4


async def test_the_owner_is_the_key_where_keys_are_asked_for() -> None:
    front = FakeFront()
    async with serving(front, api_key=("one", "two")) as url, aiohttp.ClientSession(url) as session:
        for key in ("one", "two"):
            await asked(session, "POST", "/generate", {"text": "x", "session_id": "s"}, key=key)
        await asked(session, "POST", "/generate", {"text": "x", "session_id": "s"}, x_api_key="two")
    owners = [job.session.owner for job in front.asked if job.session is not None]
    assert owners == [digest_of("one"), digest_of("two"), digest_of("two")] and owners[0] != owners[1]
    front = FakeFront()
    async with serving(front) as url, aiohttp.ClientSession(url) as session:
        await asked(session, "POST", "/generate", {"text": "x", "session_id": "s"}, key="anything")
    assert front.asked[0].session == SessionUse(b"", "s", 3600.0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_a_program_is_the_keys_that_named_it(path: str) -> None:
    front = FakeFront()
    async with serving(front, api_key=("one", "two")) as url, aiohttp.ClientSession(url) as session:
        for key in ("one", "two"):
            await asked(session, "POST", path, {**ROUTES[path], "program": "p"}, key=key)
            said = await asked(session, "POST", "/v1/programs/end", {"programs": ["p", "q"]}, key=key)
            assert said == (200, {"ended": 2})
        await asked(session, "POST", "/v1/programs/end", {"programs": ["p"], "cache_salt": "x"}, key="two")
        status, said = await asked(session, "POST", "/v1/programs/end", {"programs": ["p", ""]}, key="two")
        assert status == 400 and said["error"]["param"] == "programs[1]"
    one, two = digest_of("one"), digest_of("two")
    assert [job.program for job in front.asked] == [ProgramUse(one, "p"), ProgramUse(two, "p")]
    assert front.ended == [(one, "", "p"), (one, "", "q"), (two, "", "p"), (two, "", "q"), (two, "x", "p")]


# ── on a whole engine ────────────────────────────────────────────────────────────────────────


async def test_a_session_is_listed_and_ended() -> None:
    async with engine() as (house, session):
        assert await listed(session) == {}
        await asked(session, "POST", "/v1/completions", {**TEXT, "session_id": "a/b"})
        await asked(session, "POST", "/v1/completions", TEXT, X_Session_Id="second")
        found = await listed(session)
        assert list(found) == ["second", "a/b"]
        one, size = found["a/b"], house.front.info.page_size
        assert one["pages"] == len(TEXT["prompt"]) // size and one["tokens"] == one["pages"] * size
        assert one["below"] == 0  # there is no tier
        assert one["running"] == 0 and 0 <= one["idle_seconds"] < 60 and 3500 < one["seconds_left"] <= 3600
        cache = await asked(session, "GET", "/v1/cache")
        assert cache[1]["sessions"] == 2 and cache[1]["page_size"] == size
        for id in ("a%2Fb", "second"):
            status, said = await asked(session, "DELETE", f"/v1/sessions/{id}")
            assert (status, said["object"], said["deleted"]) == (200, "session", True)
        assert said["id"] == "second" and await listed(session) == {}
        status, said = await asked(session, "DELETE", "/v1/sessions/second")
        assert (status, said["error"]["code"], said["error"]["param"]) == (404, "session_not_found", "session_id")
        assert (await asked(session, "DELETE", "/v1/sessions/%C3%A4"))[0] == 400


async def test_nobody_sees_a_session_of_another_key_or_salt() -> None:
    async with engine(api_key=("one", "two")) as (_, session):
        await asked(session, "POST", "/v1/completions", {**TEXT, "session_id": "s"}, key="one")
        await asked(session, "POST", "/v1/completions", {**TEXT, "session_id": "s", "cache_salt": "x"}, key="two")
        assert (
            list(await listed(session, key="one")) == ["s"] == list(await listed(session, "?cache_salt=x", key="two"))
        )
        assert await listed(session, key="two") == {} == await listed(session, "?cache_salt=x", key="one")
        assert (await asked(session, "DELETE", "/v1/sessions/s", key="two"))[0] == 404
        assert (await asked(session, "DELETE", "/v1/sessions/s?cache_salt=x", key="one"))[0] == 404
        assert (await asked(session, "GET", "/v1/sessions"))[0] == 401
        assert (await asked(session, "DELETE", "/v1/sessions/s?cache_salt=x", key="two"))[0] == 200
        assert (await asked(session, "DELETE", "/v1/sessions/s", key="one"))[0] == 200
        assert (await asked(session, "GET", "/v1/sessions?cache_salt=", key="one"))[0] == 400


async def test_a_program_is_ended_by_its_key_alone() -> None:
    async with engine(api_key=("one", "two")) as (house, session):
        await asked(session, "POST", "/v1/completions", {**TEXT, "program": "p", "cache_salt": "x"}, key="one")
        for key, salt, left in (("two", "x", True), ("one", "y", True), ("one", "x", False)):
            body = {"programs": ["p"], "cache_salt": salt}
            assert (await asked(session, "POST", "/v1/programs/end", body, key=key))[0] == 200
            await listed(session, key=key)  # which is answered after that
            assert bool(house.scheduler.scheduler._pages.pins.nodes()) == left


async def test_what_is_held_is_shown_and_cleared() -> None:
    async with engine() as (house, session):
        await asked(session, "POST", "/v1/completions", {**TEXT, "session_id": "mine"})
        with anyio.fail_after(60):
            while house.front.stats.running or not house.front.stats.session_pages:
                await anyio.sleep(0.01)
        options = HeldOptions(url=str(session._base_url))
        cache, sessions = await held.fetch(options, None)
        (device,) = cache.tiers
        info, pages = house.front.info, sessions[0].pages
        page_bytes = info.page_size * info.kv_bytes_per_token
        assert device == held.Tier("device", pages, 0, pages * page_bytes, info.pages * page_bytes)
        assert (cache.sessions, cache.session_pages, sessions[0].id) == (1, pages, "mine")
        assert await held.flush(options, None) == held.Flushed(pages, 0)
        cache, sessions = await held.fetch(options, None)
        assert cache.tiers[0].pages == cache.session_pages == sessions[0].pages == 0  # at once, not a heartbeat later
        assert (await held.fetch(HeldOptions(url=options.url, cache_salt="x"), None))[1] == []
        async with session.get("/metrics") as response:
            page = await response.text()
        assert "engine_sessions 1.0" in page and "engine_pins_released_total" in page


async def test_what_lies_below_the_device_is_shown() -> None:
    options = CacheOptions(kv_host=2**20, kv_disk="/pages:2MiB")
    below = TierStats(host_pages=16, host_used=5, store_pages=7, store_bytes=7000)
    stats = Stats("ready", pages=8, pages_free=2, pages_cached=5, tiers=below)
    assert tiers_held(stats, 1000, options) == [
        TierReply("device", 6, 1, 6000, 8000),
        TierReply("host", 5, 0, 5000, 16_000),
        TierReply("disk", 7, 0, 7000, 2 << 20),
    ]
    assert len(tiers_held(stats, 1000, CacheOptions(kv_host=2**20))) == 2
