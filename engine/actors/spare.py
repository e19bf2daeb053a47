"""The spare: a second device process that has imported what the worker needs, and waits to take its place.

Half of a small model's start is imports. The spare does them while nothing is wrong, some seconds after the worker is
ready and at a low priority, and then sleeps: it opens no model and touches no device. When the worker dies the executor
takes it and boots it as it would any other. A spare that ends by itself is replaced, later each time, and after some
times no more. Where memory is short there is none.
"""

import logging

import anyio

from engine.config import Config
from engine.messages import FromWorker
from engine.messages.control import Fatal, Pong, Preload
from engine.runtime.memory import free_memory
from engine.runtime.process import Child, Start

log = logging.getLogger("engine.spare")

SPARE_SECONDS = 5.0  # after the worker is ready; twice as long after each spare that ended by itself
MOST_LOST = 4  # spares in a row that end by themselves
LEAST_MEMORY = 1 << 30  # bytes that must be free for a spare, which takes a sixth of that
LOOK_SECONDS = 5.0  # between two looks at the memory


class Spare:
    """At most one process, held for the executor."""

    def __init__(self, config: Config, start: Start, delay: float = SPARE_SECONDS) -> None:
        self._config = config
        self._start = start
        self._delay = delay
        self._wanted = anyio.Event()
        self._modules: dict[str, None] = {}
        self._held: Child[FromWorker] | None = None
        self._watching = anyio.CancelScope()
        self._released = anyio.Event()
        self.imported = False  # the one that is held

    def want(self, modules: tuple[str, ...]) -> None:
        """The worker is ready, so a spare may be started; it is to import `modules` too."""
        self._modules |= dict.fromkeys(modules)
        self._wanted.set()

    async def take(self) -> Child[FromWorker] | None:
        """The spare, for whoever asks to boot and to end it; None where there is none. No other is started before the
        next `want`."""
        if self._wanted.is_set():  # else `run` waits for this one
            self._wanted = anyio.Event()
        held, self._held = self._held, None
        if held is not None:
            self._watching.cancel()
            await self._released.wait()  # nobody else reads its frames any more
        return held

    async def run(self) -> None:
        """Keep one whenever it is wanted, until too many have ended by themselves."""
        lost = 0
        short = False
        while lost < MOST_LOST:
            await self._wanted.wait()
            await anyio.sleep(self._delay * 2**lost)
            if not self._wanted.is_set():  # the worker has died meanwhile
                continue
            if free_memory() < LEAST_MEMORY:
                if not short:
                    log.info("no spare worker: less than %d MiB of memory are free", LEAST_MEMORY >> 20)
                short = True
                await anyio.sleep(LOOK_SECONDS)
                continue
            short = False
            cause = await self._keep()
            lost = lost + 1 if cause else 0
            if cause:
                log.warning("the spare worker is gone: %s", cause)
        log.warning("no spare worker is kept any more: %d in a row have ended by themselves", lost)

    async def _keep(self) -> str:
        """Start one and hold it until it is taken, or memory is short; why it ended, if that was its own doing."""
        try:
            child = await Child[FromWorker].start(self._start, FromWorker)
        except OSError as error:  # no more processes, or no memory for one
            return f"it cannot be started: {error}"
        self._held, self._released = child, anyio.Event()
        self._watching = anyio.CancelScope()
        cause = ""
        try:
            with self._watching:
                cause = await self._watch(child)
            return cause
        finally:
            self.imported = False
            if self._held is child:  # nobody has taken it
                self._held = None
                await child.end()
            self._released.set()

    async def _watch(self, child: Child[FromWorker]) -> str:
        """Have it import; returns once it has ended, and why; or nothing where memory is short."""
        try:
            await child.frames.send(Preload(self._config, tuple(self._modules)))
        except anyio.BrokenResourceError:
            return await child.exit_cause()
        cause = ""
        while True:
            with anyio.move_on_after(LOOK_SECONDS):
                async for message in child.frames:
                    match message:
                        case Pong():
                            self.imported = True
                            log.debug("the spare worker, process %d, has imported all it needs", child.process.pid)
                        case Fatal():
                            cause = message.cause
                            log.debug("%s", message.details)
                return cause or await child.exit_cause()
            if free_memory() < LEAST_MEMORY:
                log.info("ending the spare worker: less than %d MiB of memory are free", LEAST_MEMORY >> 20)
                return ""
