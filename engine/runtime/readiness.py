"""Whether an engine is ready or has failed, and how to wait for either: what a front and the hub of several share."""

from engine.errors import WorkerError
from engine.messages.control import WorkerReady
from engine.runtime.changes import Changes


class Readiness:
    """`info` says what the device can do, once it is ready; `failure` why nothing more will come."""

    def __init__(self) -> None:
        self.info: WorkerReady | None = None
        self.failure = ""
        self._changes = Changes()

    async def ready(self) -> WorkerReady:
        """Wait until the device is ready. Raises WorkerError when it never will be."""
        while self.info is None:
            if self.failure:
                raise WorkerError(self.failure)
            await self._changes.next()
        return self.info

    async def failed(self) -> str:
        """Wait for the end of the engine's life, and say why it ended."""
        while not self.failure:
            await self._changes.next()
        return self.failure
