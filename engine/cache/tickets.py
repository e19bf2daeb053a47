"""What tiers below the device are told, keep of a move that is under way, and count.

Left out: which pages move (tiers.py).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise, takewhile
from typing import Literal

from engine.cache.names import first_of_state, state_names
from engine.cache.place import Place
from engine.cache.radix import Node
from engine.messages.tiers import Moved, Way, summed

WritePolicy = Literal["write-through", "second-hit", "write-back"]


@dataclass(frozen=True, slots=True)
class TierOptions:
    """`host` pages in the pool of each rank; `stores`: and a store below it. Numbers of moves are those of copy `copy`
    of so many. Fewer pages than `least_risen` are not brought up, and fewer than `least_fetched` not asked for in a
    store: they are computed sooner. `always`: all others are waited for, else those for which that is worth it;
    `piece` of them are fetched at once. One in `cold` pages of the device, or of the host if that has fewer, is to be
    ready to give way; what comes up does so in parts of one in `parts` of these, or of `least_part`. The `state` of a
    request takes so many."""

    host: int
    policy: WritePolicy = "write-through"
    stores: bool = False
    least_risen: int = 4
    least_fetched: int = 16
    copy: int = 0
    copies: int = 1
    always: bool = False
    piece: int = 32
    cold: int = 8
    state: int = 0
    parts: int = 8
    least_part: int = 16

    def numbers(self) -> "itertools.count[int]":
        """Those of its moves."""
        return itertools.count(self.copy + self.copies, self.copies)

    def part(self, ready: int) -> int:
        """How many pages come up at once where so many are to be ready."""
        return max(self.least_part, ready // self.parts)


@dataclass(slots=True, eq=False)
class Ticket:
    """A move under way. `nodes` are locked. `pages` of "up" are its own, and go on from the one node by `key`; they are
    those of `names` from index `first` on. A part of what goes up has no node until the part before it is there, and
    never one if that does not come."""

    way: Way
    places: list[Place] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    names: Sequence[bytes] = ()
    first: int = 0
    key: bytes = b""
    stale: bool = False  # the tiers were cleared since
    ahead: bool = False  # its nodes are not used, but the next to give way
    then: "Ticket | None" = None  # the part that goes on from it

    @classmethod
    def find(cls, names: Sequence[bytes], state: int) -> "Ticket":
        """Looks for these, and where a `state` has pages, for the first one of that behind each."""
        return cls("find", names=[*names, *map(first_of_state, names)] if state else names)

    def found(self, done: Sequence[bool], state: int) -> list[bytes]:
        """The names of the pages that `find` was to look for and that are there, before the first that is not. Where a
        `state` has so many pages, of those up to the last one with a state, and of that."""
        if not state:
            return list(compress(self.names, takewhile(bool, done)))
        half = len(self.names) // 2
        run = sum(takewhile(bool, done[:half]))
        last = next((count for count in range(run, 0, -1) if done[half + count - 1]), 0)
        return [*self.names[:last], *state_names(self.names[last - 1], state)] if last else []

    def parts(self, most: int, state: int) -> "list[Ticket]":
        """What goes up, in parts of `most` pages; the last `state` pages are parts of their own in any case."""
        stride, found = len(self.key) // len(self.pages), list[Ticket]()
        cut = max(0, len(self.pages) - state)
        begins = sorted({*range(0, cut, most), *range(cut, len(self.pages), most)})
        for at, end in pairwise([*begins, len(self.pages)]):
            nodes = [] if at else self.nodes
            key = self.key[at * stride : end * stride]
            part = Ticket("up", self.places[at:end], self.pages[at:end], nodes, self.names, self.first + at, key)
            if found:
                found[-1].then = part
            found.append(part)
        return found


@dataclass(slots=True)
class TierCounts:
    """Pages that moved, and that were not moved because there was no room (`refused`), something `failed`, or they are
    `computed` sooner than a store gives them.

    Those that went up are told apart by where they had come `from`. The device had `from_device` of those that prompts
    began with, so that none had to come up for them."""

    down: int = 0
    from_device: int = 0
    from_host: int = 0
    from_store: int = 0
    kept: int = 0
    fetched: int = 0
    refused: int = 0
    failed: int = 0
    computed: int = 0
    store_pages: int = 0
    store_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by way
    # What the stores count themselves, by their names for it: of this life of the device, and of those before.
    store: dict[str, int] = field(default_factory=dict)
    store_before: dict[str, int] = field(default_factory=dict)

    def tell(self, way: Way, message: Moved) -> None:
        """What a move took, and what a store says of itself."""
        self.seconds[way] = self.seconds.get(way, 0.0) + message.seconds
        if message.held >= 0:
            self.store_pages, self.store_bytes = message.held, max(0, message.held_bytes)
            # Answers may overtake each other, and ranks that fail tell nothing; but what is counted only grows.
            known = self.store
            self.store = {**known, **{name: max(at, known.get(name, 0)) for name, at in message.counts.items()}}

    @property
    def stores(self) -> dict[str, int]:
        """What they have counted in all lives."""
        return summed(self.store_before, self.store)
