"""The numbered changes of what the cache holds: the last ones, so that a reader who missed some can catch up.

    kept     … 41 stored │ 42 evicted │ 43 stored │ 44 stored, still growing
    asked    what came after 42? → 43, 44. What came after 7? → a reset, and all that is held

Changes of one kind grow into one until somebody has been told of it. The log is bounded, whoever reads it and however
slowly: a reader whose place is gone is told all that is held, which the cache itself bounds. Numbers of another life of
the engine are no places in this log, as long as it `begins` at a number that the life before did not reach.
"""

from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from engine.cache.blocks import HeldBlocks
from engine.messages.cache import CacheChange, CacheChanges, Kind

MOST_KEPT = 1 << 16  # blocks, in all changes together; each change counts as one more


class CacheLog:
    """The changes of one cache, of which it has at most `most` blocks. Make it the listener of its HeldBlocks."""

    def __init__(self, begins: int = 0, most: int = MOST_KEPT) -> None:
        self.last = begins  # number of the last change
        self.size = 0
        self._most = most
        self._changes: deque[tuple[Kind, bytes, array[int]]] = deque()
        self._told = True  # of the last change

    # ── as HeldBlocks tells it ───────────────────────────────────────────────────────────────

    def stored(self, space: bytes, hashes: Sequence[int]) -> None:
        self._add("stored", space, hashes)

    def evicted(self, hashes: Sequence[int]) -> None:
        self._add("evicted", b"", hashes)

    def reset(self) -> None:
        self._changes.clear()
        self.size = 0
        self._told = True
        self._add("reset", b"", ())

    def _add(self, kind: Kind, space: bytes, hashes: Sequence[int]) -> None:
        if not self._told and self._changes[-1][:2] == (kind, space):
            self._changes[-1][2].extend(hashes)
        else:
            self._changes.append((kind, space, array("Q", hashes)))
            self._told = False
            self.last += 1
            self.size += 1
        self.size += len(hashes)
        while self.size > self._most and self._changes:
            self.size -= 1 + len(self._changes.popleft()[2])
        self._told = self._told or not self._changes

    # ── as a reader asks ─────────────────────────────────────────────────────────────────────

    def since(self, after: int, held: HeldBlocks) -> CacheChanges:
        """What came after the change `after`, or if that is not known any more, all that is `held`."""
        self._told = True
        first = self.last - len(self._changes)  # the number before the first change that is kept
        if not first <= after <= self.last:
            return CacheChanges(after, self.last, (CacheChange("reset"), *_all_of(held)))
        kept = list(self._changes)[after - first :]
        changes = tuple(CacheChange(kind, space, hashes.tobytes()) for kind, space, hashes in kept)
        return CacheChanges(after, self.last, changes)


def _all_of(held: HeldBlocks) -> Iterator[CacheChange]:
    for space, blocks in held.all():
        yield CacheChange("stored", space, array("Q", blocks).tobytes())
