"""Whether an engine is ready or has failed, and how to wait for either: what a front and the hub of several share."""

import anyio

from engine.errors import WorkerError
from engine.messages.control import WorkerReady


class Readiness:
    """`info` says what the device can do, once it is ready; `failure` why nothing more will come."""

    def __init__(self) -> None:
        self.info: WorkerReady | None = None
        self.failure = ""
        self._changed: anyio.Event | None = None  # while somebody waits for one

    async def ready(self) -> WorkerReady:
        """Wait until the device is ready. Raises WorkerError when it never will be."""
        while self.info is None:
            if self.failure:
                raise WorkerError(self.failure)
            await self._change()
        return self.info

    async def failed(self) -> str:
        """Wait for the end of the engine's life, and say why it ended."""
        while not self.failure:
            await self._change()
        return self.failure

    async def _change(self) -> None:
        """Wait for the next change. An event is made where somebody waits: requests end all the time."""
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    def _wake(self) -> None:
        """Have all who wait look again."""
        if (changed := self._changed) is not None:
            self._changed = None
            changed.set()
