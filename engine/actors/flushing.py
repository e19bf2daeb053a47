"""Flushes of the cache: each is answered once a store below has forgotten what it had, too, or says that it cannot.

    Flush ──> device and host forget at once ──> the store is told ──> answered: cleared, or why not
                                                      └── no answer in time ──> answered: not yet

Whoever is answered finds the figures of what is held as they are then. A flush that comes before a store is open is not
done, and its client is told so; it is done as soon as there is one. Left out: asking a store again (cache/clearing.py).
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from msgspec.structs import replace

from engine.actors.deadlines import Deadlines
from engine.messages import ToFront
from engine.messages.control import Answer, Flush, Flushed
from engine.runtime.channel import Outbox
from engine.sched import Scheduler
from engine.sched.copies import Copies
from engine.sched.moves import Moves

log = logging.getLogger("engine.scheduler")

PATIENCE_SECONDS = 30.0  # for which a store is waited for


class Flushes:
    """Those that `front` has not been answered; `show` tells it all figures. `stores`: one is below, or will be."""

    def __init__(self, front: Outbox[ToFront], show: Callable[[], Awaitable[None]], *, stores: bool = False) -> None:
        self._front, self._show = front, show
        self._stores = stores
        self._early = False  # one came before there was a scheduler
        self._waiting: dict[int, Flushed] = {}  # by their numbers, what is forgotten already
        self._until = Deadlines()

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    async def begin(self, asked: Flush, scheduler: Scheduler | Copies | None, moves: Moves | None) -> None:
        """Forget what no running request uses."""
        if scheduler is None and self._stores:
            self._early = True
            return await self._tell(asked.number, Flushed(0, 0, "the device worker, which opens it, is starting"))
        flushed = Flushed(*(scheduler.flush() if scheduler else (0, 0)))
        if scheduler is not None:
            scheduler.live.sessions.count(time.monotonic())
        if moves is not None and moves.clearing:
            self._waiting[asked.number] = flushed
            self._until.set(asked.number, PATIENCE_SECONDS)
        else:
            await self._tell(asked.number, flushed)
        return None

    def opened(self, scheduler: Scheduler | Copies) -> None:
        """There is one from now on."""
        if self._early:
            scheduler.flush()
        self._early = False

    async def late(self) -> list[int]:
        """The numbers of those that have waited long enough, as soon as there is one."""
        return await self._until.passed()

    async def answer(self, moves: Moves, late: Sequence[int] = ()) -> None:
        """Answer those that wait for nothing any more, and those that are `late`."""
        clearing, cause = moves.clearing, moves.uncleared
        said = f"it has not answered within {PATIENCE_SECONDS:.0f} s" if clearing else cause
        for number in [number for number in self._waiting if not clearing or number in late]:
            self._until.end(number)
            await self._tell(number, replace(self._waiting.pop(number), uncleared=said))

    async def _tell(self, number: int, flushed: Flushed) -> None:
        if flushed.uncleared:
            log.warning("a flush has not cleared the store of KV pages: %s", flushed.uncleared)
        await self._show()
        await self._front.send(Answer(number, msgspec.msgpack.encode(flushed)))
