"""Follows what one worker tells of its cache, and tells a routing policy.

    GET /v1/cache/events?after=N ──> stored, evicted, reset ──> the policy
         ^                  │
         └─ a gap, or lost ─┘  asked again with the last number, after a pause that grows

A worker without such a route is another server, or does not run with --cache-events: then there is nothing to follow.
What was known stays while a worker does not answer; whoever resets the policy meanwhile also says `forget`, so that the
worker tells all it holds. Left out: whether a worker lives (health), and what a policy makes of blocks.
"""

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, Literal, Protocol

import aiohttp
import msgspec
from msgspec import Struct

log = logging.getLogger("engine.router")

PATH: Final = "/v1/cache/events"
NO_ROUTE: Final = (404, 405, 501)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two connections
SILENT_SECONDS: Final = 15.0  # a worker says something each second
MOST_BYTES: Final = 1 << 26  # of one event: the blocks of a cache of 500 million tokens take as much


class Change(Struct, frozen=True):
    kind: Literal["stored", "evicted", "reset"]
    space: str = ""
    blocks: str = ""


class Event(Struct, frozen=True):
    """As /v1/cache/events tells it: engine/http/admin/cache.py."""

    after: int
    number: int
    changes: list[Change]


EVENT: Final = msgspec.json.Decoder(Event)


class Policy(Protocol):
    """What of a RoutingPolicy is told."""

    def stored(self, worker: str, space: bytes, blocks: Sequence[int], /) -> None: ...
    def evicted(self, worker: str, blocks: Sequence[int], /) -> None: ...
    def reset(self, worker: str, /) -> None: ...


class CacheFeed:
    """What the worker at the URL `worker` tells. `headers` carry its key, if it asks for one."""

    def __init__(
        self, worker: str, policy: Policy, session: aiohttp.ClientSession, headers: Mapping[str, str] | None = None
    ) -> None:
        self.worker = worker
        self._policy = policy
        self._session = session
        self._headers = headers
        self._number = 0  # of the last event
        self._pause = FIRST_PAUSE

    def forget(self) -> None:
        """The policy knows nothing of this worker any more."""
        self._number = 0

    async def run(self) -> None:
        """Until cancelled, or until the worker says that it has nothing of this kind to tell."""
        while await self._follow():
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    async def _follow(self) -> bool:
        """Read one answer to its end, or to a gap. False if there will be no other."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        url, query = self.worker.rstrip("/") + PATH, {"after": str(self._number)}
        try:
            async with self._session.get(
                url, params=query, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status in NO_ROUTE or (response.status == 200 and not _is_stream(response)):
                    log.debug("%s does not tell what it caches (%d)", self.worker, response.status)
                    return False
                if response.status != 200:
                    log.warning("%s does not tell what it caches: it answers %d", self.worker, response.status)
                    return True
                async for data in _events(response.content):
                    if not self._take(EVENT.decode(data)):
                        break
                    self._pause = FIRST_PAUSE
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            log.debug("%s stopped telling what it caches: %s", self.worker, error or type(error).__name__)
        return True

    def _take(self, event: Event) -> bool:
        """Tell the policy. False if something before `event` was missed."""
        if event.after != self._number:
            log.debug("%s goes on after %d, and %d was the last", self.worker, event.after, self._number)
            return False
        for change in event.changes:
            blocks = array("Q", bytes.fromhex(change.blocks))
            match change.kind:
                case "stored":
                    self._policy.stored(self.worker, bytes.fromhex(change.space), blocks)
                case "evicted":
                    self._policy.evicted(self.worker, blocks)
                case "reset":
                    self._policy.reset(self.worker)
        self._number = event.number
        return True


def _is_stream(response: aiohttp.ClientResponse) -> bool:
    return response.content_type == "text/event-stream"


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event, which is one line. Raises ValueError for one that is too long."""
    held = bytearray()
    async for piece in content.iter_any():
        begin = len(held)
        held += piece
        if len(held) > MOST_BYTES:
            raise ValueError(f"an event has over {MOST_BYTES} bytes")
        while (end := held.find(b"\n", begin)) >= 0:
            line = bytes(held[:end])
            del held[: end + 1]
            begin = 0
            if line.startswith(b"data: "):
                yield line[6:]
