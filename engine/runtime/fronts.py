"""The front processes of an engine that has several: started together, watched, and started again when they die.

    FrontProcesses ── front 0: process, line ──┐
                   ── front 1: process, line ──┼── hub ── scheduler
                   ── …                      ──┘

A front that dies takes its connections along. Its requests end in the scheduler, and the next process of its number
takes over its listening sockets, with the connections that wait there. A front that does not read, or whose event loop
stands still, is ended for that. Left out: what a front does (front_process.py), and whose messages are whose (hub.py).
"""

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from socket import socket
from typing import NamedTuple

import anyio
import anyio.abc

from engine.config import Config
from engine.errors import ConfigError, EngineError, PluginError, WorkerError
from engine.messages import FromFrontProcess
from engine.messages.control import WorkerReady
from engine.messages.fronts import Drain, Drained, FrontBoot, Listening, Refused
from engine.runtime.board import Board, Counter
from engine.runtime.changes import Changes
from engine.runtime.hub import Hub, SocketLine
from engine.runtime.process import Child, Process
from engine.runtime.repeats import Restored

log = logging.getLogger("engine.fronts")

LOOK_SECONDS = 1.0
MOST_KEPT = 64 << 20  # bytes that are kept for a front
RESTART_SECONDS = 0.5  # twice as long after each front that was gone soon, up to the longest
LONGEST_RESTART_SECONDS = 10.0
SOON_SECONDS = 10.0
MOST_FAILED_STARTS = 4

StartFront = Callable[[int], tuple[socket, Process]]  # of a number: our end of its socket, and the process


class Life:
    """One process of one front."""

    def __init__(self, child: Child[FromFrontProcess], line: SocketLine) -> None:
        self.child = child
        self.line = line
        self.restored = Restored()
        self.listening = False
        self.drained = False
        self.refusal: EngineError | None = None
        self.cause = ""  # why it was ended by us
        self.beats = 0  # that were seen last
        self.missed = 0  # looks at which there were no more


class Gone(NamedTuple):
    """How one process of a front has ended: whether it came to listen, and the error that it ended with, if it did."""

    cause: str
    listened: bool
    refusal: EngineError | None
    seconds: float


