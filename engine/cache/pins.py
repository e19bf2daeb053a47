"""Prefixes that a program or a session may come back to: the one way in which pages are kept for somebody.

    its request ends ──keep──> the end of its prefix is pinned, in place of the shorter one that it had before
    pages run short  ──drop──> the holder heard of longest ago loses its pins ("released"), and so on

What is pinned is not evicted while anything else is left, but it is no less available: nothing ever waits for a pin to
end. Pure: the caller says what time it is `now`. Left out: the list of sessions (sched/sessions.py); lower tiers.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

from engine.cache.radix import Node, RadixTree

PROGRAM_SECONDS = 60.0  # after its last call a program is thought to be over
MOST_BRANCHES = 64  # pins of a program: one for each of its forks
MOST_HOLDERS = 2048


class Holder(NamedTuple):
    """Whom pages are kept for. Ids are the owner's own, and those of a salt: nobody's is that of somebody else."""

    kind: Literal["program", "session"]
    owner: bytes
    salt: bytes
    id: str


@dataclass(slots=True)
class Held:
    """The ends of what a holder has, until its time is over."""

    until: float = 0.0
    nodes: dict[Node, None] = field(default_factory=dict)


class Pins:
    """All pins on one tree."""

    def __init__(self, tree: RadixTree, released: int = 0) -> None:
        self.now = 0.0  # seconds of the caller's clock
        self.released = released  # holders that gave up before their time
        self._tree = tree
        self._holders: OrderedDict[Holder, Held] = OrderedDict()  # the last heard of last
        self._due = inf  # nobody's time is over before

    def keep(self, holder: Holder, node: Node, seconds: float, most: int) -> None:
        """A request of `holder` ends at `node`, which is pinned: it may go on from there, within so many `seconds`. It
        has `most` pins at most."""
        self._expire()
        if node.parent is None:
            return
        nodes = self._holders.setdefault(holder, Held()).nodes
        self.hear(holder, seconds)
        if node not in nodes:
            self._tree.pin(node)
        nodes.pop(node, None)
        nodes[node] = None
        above: Node | None = node.parent
        while above is not None:  # a longer prefix takes the place of a shorter one
            if above in nodes:
                del nodes[above]
                self._tree.unpin(above)
            above = above.parent
        if len(nodes) > most:
            oldest = next(iter(nodes))
            del nodes[oldest]
            self._tree.unpin(oldest)
        if len(self._holders) > MOST_HOLDERS:
            self.drop()

    def hear(self, holder: Holder, seconds: float) -> None:
        """It has come back: what it has, it keeps for so long from now on."""
        if (held := self._holders.get(holder)) is not None:
            held.until = self.now + seconds
            self._holders.move_to_end(holder)
            self._due = min(self._due, held.until)

    def end(self, holder: Holder) -> bool:
        """It will not come back. False if it has nothing."""
        held = self._holders.pop(holder, Held())
        for node in held.nodes:
            self._tree.unpin(node)
        return bool(held.nodes)

    def release(self, holder: Holder) -> None:
        """It has to give up what it has."""
        self.released += self.end(holder)

    def drop(self) -> None:
        """End those whose time is over; where there are none, release the holder heard of longest ago."""
        if not self._expire():
            self.release(next(iter(self._holders)))

    def _expire(self) -> bool:
        """End those whose time is over, if there are any."""
        if self.now < self._due:
            return False
        over = [holder for holder, held in self._holders.items() if held.until <= self.now]
        for holder in over:
            self.end(holder)
        self._due = min((held.until for held in self._holders.values()), default=inf)
        return bool(over)

    def let_go(self, nodes: Iterable[Node]) -> None:
        """Nobody keeps what ends at these."""
        gone = set(nodes)
        for held in self._holders.values():
            for node in held.nodes.keys() & gone:
                del held.nodes[node]
                self._tree.unpin(node)

    def clear(self) -> None:
        """End all."""
        for holder in list(self._holders):
            self.end(holder)

    def pages(self, holders: Iterable[Holder]) -> int:
        """Pages that are kept for these, each counted once."""
        nodes: set[Node] = set()
        for holder in holders:
            for node in self._holders.get(holder, Held()).nodes:
                while node.parent is not None and node not in nodes:
                    nodes.add(node)
                    node = node.parent
        return sum(len(node.pages) for node in nodes)

    def nodes(self) -> list[Node]:
        """All that are pinned, one for each pin."""
        return [node for held in self._holders.values() for node in held.nodes]
