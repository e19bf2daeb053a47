"""The core: scheduler, executor and compiler, in the front's process or in one of their own.

`core_actors` builds them. `python -m engine.runtime.core FD` runs it behind a socket (placement `split`), and
`CoreLink` is the front's end of that socket. Which of the two it is, no actor can tell.
"""

import logging
import socket
import sys
from contextlib import suppress

import anyio
import anyio.abc

from engine.actors.compiler import CompilerActor
from engine.actors.executor import ExecutorActor
from engine.actors.opening import Maker
from engine.actors.scheduler import SchedulerActor
from engine.config import Config
from engine.errors import EngineError
from engine.grammars.engines import grammar_engines
from engine.logs import set_up_logging
from engine.messages import FromFront, ToFront
from engine.messages.control import Boot, Fatal, WorkerReady
from engine.messages.fronts import FrontLost
from engine.messages.grammars import GRAMMAR
from engine.messages.step import steps_in_flight
from engine.plugin.registry import Plugins
from engine.runtime.actor import Actor, supervise
from engine.runtime.allocator import give_back_large_blocks, keep_for_good
from engine.runtime.channel import Frames, Outbox, channel, open_channel
from engine.runtime.process import Child, Start, spawn
from engine.runtime.repeats import Restored, Spared
from engine.sched.policies import make_policy, policy_name

log = logging.getLogger("engine")

PLANS = steps_in_flight() + 1  # and a Reset: the scheduler never waits to send


def core_actors(
    config: Config,
    front: Outbox[ToFront],
    start: Start | None = None,
    plugins: Plugins | None = None,
    fronts: int = 1,
) -> tuple[list[Actor], Outbox[FromFront | FrontLost]]:
    """The scheduler, the executor and the compiler of grammars, joined; and where to send what is for the scheduler.

    `start` starts a device process, in the place of the usual way. `plugins` are those of the config, where the front
    is in this process and has loaded them. `front` stands for so many `fronts`."""
    policy = make_policy(plugins or Plugins.load(config.model.plugins), config.schedule.policy)
    to_scheduler, scheduler_inbox = open_channel()
    to_executor, executor_inbox = channel(PLANS + config.parallel.pp - 1)
    to_compiler, compiler_inbox = open_channel()
    makers = {GRAMMAR: Maker(to_compiler, kept=config.grammar.grammar_cache)}
    scheduler = SchedulerActor(
        config, policy, scheduler_inbox, executor=to_executor, makers=makers, front=front, fronts=fronts
    )
    executor = ExecutorActor(config, executor_inbox, to_scheduler, start)
    compiler = CompilerActor(config, compiler_inbox, to_scheduler)
    return [scheduler, executor, compiler], to_scheduler


def say_scheduling(plugins: Plugins, config: Config) -> None:
    """Log the policy and the grammar engines that the user chose. Raises PluginError for one that is none."""
    make_policy(plugins, config.schedule.policy)
    name, asked = policy_name(plugins, config.schedule.policy), config.schedule.policy
    if ("policies", name) in plugins.named or asked != "auto":
        log.info("scheduling policy: %s (%s)", name, "named in --plugins" if asked == "auto" else "--policy")
    engines = [entry.name for entry in grammar_engines(plugins) if ("grammars", entry.name) in plugins.named]
    if engines:
        log.info("grammar engines: %s (named in --plugins)", ", ".join(engines))


class CoreLink:
    """A core in a process of its own: an actor that passes on what it says, and an outbox to it."""

    name = "core"

    def __init__(self, config: Config, front: Outbox[ToFront]) -> None:
        self._config = config
        self._front = front
        self._frames: Frames[ToFront] | None = None
        self._open = anyio.Event()
        self._spared = Spared()

    async def send(self, message: FromFront) -> None:
        if self._frames is None or not self._open.is_set():
            await self._open.wait()
        assert self._frames is not None
        with suppress(anyio.BrokenResourceError):  # `run` sees the end of the stream and says why
            await self._frames.send(self._spared(message))

    async def run(self) -> None:
        child = await Child[ToFront].start(lambda: spawn("engine.runtime.core"), ToFront)
        try:
            self._frames = child.frames
            await self._frames.send(Boot(self._config))
            self._open.set()
            async for message in self._frames:
                await self._front.send(message)
            await self._front.send(Fatal("core process", await child.exit_cause()))
        finally:
            await child.leave()


class ToServing:
    """The way of a core to its front; all that the process has when the engine is ready, it keeps."""

    def __init__(self, front: Outbox[ToFront]) -> None:
        self._front = front
        self._serves = False

    async def send(self, message: ToFront) -> None:
        await self._front.send(message)
        if isinstance(message, WorkerReady) and not self._serves:
            self._serves = True
            keep_for_good()


async def _run(descriptor: int) -> None:
    stream = await anyio.abc.UNIXSocketStream.from_socket(socket.socket(fileno=descriptor))
    frames: Frames[Boot | FromFront] = Frames(stream, Boot | FromFront)
    messages = aiter(frames)
    boot = await anext(messages, None)
    if not isinstance(boot, Boot):
        return
    set_up_logging(boot.config.process.log_level)
    try:
        actors, scheduler = core_actors(boot.config, ToServing(frames))
    except EngineError as error:
        await frames.send(Fatal("core process", str(error)))
        return
    restored = Restored()
    async with supervise(*actors):
        async for message in messages:
            assert not isinstance(message, Boot)
            await scheduler.send(restored(message))
            del message  # not held while the next one is waited for


def main() -> None:
    give_back_large_blocks()
    anyio.run(_run, int(sys.argv[1]), backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