class FrontProcesses:
    """`hub.count` processes that `start` starts; the sockets of each are those of `listening` at its number."""

    name = "fronts"

    def __init__(
        self,
        config: Config,
        hub: Hub,
        board: Board,
        *,
        listening: Sequence[Sequence[socket]],
        start: StartFront,
        model_name: str,
        folder: str = "",
    ) -> None:
        """In `folder` the fronts have sockets for each other (http/passing.py)."""
        self.model_name = model_name
        self.chats = False  # the model has a chat template, once a front has said so
        self.listening = anyio.Event()  # all do
        self._config = config
        self._hub = hub
        self._board = board
        self._sockets = listening
        self._start = start
        self._folder = folder
        self._created = int(time.time())
        self._lives: dict[int, Life] = {}
        self._first: set[int] = set(range(hub.count))  # that have not listened yet
        self.draining = False
        self._changes = Changes()
        self._most_missed = max(2, round(config.process.stall_seconds / LOOK_SECONDS))

    async def run(self) -> None:
        """Keep all running. Raises what stops the start of one, or of its successors again and again."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch)
            for number in range(self._hub.count):
                group.start_soon(self._keep, number)

    # ── for who serves ───────────────────────────────────────────────────────────────────────

    @property
    def open(self) -> int:
        """How many requests are open, at all fronts."""
        return self._board.total(Counter.REQUESTS)

    async def ready(self) -> WorkerReady:
        """Wait until the device is ready. Raises WorkerError when it never will be."""
        return await self._hub.ready()

    async def failed(self) -> str:
        """Wait for the end of the core's life, and say why it ended."""
        return await self._hub.failed()

    async def drain(self, seconds: float) -> int:
        """Let in nothing more and wait at most `seconds` for open requests; how many are left."""
        self.draining = True
        self._hub.to_all(Drain(seconds))
        with anyio.move_on_after(seconds):
            while not all(life.drained for life in self._lives.values()):
                await self._changes.next()
        return self.open

    def end(self) -> int:
        """Start nothing more; how many requests are open. They end with the processes, with an error."""
        self.draining = True
        return self.open

    # ── lives ────────────────────────────────────────────────────────────────────────────────

    async def _keep(self, number: int) -> None:
        """One process after the other."""
        failed = soon = 0
        for life in itertools.count():
            gone = await self._live(number, life)
            if self.draining:
                return
            if gone.refusal is not None and number in self._first:
                raise gone.refusal
            failed = 0 if gone.listened else failed + 1
            if failed >= MOST_FAILED_STARTS:
                raise WorkerError(f"front {number} failed to start {failed} times: {gone.cause}")
            soon = soon + 1 if gone.seconds < SOON_SECONDS else 0
            log.error("front %d is gone: %s; it is started again", number, gone.cause)
            if soon > 1:
                await anyio.sleep(min(RESTART_SECONDS * 2 ** (soon - 1), LONGEST_RESTART_SECONDS))

    async def _live(self, number: int, number_of_life: int) -> Gone:
        """Run one process to its end."""
        began = time.monotonic()
        try:
            child = await Child[FromFrontProcess].start(lambda: self._start(number), FromFrontProcess)
        except OSError as error:  # the system starts no more processes, or has no memory for one
            return Gone(f"it cannot be started: {error}", listened=False, refusal=None, seconds=0.0)
        life = Life(child, SocketLine(child.frames.sock))
        try:
            with suppress(anyio.BrokenResourceError):  # it has ended already
                await child.frames.send(self._boot(number, number_of_life))
                self._lives[number] = life
                self._hub.join(number, life.line)
            async for message in child.frames:
                await self._take(number, life, message)
            exit_cause = await child.exit_cause()
            cause = life.cause or str(life.refusal or exit_cause)
            return Gone(cause, listened=life.listening, refusal=life.refusal, seconds=time.monotonic() - began)
        finally:
            life.line.close()
            self._lives.pop(number, None)
            with anyio.CancelScope(shield=True):
                await child.leave()  # it ends what is open with an error first, if it lives
                await self._hub.leave(number)
            self._board.clear(number)
            self._changes.tell()

    def _boot(self, number: int, life: int) -> FrontBoot:
        descriptors = tuple(each.fileno() for each in self._sockets[number])
        assert self._board.descriptor is not None
        return FrontBoot(
            self._config,
            number,
            self._hub.count,
            life,
            self._board.descriptor,
            descriptors,
            self._folder,
            self._created,
        )

    async def _take(self, number: int, life: Life, message: FromFrontProcess) -> None:
        match message:
            case Listening(chats):
                life.listening, self.chats = True, chats
                self._first.discard(number)
                if not self._first:
                    self.listening.set()
            case Drained():
                life.drained = True
                self._changes.tell()
            case Refused():
                kind = ConfigError if message.kind == "ConfigError" else PluginError
                life.refusal = kind(message.message)
            case _:
                await self._hub.take(number, life.restored(message))

    async def _watch(self) -> None:
        """End a front that does not read, or stands still: its successor serves those who wait."""
        while True:
            await anyio.sleep(LOOK_SECONDS)
            for number, life in self._lives.items():
                beats = self._board.of(number, Counter.BEATS)
                # Looks are counted, and not seconds: all of us may have been stopped together.
                life.missed = 0 if beats != life.beats or not life.listening else life.missed + 1
                life.beats = beats
                if life.missed >= self._most_missed:
                    life.cause = f"it did nothing for {life.missed * LOOK_SECONDS:.0f} s and was ended"
                elif life.line.kept > MOST_KEPT:
                    life.cause = f"it did not read {life.line.kept >> 20} MiB that it was sent, and was ended"
                if life.cause:
                    life.child.process.kill()
