"""Prefixes that programs may come back to: pinned until the program ends, for a while, or until their pages are needed.

    a call of a program ends ──keep──> its prefix is locked, in place of the shorter one that the program had before
    a request needs pages    ──drop──> the program that was heard of longest ago loses its pins, and so on

A program is any id that requests name. A pin is a lock of the tree, so what is pinned is not evicted while others'
leaves are. It never stands in the way of a request: pages that only pins hold are given up first. Pure: the clock is
the caller's. Left out: pages of lower tiers.
"""

from collections import Counter, OrderedDict

from engine.cache.radix import Node, RadixTree

SECONDS = 60.0  # after its last call a program is thought to be over
MOST_BRANCHES = 64  # pins of a program: one for each of its forks
MOST_PROGRAMS = 1024


class Pins:
    """The pins of all programs on one tree."""

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        self._programs: OrderedDict[str, tuple[float, dict[Node, None]]] = OrderedDict()  # the last heard of last

    def keep(self, program: str, node: Node, now: float) -> None:
        """A call of `program` ends at `node`, which is locked: it may go on from there."""
        self._expire(now)
        _, nodes = self._programs.pop(program, (0.0, {}))
        self._programs[program] = now, nodes
        if len(self._programs) > MOST_PROGRAMS:
            self.drop()
        if node.parent is None or node in nodes:
            return
        self._tree.lock(node)
        nodes[node] = None
        above: Node | None = node.parent
        while above is not None:  # a longer prefix takes the place of a shorter one
            if above in nodes:
                del nodes[above]
                self._tree.unlock(above)
            above = above.parent
        if len(nodes) > MOST_BRANCHES:
            oldest = next(iter(nodes))
            del nodes[oldest]
            self._tree.unlock(oldest)

    def end(self, program: str) -> None:
        """It will not come back."""
        _, nodes = self._programs.pop(program, (0.0, {}))
        for node in nodes:
            self._tree.unlock(node)

    def drop(self) -> bool:
        """Give up the pins of the program that was heard of longest ago; False if there is none."""
        if not self._programs:
            return False
        self.end(next(iter(self._programs)))
        return True

    def _expire(self, now: float) -> None:
        while self._programs and next(iter(self._programs.values()))[0] < now - SECONDS:
            self.drop()

    @property
    def pages(self) -> int:
        """Pages that nothing but pins holds."""
        pins: Counter[Node] = Counter()
        for node in self.nodes():
            while node.parent is not None:
                pins[node] += 1
                node = node.parent
        return sum(len(node.pages) for node, count in pins.items() if node.locks == count)

    def nodes(self) -> list[Node]:
        """All that are pinned, one for each pin."""
        return [node for _, nodes in self._programs.values() for node in nodes]
