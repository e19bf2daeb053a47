"""Which rows of a decode step share a prefix, seen from the page tables: rows that have the same page at the same place
have all pages before it in common, because pages are shared by whoever begins alike and by nobody else.

    row 0: a b c d . .        at place 1: {0, 1, 3} share 2 pages, saving 4 reads of a page
    row 1: a b c e . .        at place 2: {0, 1} share 3 pages, saving 3
    row 2: f g . . . .
    row 3: a b h . . .

The place with the largest saving divides the rows, and each part's prefix is then as long as it goes. Left out:
prefixes within prefixes, where a tree of them would save more.
"""

import numpy as np

from engine.layers.attention import Prefix

LEAST_ROWS = 16  # of a step that is looked at
LEAST_SAVED = 8192  # positions that need not be read; what sharing costs besides is worth as many
LEAST_SHARE = 0.25  # of all that a step reads


class SharedPrefixes:
    """The page table of each slot, on the host, and what steps have found in it."""

    def __init__(self, slots: int, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self._table = np.zeros((slots, pages), np.int32)
        self._known: tuple[bytes, tuple[Prefix, ...]] = (b"", ())

    def apply(self, pages: np.ndarray, admitted: bool) -> None:
        """As a StepPlan says: `pages` [n, 3] are slot, index, page; whether slots have been `admitted` anew."""
        slot, index, page = pages.T
        self._table[slot, index] = page
        if admitted:
            self._known = (b"", ())

    def find(self, slots: np.ndarray, starts: np.ndarray) -> tuple[Prefix, ...]:
        """Prefixes of two rows or more, disjoint, for rows that compute position `starts[r]` of `slots[r]`, or a later
        one ([R] int64); none where they would save little. Until a slot is admitted the same slots have the same
        prefixes."""
        if len(slots) < LEAST_ROWS:
            return ()
        key = slots.tobytes()
        if self._known[0] != key:
            self._known = (key, self._find(slots, starts))
        return self._known[1]

    def _find(self, slots: np.ndarray, starts: np.ndarray) -> tuple[Prefix, ...]:
        counts = starts // self.page_size  # whole pages that the cache holds
        lines = self._table[slots, : int(counts.max(initial=0))]
        best, parts = 0, []
        for place in _places(lines.shape[1]):
            rows = np.flatnonzero(counts > place)
            order = rows[np.argsort(lines[rows, place], kind="stable")]
            borders = np.flatnonzero(np.diff(lines[order, place])) + 1
            saved = (len(order) - len(borders) - 1) * (place + 1)
            if saved > best:
                best, parts = saved, np.split(order, borders)
        if best * self.page_size < max(LEAST_SAVED, LEAST_SHARE * starts.sum()):
            return ()
        return tuple(self._prefix(np.sort(part), lines, counts) for part in parts if len(part) > 1)

    def _prefix(self, rows: np.ndarray, lines: np.ndarray, counts: np.ndarray) -> Prefix:
        shortest = int(counts[rows].min())
        same = (lines[rows, :shortest] == lines[rows[0], :shortest]).all(axis=0)
        pages = shortest if same.all() else int(same.argmin())
        return Prefix(rows, pages * self.page_size)


def _places(pages: int) -> list[int]:
    """Places to look at, closer to each other where prefixes are short."""
    places = [2**power - 1 for power in range(2, pages.bit_length())]
    between = [3 * 2**power - 1 for power in range(1, pages.bit_length()) if 3 * 2**power <= pages]
    return sorted({*places, *between} or ({pages - 1} if pages else set()))
