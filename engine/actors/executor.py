"""The executor actor: keeps the workers of a model alive, one for each rank, and passes steps to and fro.

It starts the processes and runs them as one group (runtime/group.py), which has one life. When that ends it says why
(`WorkerLost`), waits for the scheduler's `Reset`, and starts another: with the spare (spare.py), which only one worker
alone has, or with new processes. A group that cannot even start, or fails three times in a row to start again, is
`Fatal`. Where there are several hosts, workers of the others are started by these (runtime/nodes.py); a life that ends
because a host has left does not count as a failed start, and the next one waits until it has joined again.
"""

import logging

import anyio
import msgspec

from engine.actors.spare import SPARE_SECONDS, Spare
from engine.config import Config
from engine.errors import ConfigError, counted
from engine.messages import FromExecutor, FromWorker, ToExecutor
from engine.messages.control import Fatal, Reset, WorkerLost, WorkerReady
from engine.runtime.channel import Outbox, Receiver
from engine.runtime.copies import check_copies
from engine.runtime.group import WorkerGroup, meeting_place
from engine.runtime.meeting import check_hosts
from engine.runtime.nodes import LostNode, Nodes, RemoteChild, check_attached
from engine.runtime.process import Child, Start, end_all, spawn
from engine.runtime.tiers import check_tiers

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
        check_hosts(config.parallel)
        check_copies(config)
        check_tiers(config)
        if config.parallel.node_rank:
            raise ConfigError(f"--node-rank {config.parallel.node_rank} is for `engine serve`; node 0 has the engine")
        self._nodes = Nodes(config) if config.parallel.nnodes > 1 else None

    async def run(self) -> None:
        if self._nodes is None:
            await self._run()
            return
        parallel = msgspec.structs.replace(self.config.parallel, dist_interface=self._nodes.interface)
        self.config = msgspec.structs.replace(self.config, parallel=parallel)
        try:
            async with self._nodes.open():
                await self._run()
        except ConfigError as error:
            await self.scheduler.send(Fatal("worker", str(error)))

    async def _run(self) -> None:
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
                await self._give_up(cause)
                return
            first = False
            failed_starts = 0 if was_ready else failed_starts + 1
            if failed_starts >= MOST_FAILED_STARTS:
                await self._give_up(f"it failed to start {counted(failed_starts, 'time')}: {cause}")
                return
            log.error("the device worker is gone: %s", cause)
            await self.scheduler.send(WorkerLost(cause))
            async for message in self.inbox:
                if isinstance(message, Reset):
                    break
            await anyio.sleep(failed_starts * RESTART_SECONDS)  # a shortage of memory may pass
            log.info("restarting the device worker")

    async def _give_up(self, cause: str) -> None:
        if self._nodes is not None:
            self._nodes.farewell = cause
        await self.scheduler.send(Fatal("worker", cause))

    async def _one_life(self) -> tuple[bool, str]:
        """Run one group of workers until it ends; whether that is no failed start, and why it ended."""
        children: list[Child[FromWorker]] = []
        remote: list[RemoteChild] = []
        try:
            if self._nodes is not None:
                remote = await self._nodes.start()
                check_attached(remote)
            if held := await self.spare.take():
                children.append(held)
            while len(children) < self.config.parallel.node_ranks:
                children.append(await Child[FromWorker].start(self._start, FromWorker))
            log.debug("device workers are processes %s", ", ".join(str(child.process.pid) for child in children))
            meeting = meeting_place if self._nodes is None else self._nodes.meeting_place
            group = WorkerGroup(self.config, [*children, *remote], self.scheduler, self._ready, meeting)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._forward, group)
                cause = await group.live()
                tasks.cancel_scope.cancel()
            return group.ready or any(child.node.gone.is_set() for child in remote), cause
        except LostNode as error:
            return True, str(error)
        except ConfigError as error:
            return False, str(error)
        except OSError as error:  # the system starts no more processes, or has no memory for one
            return False, f"a worker cannot be started: {error}"
        finally:
            await end_all([*children, *remote])

    def _ready(self, ready: WorkerReady) -> None:
        self.config = _fixed(self.config, ready)
        self.spare.want(ready.modules)

    async def _forward(self, group: WorkerGroup) -> None:
        async for message in self.inbox:
            if not isinstance(message, Reset):
                await group.send(message)
            del message  # not held while the next one is waited for


def _fixed(config: Config, ready: WorkerReady) -> Config:
    """`config` for the next life: the scheduler's pages and lengths hold whatever memory is free by then."""
    cache = msgspec.structs.replace(config.cache, kv_tokens=ready.pages * ready.page_size)
    model = msgspec.structs.replace(config.model, max_model_len=ready.max_model_len)
    return msgspec.structs.replace(config, cache=cache, model=model)
