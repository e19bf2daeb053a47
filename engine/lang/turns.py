"""The order in which the programs of a batch call the model: those whose prompts begin alike, one after the other.

    program ──its first prompt is known──> waits ──in the order of prompts──> runs ──ends──> the next one

More programs are begun than may run, as far as their first call, because only there it is known how the prompt begins.
They are let on in the order of these prompts, as an elevator goes: from the last one on, and around. So the cache still
holds what successive ones share, whatever the arguments say. Left out: what happens behind the first call.
"""

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable

import msgspec

from engine.lang.transcript import Prompt

GRACE = 0.02  # seconds at most for the first programs to come to their first call


class Turns:
    """Lets `most` programs run at once. `first` are begun together; once all of these wait, nobody is waited for."""

    def __init__(self, most: int, first: int) -> None:
        self._free = most
        self._first = first
        self._waiting: list[tuple[str, int]] = []  # by the prompts; the numbers are of their turns
        self._turns: dict[int, Turn] = {}
        self._last = ""  # the prompt that was let on last
        self._begun = 0
        self._open = False  # whether the first have had time to come

    def begin(self) -> "Turn":
        """The turn of a program that begins."""
        self._begun += 1
        return Turn(self, self._begun)

    def wait(self, turn: "Turn", key: str) -> None:
        """`turn` is at its first call, whose prompt is `key`."""
        self._turns[turn.number] = turn
        insort(self._waiting, (key, turn.number))
        if self._open:
            self._let_on()
        elif len(self._waiting) == self._first:
            self._begin()
        elif len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(GRACE, self._begin)

    def end(self, turn: "Turn") -> None:
        """The program of `turn` has ended, wherever it was."""
        if self._turns.pop(turn.number, None) is not None:
            self._waiting = [each for each in self._waiting if each[1] != turn.number]
        elif turn.comes is not None:
            self._free += 1
            self._let_on()

    def _begin(self) -> None:
        self._open = True
        self._let_on()

    def _let_on(self) -> None:
        while self._free and self._waiting:
            index = bisect_left(self._waiting, (self._last, 0)) % len(self._waiting)
            self._last, number = self._waiting.pop(index)
            self._free -= 1
            turn = self._turns.pop(number)
            assert turn.comes is not None, "it waits"
            turn.comes.set()


class Turn:
    """One program's. `comes` is there once its first call waits, and set when that may go on."""

    def __init__(self, turns: Turns, number: int) -> None:
        self._turns = turns
        self.number = number
        self.comes: asyncio.Event | None = None

    async def come(self, prompt: Prompt, held: Callable[[bool], None]) -> None:
        """Returns when the call with `prompt`, and those behind it, may be made; `held` is told that it waits, and
        that it waits no more."""
        if self.comes is None:
            self.comes = asyncio.Event()
            self._turns.wait(self, prompt.text or msgspec.json.encode(prompt.messages).decode())
            held(True)
            await self.comes.wait()
            held(False)
        await self.comes.wait()

    def end(self) -> None:
        """The program has ended."""
        self._turns.end(self)
