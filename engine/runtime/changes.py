"""Waiting for the next change of something that tasks look at again then."""

import anyio


class Changes:
    """Those who wait for a change. An event is made only while somebody waits: what changes may do so all the time."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    async def next(self) -> None:
        """Wait until `tell` is called."""
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()

    def tell(self) -> None:
        """Have all who wait look again."""
        if (event := self._event) is not None:
            self._event = None
            event.set()
