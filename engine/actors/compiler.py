"""The compiler actor, the maker of grammars: to and from the process that compiles (engine/grammars/compiler.py).

The process is started for the first grammar: who sends none pays nothing. If it dies, what it had under way is answered
with an error that may be tried again, and the next grammar starts another.
"""

import logging
from contextlib import suppress

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from engine.config import Config
from engine.messages import ToMaker
from engine.messages.assets import Made
from engine.messages.control import Boot, Fatal, WorkerReady
from engine.messages.grammars import GRAMMAR, Compile, Compiled, PackedGrammar
from engine.params.grammar import Grammar
from engine.runtime.channel import Frames, Outbox, Receiver
from engine.runtime.process import Child, Start, spawn

log = logging.getLogger("engine.grammars")


class CompilerActor:
    name = "grammar compiler"

    def __init__(
        self,
        config: Config,
        inbox: Receiver[ToMaker],
        scheduler: Outbox[Made],
        start: Start = lambda: spawn("engine.grammars.compiler"),
    ) -> None:
        self.config = config
        self.inbox = inbox
        self.scheduler = scheduler
        self._start = start
        self._vocab_size = 0

    async def run(self) -> None:
        async for message in self.inbox:
            if (first := self._job(message)) is not None:
                await self._one_life(first)

    def _job(self, message: ToMaker) -> Compile | None:
        """What the process is to do; None for what only this actor takes in."""
        if isinstance(message, WorkerReady):
            self._vocab_size = message.vocab_size
            return None
        assert self._vocab_size, "a grammar is wanted before a worker was ready"
        grammar = msgspec.msgpack.decode(message.content, type=Grammar)
        return Compile(message.number, grammar, self._vocab_size)

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
                    if (job := self._job(message)) is not None:
                        open_jobs.add(job.number)
                        await frames.send(job)

        async with await Child[Compiled | Fatal].start(self._start, Compiled | Fatal) as child:
            async with anyio.create_task_group() as group:
                group.start_soon(forward, child.frames)
                async for message in child.frames:
                    if isinstance(message, Fatal):
                        cause = message.cause
                        continue
                    open_jobs.discard(message.number)
                    await self.scheduler.send(made(message))
                group.cancel_scope.cancel()
            cause = cause or await child.exit_cause()
        log.error("the grammar compiler is gone: %s", cause)
        said = f"the grammar compiler stopped while it worked on this; send the request again (cause: {cause})"
        for number in open_jobs:
            lost = Compiled(number, 0.0, status=503, code="compiler_lost", cause=said, lasting=False)
            await self.scheduler.send(made(lost))


def made(answer: Compiled) -> Made:
    """What the scheduler is told of a compilation."""
    if answer.grammar is not None:
        payload = msgspec.msgpack.encode(PackedGrammar(answer.engine, answer.grammar, answer.packed))
        return Made(GRAMMAR, answer.number, answer.seconds, payload)
    return Made(
        GRAMMAR,
        answer.number,
        answer.seconds,
        status=answer.status,
        code=answer.code,
        cause=answer.cause,
        lasting=answer.lasting,
        param=answer.param,
    )
