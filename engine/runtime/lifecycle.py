"""Whether the engine is ready yet, and why it ended: what a front and a hub wait for alike.

Left out: who finds out. A front and a hub hear it from the core, and call `_wake` once they have noted it.
"""

import anyio

from engine.errors import WorkerError
from engine.messages.control import WorkerReady


class Lifecycle:
    """The engine's life, for those who wait for its beginning or its end."""

    def __init__(self) -> None:
        self.info: WorkerReady | None = None  # once the device is ready
        self.failure = ""  # why nothing runs any more
        self._changed = anyio.Event()

    def _wake(self) -> None:
        """Let all who wait look again."""
        self._changed.set()
        self._changed = anyio.Event()

    async def ready(self) -> WorkerReady:
        """Wait until the device is ready. Raises WorkerError when it never will be."""
        while self.info is None:
            if self.failure:
                raise WorkerError(self.failure)
            await self._changed.wait()
        return self.info

    async def failed(self) -> str:
        """Wait for the end of the engine's life, and say why it ended."""
        while not self.failure:
            await self._changed.wait()
        return self.failure
