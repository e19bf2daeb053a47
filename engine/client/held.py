"""`engine cache`: what a server's KV cache holds, in the terminal, and its end.

    tier     pages      bytes   of        in use
    device     812   1.2 GiB   4.0 GiB       31

Below it the sessions of the API key. Left out: which texts are held, which /v1/cache/events tells routers.
"""

import anyio
import msgspec
from msgspec import Struct
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.client.client import Client
from engine.client.options import HeldOptions
from engine.config import Config
from engine.errors import counted
from engine.http.keys import own_key
from engine.options.sizes import show_size

MOST_SHOWN = 50  # sessions


class Tier(Struct, frozen=True):
    """As the server tells it."""

    name: str
    pages: int
    in_use: int
    bytes: int
    bound: int


class Cache(Struct, frozen=True):
    """As the server tells it, at /v1/cache."""

    page_size: int
    tiers: list[Tier]
    sessions: int
    session_pages: int


class Session(Struct, frozen=True):
    """As the server tells it."""

    id: str
    pages: int
    tokens: int
    running: int
    idle_seconds: float
    seconds_left: float
    below: int = 0


class Sessions(Struct, frozen=True):
    """As the server tells it, at /v1/sessions."""

    data: list[Session]


class Flushed(Struct, frozen=True):
    """As the server tells it, at /flush_cache."""

    freed: int
    in_use: int


def show(options: HeldOptions, config: Config) -> int:
    """Print it. Raises RequestError for what the server refuses, ConfigError where no server answers."""
    cache, sessions = anyio.run(fetch, options, own_key(config.server))
    Console().print(drawn(cache, sessions))
    return 0


def clear(options: HeldOptions, config: Config) -> int:
    """Forget all that no running request uses, and print how much that was. Raises as `show` does."""
    flushed = anyio.run(flush, options, own_key(config.server))
    print(f"{counted(flushed.freed, 'page')} freed; {flushed.in_use} are in use")
    return 0


async def fetch(options: HeldOptions, key: str | None) -> tuple[Cache, list[Session]]:
    """What the server says of its cache, and of the sessions of the API key."""
    query = {} if options.cache_salt is None else {"cache_salt": options.cache_salt}
    async with Client(options.url, api_key=key, model="any", timeout=60.0) as client:
        cache = msgspec.json.decode(await client.get("/v1/cache"), type=Cache)
        return cache, msgspec.json.decode(await client.get("/v1/sessions", query), type=Sessions).data


async def flush(options: HeldOptions, key: str | None) -> Flushed:
    """Have the server forget what it holds."""
    async with Client(options.url, api_key=key, model="any", timeout=60.0) as client:
        return msgspec.json.decode(await client.post("/flush_cache"), type=Flushed)


def drawn(cache: Cache, sessions: list[Session]) -> Group:
    """The tables, and a line between them."""
    tiers = _table("tier", "pages", "bytes", "of", "in use")
    for tier in cache.tiers:
        tiers.add_row(tier.name, str(tier.pages), show_size(tier.bytes), show_size(tier.bound), str(tier.in_use))
    all_told, pages = counted(cache.sessions, "session"), counted(cache.session_pages, "page")
    about = f"{all_told} with {pages} of {cache.page_size} tokens; {len(sessions)} of this key and salt"
    listed = _table("session", "pages", "below", "tokens", "running", "idle", "left")
    for session in sessions[:MOST_SHOWN]:
        times = f"{session.idle_seconds:.0f} s", f"{session.seconds_left:.0f} s"
        numbers = session.pages, session.below, session.tokens, session.running
        listed.add_row(session.id, *map(str, numbers), *times)
    parts: list[RenderableType] = [tiers, Text(about)]
    if sessions:
        parts.append(listed)
    if len(sessions) > MOST_SHOWN:
        parts.append(Text(f"and {len(sessions) - MOST_SHOWN} more"))
    return Group(*parts)


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
