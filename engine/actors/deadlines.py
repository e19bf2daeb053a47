"""Until when answers are waited for: whoever waits for the first of these times sleeps until it comes.

Left out: what happens then (scheduler.py, flushing.py).
"""

import time
from collections.abc import Iterable
from math import inf

import anyio


class Deadlines:
    """By the numbers of who waits, in seconds of time.monotonic."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}
        self._sooner = anyio.Event()

    def __len__(self) -> int:
        return len(self._until)

    def set(self, number: int, seconds: float) -> None:
        """`number` is waited for that long from now on."""
        first = min(self._until.values(), default=inf)
        self._until[number] = until = time.monotonic() + seconds
        if until < first:
            self._sooner.set()

    def shorten(self, waits: Iterable[tuple[int, float]]) -> None:
        """These numbers are waited for that many seconds from now on, unless it was less before or they are not."""
        now = time.monotonic()
        for number, seconds in waits:
            if now + seconds < self._until.get(number, 0.0):
                self.set(number, seconds)

    def end(self, number: int) -> None:
        """It is waited for no longer."""
        self._until.pop(number, None)

    def clear(self) -> None:
        """None is."""
        self._until.clear()

    async def passed(self) -> list[int]:
        """Those whose time is over, as soon as there is one: they are waited for no longer."""
        while True:
            now = time.monotonic()
            if over := [number for number, until in self._until.items() if until <= now]:
                for number in over:
                    self.end(number)
                return over
            self._sooner = anyio.Event()
            with anyio.move_on_after(min(self._until.values(), default=inf) - now):
                await self._sooner.wait()
