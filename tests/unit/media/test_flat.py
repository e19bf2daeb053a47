"""However many pictures come, a front and a core hold as much afterwards as after a few: what their bounds say."""

import asyncio
from typing import Any

import pytest
from fake_media import encoded, picture
from house import House
from test_http import post
from test_media_apis import data_url, seeing, shown, user

from engine.media import store as media_store
from engine.sched import assets
from engine.sched.looking import parts_of

pytestmark = pytest.mark.anyio
SIZE = 64 * 48 * 3  # bytes of a picture's pixels
TOKENS = 4  # of it
KNOWN, KEPT = 5, 3  # pictures that the core and the front keep


def held(house: House) -> dict[str, int]:
    """What the tables of front and core have, and what they have told the device to have."""
    store, room, logic = house.front.media, house.scheduler.room, house.scheduler.scheduler
    assert store is not None and logic is not None
    (part,) = parts_of(logic)
    pool: Any = store._ask.__self__  # type: ignore[attr-defined]
    return {
        "prepared": len(store._prepared),
        "prepared bytes": store.kept,
        "open": store.open + len(store._uses) + len(store._open),
        "underway": len(store._made_once._flights) + len(store._read_once._flights) + pool._held + len(pool._queue),
        "known": len(room._assets),
        "known bytes": sum(len(asset.payload) for asset in room._assets.values()),
        "numbers": len(room._by_number),
        "waiting": len(room._requests),
        "on the device": len(house.executor.loaded) - len(house.executor.dropped),
        "encoded": len(part.encoder._held),
        "embeddings": part.encoder._tokens,
        "encoding": len(part.encoder._making),
        "live": len(logic.live.by_rid),
    }


async def show(house: House, url: str, first: int, count: int, **more: Any) -> None:
    """`count` different pictures at once, in a request each."""
    pictures = [encoded(picture(shade=first + index)) for index in range(count)]
    assert len(set(pictures)) == count
    bodies = [{"messages": user(shown(data_url(each)), "a"), "max_tokens": 1, **more} for each in pictures]
    replies = await asyncio.gather(*[post(f"{url}/v1/chat/completions", body) for body in bodies])
    assert {status for status, _ in replies} == {200}
    await house.settled()
    async with house.scheduler._turn:  # whatever it is at, it has sent
        while house.executor.inbox:
            await asyncio.sleep(0.002)


async def test_many_pictures_leave_what_few_do(monkeypatch: pytest.MonkeyPatch) -> None:
    room_for_some = KEPT * (SIZE + media_store.BESIDE)
    known = KNOWN * (SIZE + assets.BESIDE)
    async with seeing(monkeypatch, media_memory=room_for_some, media_known_memory=known, pages=32) as (house, url):
        seen = []
        for first in range(0, 36, 6):
            await show(house, url, first, 6)
            seen.append(held(house))
    wanted = {
        "prepared": KEPT,
        "prepared bytes": room_for_some,
        "open": 0,
        "underway": 0,
        "known": KNOWN,
        "known bytes": KNOWN * SIZE,
        "numbers": KNOWN,
        "waiting": 0,
        "on the device": KNOWN,
        "encoded": KNOWN,
        "embeddings": KNOWN * TOKENS,
        "encoding": 0,
        "live": 0,
    }
    assert seen == [wanted] * 6


async def test_what_was_in_use_goes_once_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are shown at the same time, so none may go before its request ends; and no other comes after them."""
    async with seeing(monkeypatch, seconds=0.5, media_known_memory=2 * (SIZE + assets.BESIDE)) as (house, url):
        showing = asyncio.ensure_future(show(house, url, 0, 8, max_tokens=40, ignore_eos=True))
        while held(house)["on the device"] < 8:
            await asyncio.sleep(0.01)
        assert held(house)["known bytes"] == 8 * SIZE
        house.executor.seconds = 0.0  # until now none could end before the last was shown
        await showing
        found = held(house)
    assert (found["known"], found["on the device"], found["encoded"]) == (2, 2, 2)
