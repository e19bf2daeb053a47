"""What loads the things that requests need on the device; the runner has one for each kind."""

from collections.abc import Callable
from typing import Protocol

from engine.messages.assets import Load, Loaded


class Loader(Protocol):
    """Loads things of one kind. Rows come with a number once its Loaded was told, and never after its `drop`."""

    def load(self, message: Load, tell: Callable[[Loaded], None]) -> None:
        """Begin to load, beside the steps, then `tell` from any thread. An error belongs to this thing alone: it is the
        cause in Loaded, and is not raised."""

    def drop(self, number: int) -> None:
        """Forget a thing. Rows in flight may still use it."""


class LoadedElsewhere:
    """Of a rank that has no use for things of a kind: another stage of the pipeline has."""

    def load(self, message: Load, tell: Callable[[Loaded], None]) -> None:
        tell(Loaded(message.kind, message.number))

    def drop(self, number: int) -> None:
        """There is nothing to forget."""
