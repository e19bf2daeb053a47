"""The executor actor: keeps the workers of a model alive, one for each rank, and passes steps to and fro.

It starts the processes and runs them as one group (runtime/group.py), which has one life. When that ends it says why
(`WorkerLost`), waits for the scheduler's `Reset`, and starts another: with the spare (spare.py), which only one worker
alone has, or with new processes. A group that cannot even start, or fails three times in a row to start again, is
`Fatal`.
"""

import logging

import anyio
import msgspec

from engine.actors.spare import SPARE_SECONDS, Spare
from engine.config import Config
from engine.errors import counted
from engine.messages import FromExecutor, FromWorker, ToExecutor
from engine.messages.control import Fatal, Reset, WorkerLost, WorkerReady
from engine.runtime.channel import Outbox, Receiver
from engine.runtime.group import WorkerGroup
from engine.runtime.process import Child, Start, end_all, spawn

log = logging.getLogger("engine.executor")

MOST_FAILED_STARTS = 3
RESTART_SECONDS = 2.0  # longer after each failed start


class ExecutorActor:
    name = "executor"

    def __init__(
        self,
        config: Config,
        inbox: Receiver[ToExecutor],
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
            if self.config.process.spare_worker and self.config.parallel.ranks == 1:
                group.start_soon(self.spare.run)
            await self._lives()
            group.cancel_scope.cancel()

    async def _lives(self) -> None:
        """One group after the other, until one cannot be started."""
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
                await self.scheduler.send(
                    Fatal("worker", f"it failed to start {counted(failed_starts, 'time')}: {cause}")
                )
                return
            log.error("the device worker is gone: %s", cause)
            await self.scheduler.send(WorkerLost(cause))
            async for message in self.inbox:
                if isinstance(message, Reset):
                    break
            await anyio.sleep(failed_starts * RESTART_SECONDS)  # a shortage of memory may pass
            log.info("restarting the device worker")

    async def _one_life(self) -> tuple[bool, str]:
        """Run one group of workers until it ends; whether it ever was ready, and why it ended."""
        children: list[Child[FromWorker]] = []
        try:
            if held := await self.spare.take():
                children.append(held)
            while len(children) < self.config.parallel.ranks:
                children.append(await Child[FromWorker].start(self._start, FromWorker))
            log.debug("device workers are processes %s", ", ".join(str(child.process.pid) for child in children))
            group = WorkerGroup(self.config, children, self.scheduler, self._ready)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._forward, group)
                cause = await group.live()
                tasks.cancel_scope.cancel()
            return group.ready, cause
        except OSError as error:  # the system starts no more processes, or has no memory for one
            return False, f"a worker cannot be started: {error}"
        finally:
            await end_all(children)

    def _ready(self, ready: WorkerReady) -> None:
        self.config = _fixed(self.config, ready)
        self.spare.want(ready.modules)

    async def _forward(self, group: WorkerGroup) -> None:
        async for message in self.inbox:
            if not isinstance(message, Reset):
                await group.send(message)


def _fixed(config: Config, ready: WorkerReady) -> Config:
    """`config` for the next life: the scheduler's pages and lengths hold whatever memory is free by then."""
    cache = msgspec.structs.replace(config.cache, kv_tokens=ready.pages * ready.page_size)
    model = msgspec.structs.replace(config.model, max_model_len=ready.max_model_len)
    return msgspec.structs.replace(config, cache=cache, model=model)
