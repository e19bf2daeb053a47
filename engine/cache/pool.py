"""The free pages of the KV cache, as numbers. Owners keep track of the pages that are not free.

Pages are taken in the order of their numbers as long as all are free, and in the order in which they were given back
once they were. So the pages of a text are mostly neighbours, which one copy moves (worker/transfers.py).

Each page belongs to exactly one of the free list, the radix tree and one request. A page may be freed while
steps already sent still touch it: steps run on the device in the order sent, so the next owner writes the page only
after them.

Left out: page contents and bytes (the worker's), reference counts (the tree's locks).
"""

from collections.abc import Iterable, Sequence


class PagePool:
    """`size` pages, numbered from 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))  # a stack: its end is taken first
        self._taken = bytearray(size)

    @property
    def taken(self) -> bytes:
        """A 1 for each page that is taken, by number."""
        return bytes(self._taken)

    @property
    def free_pages(self) -> int:
        """How many pages can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Take `count` pages, in order; None, and nothing taken, when there are not so many."""
        if count > len(self._free):
            return None
        border = len(self._free) - count
        pages = self._free[: border - 1 if border else None : -1]
        del self._free[border:]
        for page in pages:
            self._taken[page] = 1
        return pages

    def give(self, pages: Sequence[int]) -> None:
        """Take back pages that `take` gave out, to be taken again in this order."""
        for page in pages:
            assert self._taken[page], f"page {page} is freed twice"
            self._taken[page] = 0
        self._free += reversed(pages)

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert that the `owners`' pages are the taken ones, each owned once."""
        owned = [page for pages in owners for page in pages]
        assert len(owned) == len(set(owned)), "a page has two owners"
        taken = {page for page, is_taken in enumerate(self._taken) if is_taken}
        assert set(owned) == taken, f"pages leaked: {sorted(taken - set(owned))}, stolen: {sorted(set(owned) - taken)}"
        assert len(self._free) == len(set(self._free)) == self.size - len(taken), "the free list is wrong"
