"""/v1/cache/events on a whole engine without a device: what is told is what a router would ask for."""

import itertools
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import pytest
from house import House, open_house
from real_server import over_http

from engine.config import resolve
from engine.conversation.canonical import arrival_text, chained, space_of

pytestmark = pytest.mark.anyio
PATH = "/v1/cache/events"
CHAT = "/v1/chat/completions"
TEXT = "What a router is told of a cache is what a router would ask for. " * 10


@asynccontextmanager
async def engine(**options: Any) -> AsyncIterator[tuple[House, aiohttp.ClientSession]]:
    """An engine that tells of its cache."""
    given = {"cache_events": True, "max_model_len": 4000, **options}
    async with (
        open_house(**given) as house,
        over_http(house.front, resolve({"port": 0}).server) as url,
        aiohttp.ClientSession(url) as session,
    ):
        yield house, session


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat tells a reader that there is nothing more."""
    monkeypatch.setattr("engine.actors.scheduler.HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr("engine.http.admin.cache.PAUSE_SECONDS", 0.01)


class Told:
    """What a client has read."""

    def __init__(self) -> None:
        self.number = 0
        self.held: set[str] = set()
        self.kinds: list[str] = []

    async def read(self, session: aiohttp.ClientSession) -> None:
        """Ask, and read until nothing more has changed."""
        async with session.get(PATH, params={"after": self.number}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            async for line in response.content:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    assert event["after"] == self.number
                    self.number = event["number"]
                    for change in event["changes"]:
                        self.take(**change)
                    if not event["changes"]:
                        return

    def take(self, kind: str, space: str, blocks: str) -> None:
        self.kinds.append(kind)
        found = {blocks[at : at + 16] for at in range(0, len(blocks), 16)}
        match kind:
            case "stored":
                assert not self.held & found
                self.held |= found
            case "evicted":
                assert found <= self.held
                self.held -= found
            case "reset":
                self.held.clear()


def digits(text: str, salt: str = "") -> Sequence[str]:
    return [block.to_bytes(8, "little").hex() for block in chained(text, space_of(salt))]


async def post(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> Any:
    async with session.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_blocks_come_and_go_by_the_names_that_a_router_has_for_them() -> None:
    told = Told()
    async with engine(pages=512) as (_, session):
        await told.read(session)
        assert told.held == set() and told.kinds[0] == "reset"
        body = {"prompt": TEXT, "max_tokens": 1}
        await post(session, "/v1/completions", body)
        await told.read(session)
        known = digits(arrival_text("/v1/completions", body))
        assert len(known) == len(TEXT) // 128 and told.held == set(known)
        await post(session, "/v1/completions", {**body, "cache_salt": "mine"})
        await told.read(session)
        salted = digits(TEXT, "mine")
        assert told.held == {*known, *salted} and not set(known) & set(salted)
        assert "evicted" not in told.kinds
        await post(session, "/flush_cache", {})
        await told.read(session)
        assert told.held == set() and told.kinds.count("evicted") == 1


async def test_a_conversation_is_named_as_it_grows() -> None:
    told = Told()
    async with engine(max_step_tokens=4000) as (_, session):
        messages = [{"role": "system", "content": "Be short. " * 20}, {"role": "user", "content": TEXT}]
        body = {"messages": messages, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        reply = await post(session, CHAT, body)
        said = reply["choices"][0]["message"]["content"]
        await told.read(session)
        first = digits(arrival_text(CHAT, body))
        assert set(first[:-1]) <= told.held <= set(first)
        grown = {
            **body,
            "messages": [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": TEXT}],
        }
        await post(session, CHAT, grown)
        await told.read(session)
        second = digits(arrival_text(CHAT, grown))
        assert second[: len(first)] == first and len(second) > len(first) + 4
        assert set(second[:-1]) <= told.held <= set(second)


async def test_what_a_router_expects_is_what_is_cached() -> None:
    """Prompts that share beginnings, in a cache that has room for a few: leading blocks that are held are cached."""
    rng, told, evicted = random.Random(5), Told(), 0
    texts = ["".join(rng.choices("abcdefgh", k=300)) for _ in range(4)]
    async with engine(pages=512, page_size=4) as (_, session):  # of a token a character
        for turn in range(30):
            await told.read(session)
            prompt = "".join(rng.choice(texts) for _ in range(rng.randint(1, 3)))[: rng.randint(200, 900)]
            expected = 128 * sum(1 for _ in itertools.takewhile(told.held.__contains__, digits(prompt)))
            reply = await post(session, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
            cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            most = (len(prompt) - 1) // 4 * 4  # a last token is computed in any case
            assert min(expected, most) <= cached < expected + 128 + 4, turn
            evicted = told.kinds.count("evicted")
    assert evicted > 5


SYSTEM = "You are asked what a cache holds, and say so in short. " * 4
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TEXT}]},
    "/v1/responses": {"instructions": SYSTEM, "input": [{"role": "user", "content": TEXT}], "store": False},
    "/v1/messages": {"system": SYSTEM, "messages": [{"role": "user", "content": TEXT}]},
    "/generate": {"text": TEXT},
}


@pytest.mark.parametrize("path", BODIES)
async def test_each_api_has_the_names_that_a_router_makes_of_its_body(path: str) -> None:
    told = Told()
    most = {"/generate": {"sampling_params": {"max_new_tokens": 40}}, "/v1/responses": {"max_output_tokens": 40}}
    async with engine() as (_, session):
        body = BODIES[path] | most.get(path, {"max_tokens": 40})
        await post(session, path, body)
        await told.read(session)
    known = digits(arrival_text(path, body))
    assert len(known) >= 5 and told.held == set(known)
    assert path == "/generate" or known == digits(arrival_text(CHAT, BODIES[CHAT]))


async def test_a_reader_that_missed_nothing_is_told_what_is_new_and_any_other_all() -> None:
    one, other = Told(), Told()
    async with engine() as (_, session):
        await post(session, "/v1/completions", {"prompt": TEXT, "max_tokens": 1})
        await one.read(session)
        await post(session, "/v1/completions", {"prompt": "So " + TEXT, "max_tokens": 1})
        await one.read(session)
        assert one.kinds[0] == "reset" and set(one.kinds[1:]) == {"stored"}
        await other.read(session)
        assert other.kinds == ["reset", "stored"] and other.held == one.held == {*digits(TEXT), *digits("So " + TEXT)}
        other.number, other.kinds = other.number + 1, []  # of another life of the engine
        await other.read(session)
        assert other.kinds == ["reset", "stored"] and other.held == one.held


async def test_a_worker_that_is_lost_takes_its_cache_with_it() -> None:
    told = Told()
    async with engine() as (house, session):
        await post(session, "/v1/completions", {"prompt": TEXT, "max_tokens": 1})
        await told.read(session)
        await house.executor.lose("a cable came off")
        with anyio.fail_after(60):
            while not house.front.health().ok:
                await anyio.sleep(0.01)
        await told.read(session)
        assert told.held == set() and told.kinds[-1] == "reset"


async def test_nothing_is_told_unless_it_is_asked_for() -> None:
    async with open_house() as house, over_http(house.front, resolve({"port": 0}).server) as url:
        async with aiohttp.ClientSession(url) as session, session.get(PATH) as response:
            assert response.status == 404
            assert "--cache-events" in (await response.json())["error"]["message"]
        assert house.scheduler.followers is None


async def test_the_stream_ends_where_the_server_does() -> None:
    async with engine() as (house, session), session.get(PATH) as response:
        assert (await response.content.readline()).startswith(b"data: ")
        house.front.draining = True
        with anyio.fail_after(60):
            await response.content.read()
            async with session.get(PATH) as late:
                assert (await late.content.read()).count(b"data: ") == 1
