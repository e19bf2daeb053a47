"""Turns of the event loop: handlers that all have something to do at once go on a few at a time.

    step ──> 64 replies end ──> 8 handlers │ what came meanwhile: tokens of the next step │ 8 handlers │ …

A handler that begins or ends an answer takes about as long as the events of ten tokens, and the loop runs all that are
ready before it looks at its sockets again. So without turns a step in which many replies end holds up the next tokens
of all others. Left out: requests that come together (`STARTED` in service.py, and the tokenizer, bound what they do).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable
from typing import TypeVar

from aiohttp import web

T = TypeVar("T")

AT_ONCE = 8  # handlers in one turn of the loop


class Turns:
    """Wakes those who wait, in order."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()  # while there are some, `_next` is due

    def wake(self, future: "asyncio.Future[None]") -> None:
        """Let the one who waits for `future` go on, in its turn."""
        if not self._waiting:
            future.get_loop().call_soon(self._next)
        self._waiting.append(future)

    async def next(self) -> None:
        """Wait for a turn."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.wake(future)
        await future

    def _next(self) -> None:
        left = AT_ONCE
        while self._waiting and left:
            future = self._waiting.popleft()
            if not future.done():  # else its handler was cancelled
                future.set_result(None)
                left -= 1
        if self._waiting:
            self._waiting[0].get_loop().call_soon(self._next)


TURNS = web.AppKey("turns", Turns)


async def in_turn(request: web.Request, replies: Awaitable[T]) -> T:
    """The whole `replies` to `request`, once they have come and its handler's turn has."""
    found = await replies
    await request.app[TURNS].next()
    return found
