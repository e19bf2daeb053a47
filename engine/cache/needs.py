"""Which needs for pages wait for which moves. Pure.

    need ──add──> looks for them ──found──> settled, and pages come ──over──> there
                      └──────────── nothing is found ──> settled

A need that is settled lets its request into the queue. What brings its pages is remembered until they are there, so
that nobody fetches what no need waits for any more. Left out: the moves themselves (tiers.py), and until when a need is
waited for (its caller's).
"""

from collections.abc import Iterable, Set


class Needs:
    """By their numbers."""

    def __init__(self) -> None:
        self._finds: dict[int, set[int]] = {}  # the moves that say what a store has of them
        self._fetches: dict[int, set[int]] = {}  # and those that bring it
        self._settled: list[int] = []

    def settled(self) -> list[int]:
        """Those that have nothing to look for any more; each is told once."""
        found, self._settled = self._settled, []
        return found

    def add(self, need: int, finds: set[int], fetches: set[int]) -> None:
        """`need` waits for these moves."""
        if fetches:
            self._fetches[need] = fetches
        if finds:
            self._finds[need] = finds
        else:
            self._settled.append(need)

    def sought(self, find: int) -> bool:
        """Whether any need waits for what this move says."""
        return any(find in finds for finds in self._finds.values())

    def found(self, find: int, fetches: Iterable[int]) -> list[int]:
        """Move `find` has said what there is, which `fetches` bring. The needs that waited for it."""
        needs = [need for need, finds in self._finds.items() if find in finds]
        for need in needs:
            if fetches:
                self._fetches.setdefault(need, set()).update(fetches)
            self._finds[need].remove(find)
            if not self._finds[need]:
                del self._finds[need]
                self._settled.append(need)
        return needs

    def over(self, fetch: int) -> None:
        """Nobody waits for that one."""
        for need, fetches in list(self._fetches.items()):
            fetches.discard(fetch)
            if not fetches:
                del self._fetches[need]

    def give_up(self, need: int) -> set[int]:
        """Nobody waits for it any more. The fetches that no other need waits for."""
        if self._finds.pop(need, None) is not None:
            self._settled.append(need)
        return self._fetches.pop(need, set()).difference(*self._fetches.values())

    def clear(self) -> None:
        """All wait for nothing any more."""
        self._settled += self._finds
        self._finds.clear()
        self._fetches.clear()

    def check_integrity(self, moves: Set[int], come: Set[int]) -> None:
        """Assert that what is waited for is one of `moves`, or is to `come`."""
        assert all(finds <= moves for finds in self._finds.values()), "a need waits for nothing"
        assert all(fetches <= come for fetches in self._fetches.values()), "a need waits for what does not come"
