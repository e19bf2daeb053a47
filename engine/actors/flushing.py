"""Flushes of the cache: each is answered once a store below has forgotten what it had, too, or says that it cannot.

    Flush ──> device and host forget at once ──> the store is told ──> answered: cleared, or why not
                                                      └── no answer in time ──> answered: not yet

One that comes before a store is open is not done, and its client is told so; it is done as soon as there is one. Left
out: asking a store again (cache/clearing.py).
"""

import logging

import msgspec
from msgspec.structs import replace

from engine.messages import ToFront
from engine.messages.control import Answer, Flush, Flushed
from engine.runtime.channel import Outbox
from engine.sched import Scheduler
from engine.sched.copies import Copies
from engine.sched.moves import Moves

log = logging.getLogger("engine.scheduler")

PATIENCE_SECONDS = 30.0  # for which a store is waited for


class Flushes:
    """Those that `front` has not been answered. `stores`: there is one below, or will be."""

    def __init__(self, front: Outbox[ToFront], *, stores: bool = False) -> None:
        self._front = front
        self._stores = stores
        self._early = False  # one came before there was a scheduler
        self._waiting: list[tuple[int, float, Flushed]] = []  # number, until when, and what is forgotten already

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    async def begin(self, asked: Flush, scheduler: Scheduler | Copies | None, moves: Moves | None, now: float) -> None:
        """Forget what no running request uses."""
        if scheduler is None and self._stores:
            self._early = True
            return await self._tell(asked.number, Flushed(0, 0, "the device worker, which opens it, is starting"))
        flushed = Flushed(*(scheduler.flush() if scheduler else (0, 0)))
        if moves is not None and moves.clearing:
            self._waiting.append((asked.number, now + PATIENCE_SECONDS, flushed))
        else:
            await self._tell(asked.number, flushed)
        return None

    def opened(self, scheduler: Scheduler | Copies) -> None:
        """There is one from now on."""
        if self._early:
            scheduler.flush()
        self._early = False

    async def answer(self, moves: Moves, now: float) -> None:
        """Answer those that wait for nothing any more."""
        clearing, cause = moves.clearing, moves.uncleared
        waiting, self._waiting = self._waiting, []
        for number, until, flushed in waiting:
            if clearing and now < until:
                self._waiting.append((number, until, flushed))
                continue
            said = f"it has not answered within {PATIENCE_SECONDS:.0f} s" if clearing else cause
            await self._tell(number, replace(flushed, uncleared=said))

    async def _tell(self, number: int, flushed: Flushed) -> None:
        if flushed.uncleared:
            log.warning("a flush has not cleared the store of KV pages: %s", flushed.uncleared)
        await self._front.send(Answer(number, msgspec.msgpack.encode(flushed)))
