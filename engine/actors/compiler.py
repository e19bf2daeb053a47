"""The compiler actor: grammars to and from the process that compiles them (engine/grammars/compiler.py).

The process is started for the first grammar: who sends none pays nothing. If it dies, what it had under way is answered
with an error that may be tried again, and the next grammar starts another.
"""

import logging
from contextlib import suppress

import anyio
import anyio.abc
import anyio.to_thread
from anyio.streams.memory import MemoryObjectReceiveStream

from engine.config import Config
from engine.messages.assets import Compile, Compiled
from engine.messages.control import Boot, Fatal
from engine.runtime.channel import Frames, Outbox
from engine.runtime.process import Child, Start, spawn

log = logging.getLogger("engine.grammars")


class CompilerActor:
    name = "grammar compiler"

    def __init__(
        self,
        config: Config,
        inbox: MemoryObjectReceiveStream[Compile],
        scheduler: Outbox[Compiled],
        start: Start = lambda: spawn("engine.grammars.compiler"),
    ) -> None:
        self.config = config
        self.inbox = inbox
        self.scheduler = scheduler
        self._start = start

    async def run(self) -> None:
        async for first in self.inbox:
            await self._one_life(first)

    async def _one_life(self, first: Compile) -> None:
        """Run one process until it ends; `first` is the grammar that it is started for."""
        log.info("starting the grammar compiler")
        open_jobs: set[int] = set()
        cause = ""

        async def forward(frames: Frames[Compiled | Fatal]) -> None:
            open_jobs.add(first.number)
            with suppress(anyio.BrokenResourceError):  # the reader sees the end of the stream too
                await frames.send(Boot(self.config))
                await frames.send(first)
                async for message in self.inbox:
                    open_jobs.add(message.number)
                    await frames.send(message)

        async with await Child[Compiled | Fatal].start(self._start, Compiled | Fatal) as child:
            async with anyio.create_task_group() as group:
                group.start_soon(forward, child.frames)
                async for message in child.frames:
                    if isinstance(message, Fatal):
                        cause = message.cause
                        continue
                    open_jobs.discard(message.number)
                    await self.scheduler.send(message)
                group.cancel_scope.cancel()
            cause = cause or await child.exit_cause()
        log.error("the grammar compiler is gone: %s", cause)
        said = f"the grammar compiler stopped while it worked on this; send the request again (cause: {cause})"
        for number in open_jobs:
            await self.scheduler.send(
                Compiled(number, 0.0, status=503, code="compiler_lost", cause=said, lasting=False)
            )
