"""What the cache holds: how much in each tier (/v1/cache), and which blocks of texts, told as it changes, for routers
(/v1/cache/events).

A block is named by the hash that a router makes of the same text (engine/conversation/canonical.py). Changes are
numbered. A reader says which number it has; if the changes after that are not known any more, it is told all that is
held. A stream ends for good only with the server: whoever lost it asks again with the last number that it read.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Final

import anyio
from aiohttp import web
from msgspec import Meta

from engine.config import CacheOptions
from engine.errors import RequestError
from engine.http.openapi import Route
from engine.http.service import SERVICE
from engine.http.sse import data_event, send_events
from engine.http.wire import Body, Reply, json_response, to_json
from engine.messages.cache import CacheChanges, Kind
from engine.messages.control import Stats
from engine.runtime.front import Front
from engine.runtime.tiers import tier_sizes

PAUSE_SECONDS: Final = 0.1  # between two events


class CacheQuery(Body):
    """`after` is the number of the last event read; without it the first event tells all that is held."""

    after: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class CacheChangeReply(Reply, frozen=True):
    """`blocks` are hashes of 16 hexadecimal digits each, in a row: the bytes of the digests, in the order of the text.
    `space` is in hexadecimal digits too. Blocks that were evicted have none; a reset has no blocks and says that
    nothing is held."""

    kind: Kind
    space: str
    blocks: str


class CacheEvent(Reply, frozen=True):
    """The changes since the event with the number `after`, in their order; none, about once a second, where nothing
    has changed."""

    after: int
    number: int
    changes: list[CacheChangeReply]


class TierReply(Reply, frozen=True):
    """A place for pages: so many lie there, of `bytes` together, of which it holds at most `bound` bytes. Running
    requests use `in_use` of them."""

    name: str
    pages: int
    in_use: int
    bytes: int
    bound: int


class CacheReply(Reply, frozen=True):
    """Of each tier from the device on down; a page holds `page_size` tokens. `session_pages` of them are those of
    `sessions`."""

    page_size: int
    tiers: list[TierReply]
    sessions: int
    session_pages: int


async def cache(request: web.Request) -> web.Response:
    """Tell how much of the KV cache is held, by tier and by sessions. POST /flush_cache forgets it."""
    front = request.app[SERVICE].front
    stats, info = front.stats, front.info
    size, page_bytes = (0, 0) if info is None else (info.page_size, info.page_size * info.kv_bytes_per_token)
    tiers = tiers_held(stats, page_bytes, front.config.cache)
    return json_response(CacheReply(size, tiers, stats.sessions, stats.session_pages))


def tiers_held(stats: Stats, page_bytes: int, options: CacheOptions) -> list[TierReply]:
    """What lies on the device, and below it as `options` say."""
    held, in_use = stats.pages - stats.pages_free, stats.pages - stats.pages_free - stats.pages_cached
    tiers = [TierReply("device", held, in_use, held * page_bytes, stats.pages * page_bytes)]
    if (below := stats.tiers) is not None and (sizes := tier_sizes(options)) is not None:
        tiers.append(TierReply("host", below.host_used, 0, below.host_used * page_bytes, below.host_pages * page_bytes))
        if sizes.store:
            tiers.append(TierReply("disk", below.store_pages, 0, below.store_bytes, sizes.store))
    return tiers


async def cache_events(request: web.Request, query: CacheQuery) -> web.StreamResponse:
    """Tell which blocks of texts come into the cache and leave it; the server needs --cache-events for it."""
    front = request.app[SERVICE].front
    if not front.config.cache.cache_events:
        message = "this server does not tell what it caches; start it with --cache-events"
        raise RequestError(message, code="not_supported", status=404)
    return await send_events(request, _followed(front, query.after), _CacheEvents())


async def _followed(front: Front, after: int) -> AsyncIterator[CacheChanges]:
    while True:
        changes = await front.cache_changes(after)
        after = changes.number
        yield changes
        if front.draining:
            return
        await anyio.sleep(PAUSE_SECONDS)


class _CacheEvents:
    def event(self, told: CacheChanges) -> bytes:
        changes = [CacheChangeReply(each.kind, each.space.hex(), each.hashes.hex()) for each in told.changes]
        return data_event(to_json(CacheEvent(told.after, told.number, changes)))


ROUTES = (
    Route("GET", "/v1/cache", cache, gives=CacheReply),
    Route("GET", "/v1/cache/events", cache_events, takes=CacheQuery, events=(CacheEvent,), done=False),
)
