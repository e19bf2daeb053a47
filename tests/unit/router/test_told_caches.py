"""Two real engines that tell what they cache, behind a real router: a conversation goes where it is cached."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import anyio
import pytest
from real_server import over_http
from routed import routing

from engine.config import resolve
from engine.conversation.canonical import BLOCK
from engine.router.router import Router
from engine.runtime.launch import open_front

pytestmark = pytest.mark.anyio
SYSTEM = "You are a patient teacher of geography. Answer in one short sentence. " * 6
QUESTIONS = ("Name three rivers.", "Which of them is the longest?", "Where does it end?")


@asynccontextmanager
async def fleet() -> AsyncIterator[tuple[str, Router]]:
    """A router of two engines that tell what they cache."""
    config = resolve({"model": "echo", "max_model_len": 1024, "port": 0, "threads": 1, "cache_events": True})
    async with AsyncExitStack() as stack:
        fronts = [await stack.enter_async_context(open_front(config)) for _ in range(2)]  # which start together
        urls = []
        for front in fronts:
            await front.ready()
            urls.append(await stack.enter_async_context(over_http(front, config.server)))
        yield await stack.enter_async_context(routing(*urls, policy="cache_aware"))


async def test_a_conversation_goes_where_it_is_cached() -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    async with fleet() as (url, router), aiohttp.ClientSession() as session:

        async def asked(path: str) -> dict[str, Any]:
            body = {"messages": messages, "max_tokens": 8, "temperature": 0}
            async with session.post(url + path, json=body) as answer:
                found: dict[str, Any] = await answer.json()
                assert answer.status == 200, found
                return found

        home, characters = None, 0
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            where = await asked("/v1/route")  # at once: what was just answered may not be told yet
            assert home in (None, where["worker"]) and where["matched"] == characters // BLOCK * BLOCK
            answer = await asked("/v1/chat/completions")
            messages.append(answer["choices"][0]["message"])
            (home,) = [each.url for each in router.fleet.workers.values() if each.counts.sent]
            assert bool(characters) == bool(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            characters = where["characters"]
        assert home is not None
        async with session.post(f"{home}/flush_cache") as flushed:
            assert flushed.status == 200
        with anyio.fail_after(60):
            while (await asked("/v1/route"))["matched"]:  # until it is told
                await anyio.sleep(0.02)
