"""What a routing policy is: it is told what comes and what workers answer, and says where a request goes.

    an HTTP body ─> Arrival ──choose──> Choice ──> the proxy sends it ──sent──> … ──answered──> its end
                      the workers that may take it, as Views       events of a worker's cache: stored, evicted, reset

A policy keeps what it knows about caches; the proxy keeps loads, health and limits. All methods run on one event loop,
none awaits, and none may take long: `choose` stands in the way of every request. Of these methods only `choose` must be
written. Left out: which workers may take a request (the proxy's), how a conversation becomes one text
(engine/conversation/canonical.py).
"""
# ruff: noqa: B027

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

INDEX_CHARS: Final = 1 << 24  # that a policy may know of one worker, unless --index-chars says otherwise


class Arrival(Struct, frozen=True, weakref=True):
    """What is known of a request when it is routed.

    `text` is the canonical text of what the model will see: that of a longer conversation begins with that of the
    shorter one. `space` is what else must be equal for two requests to share a cache (model, adapter, cache salt),
    hashed. `program` is the id of a session or a program: its calls go to one worker while that is there.
    """

    model: str
    text: str
    space: bytes = b""
    program: str = ""


class View(Struct):
    """A worker as a policy sees it. The proxy keeps the numbers.

    `name` is its URL. `running` requests were sent to it and have not ended. `waiting_chars` is the length of the
    prompts among them whose first byte has not come, in characters, without what its cache was thought to hold.
    `capacity` is the most requests that it takes at a time.
    """

    name: str
    running: int
    waiting_chars: int
    capacity: int


class Choice(Struct, frozen=True):
    """Where a request goes: `worker` is an index in the views that were given, `matched` the characters that its cache
    is thought to hold, `reason` a few words for the access log and the dry run."""

    worker: int
    matched: int
    reason: str


class RoutingPolicy(ABC):
    """Chooses workers. It is made without arguments, once for each router."""

    def bound(self, chars: int) -> None:
        """Know at most `chars` characters of each worker's cache (--index-chars). Called once, before all else."""

    @abstractmethod
    def choose(self, arrival: Arrival, workers: Sequence[View]) -> Choice:
        """Where `arrival` goes. `workers` are those that may take it, at least one. Changes nothing: a dry run calls
        it, and the caller says `sent` at once if it follows the choice."""

    def sent(self, arrival: Arrival, worker: str) -> None:
        """It goes to the worker of that name, which need not be the one that was chosen."""

    def answered(self, arrival: Arrival, worker: str, cached: float | None) -> None:
        """It was answered. `cached` is the share of its prompt, 0 to 1, that the worker had in its cache; None if the
        worker does not say so. A request that fails, or that another router sent, is never answered."""

    def removed(self, worker: str) -> None:
        """The worker of that name has gone."""

    def stored(self, worker: str, space: bytes, blocks: Sequence[int]) -> None:
        """An event of a worker's cache: it now holds `blocks`, chained hashes of blocks of the canonical text."""

    def evicted(self, worker: str, blocks: Sequence[int]) -> None:
        """An event of a worker's cache: it no longer holds `blocks`."""

    def reset(self, worker: str) -> None:
        """The worker's cache is empty, or what it holds is no longer known."""

    def tidy(self, budget_s: float) -> bool:
        """Forget what is beyond the policy's bounds, for about `budget_s` seconds; True while more is left. The router
        calls it in the background, about four times a second."""
        return False
