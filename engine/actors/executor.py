"""The executor actor: keeps one device process alive and passes steps to and fro.

It starts the worker, hands it the configuration, forwards each `StepPlan` and returns each `StepDone`. When
the process dies it says why (`WorkerLost`), waits for the scheduler's `Reset`, and boots another: the spare (spare.py),
or a new one. A worker that cannot even start, or fails three times in a row to start again, is `Fatal`. A worker that
is silent for too long is reported but not killed: a first compilation may take minutes.
"""

import logging
import time

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream

from engine.actors.spare import SPARE_SECONDS, Spare
from engine.config import Config
from engine.messages import FromExecutor, FromWorker, ToExecutor
from engine.messages.assets import Loaded
from engine.messages.control import (
    Answer,
    Boot,
    Fatal,
    Ping,
    Pong,
    Reset,
    WorkerLost,
    WorkerReady,
    WorkerSilent,
)
from engine.messages.step import StepDone, StepPlan
from engine.runtime.channel import Frames, Outbox
from engine.runtime.process import Process, Start, connected, ended, exit_cause, put_down, spawn

log = logging.getLogger("engine.executor")

MOST_FAILED_STARTS = 3
PING_SECONDS = 1.0
RESTART_SECONDS = 2.0  # longer after each failed start


class ExecutorActor:
    name = "executor"

    def __init__(
        self,
        config: Config,
        inbox: MemoryObjectReceiveStream[ToExecutor],
        scheduler: Outbox[FromExecutor],
        start: Start | None = None,
        spare_seconds: float = SPARE_SECONDS,
    ) -> None:
        self.config = config
        self.inbox = inbox
        self.scheduler = scheduler
        self._start: Start = start or (lambda: spawn("engine.worker"))
        self.spare = Spare(config, self._start, spare_seconds)

    async def run(self) -> None:
        async with anyio.create_task_group() as group:
            if self.config.process.spare_worker:
                group.start_soon(self.spare.run)
            await self._lives()
            group.cancel_scope.cancel()

    async def _lives(self) -> None:
        """One worker after the other, until one cannot be started."""
        failed_starts = 0
        first = True
        while True:
            was_ready, cause = await self._one_life()
            if first and not was_ready:
                await self.scheduler.send(Fatal("worker", cause))
                return
            first = False
            failed_starts = 0 if was_ready else failed_starts + 1
            if failed_starts >= MOST_FAILED_STARTS:
                await self.scheduler.send(Fatal("worker", f"it failed to start {failed_starts} times: {cause}"))
                return
            log.error("the device worker is gone: %s", cause)
            await self.scheduler.send(WorkerLost(cause))
            async for message in self.inbox:
                if isinstance(message, Reset):
                    break
            await anyio.sleep(failed_starts * RESTART_SECONDS)  # a shortage of memory may pass
            log.info("restarting the device worker")

    async def _one_life(self) -> tuple[bool, str]:
        """Run one worker until it ends; whether it ever was ready, and why it ended."""
        process, frames = await self.spare.take() or await self._new()
        log.debug("device worker is process %d", process.pid)
        life = _Life()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._forward, frames, life)
                group.start_soon(self._watch, frames, life)
                await self._listen(frames, life)
                group.cancel_scope.cancel()
            code = await ended(process)
        finally:
            await put_down(process, frames)
        return life.ready, life.cause or exit_cause(code)

    async def _new(self) -> tuple[Process, Frames[FromWorker]]:
        sock, process = self._start()
        try:
            return process, await connected(sock, FromWorker)
        except BaseException:
            await put_down(process, None)
            raise

    async def _listen(self, frames: Frames[FromWorker], life: "_Life") -> None:
        try:
            await frames.send(Boot(self.config))
        except anyio.BrokenResourceError:
            return
        async for message in frames:
            life.heard = time.monotonic()
            if life.silent:
                life.silent = False
                await self.scheduler.send(WorkerSilent(0.0))
            match message:
                case StepDone():
                    life.busy -= 1
                    await self.scheduler.send(message)
                case Answer() | Loaded():
                    await self.scheduler.send(message)
                case WorkerReady():
                    life.ready = True
                    self.config = _fixed(self.config, message)
                    self.spare.want(message.modules)
                    await self.scheduler.send(msgspec.structs.replace(message, modules=()))
                case Fatal():
                    life.cause = message.cause
                    if message.details:
                        log.error("%s ended by an exception\n%s", message.actor, message.details)
                case Pong():
                    pass

    async def _forward(self, frames: Frames[FromWorker], life: "_Life") -> None:
        async for message in self.inbox:
            if isinstance(message, Reset):
                continue
            life.busy += isinstance(message, StepPlan)
            try:
                await frames.send(message)
            except anyio.BrokenResourceError:
                return

    async def _watch(self, frames: Frames[FromWorker], life: "_Life") -> None:
        """Ask an idle worker whether it is there; report one that is silent too long."""
        limit = self.config.process.stall_seconds
        while True:
            await anyio.sleep(PING_SECONDS)
            if not life.ready:
                continue
            if not life.busy:
                try:
                    await frames.send(Ping())
                except anyio.BrokenResourceError:
                    return
            quiet = time.monotonic() - life.heard
            if quiet > limit and not life.silent:
                life.silent = True
                log.warning("no word from the device worker for %.0f s", quiet)
                await self.scheduler.send(WorkerSilent(quiet))


class _Life:
    """What is known of one worker process: steps it holds, when it last spoke, and its last words."""

    def __init__(self) -> None:
        self.ready = False
        self.busy = 0
        self.silent = False
        self.heard = time.monotonic()
        self.cause = ""


def _fixed(config: Config, ready: WorkerReady) -> Config:
    """`config` for the next life: the scheduler's pages and lengths hold whatever memory is free by then."""
    cache = msgspec.structs.replace(config.cache, kv_tokens=ready.pages * ready.page_size)
    model = msgspec.structs.replace(config.model, max_model_len=ready.max_model_len)
    return msgspec.structs.replace(config, cache=cache, model=model)
