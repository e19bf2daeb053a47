"""The pages of one KV cache: those that are free, and those of prefixes, which nobody may use any more."""

from engine.cache.pool import PagePool
from engine.cache.radix import RadixTree


class Pages:
    """`count` pages of `page_size` tokens, in the `pool` or owned; the `tree` knows the prefixes that they hold."""

    def __init__(self, count: int, page_size: int) -> None:
        self.pool = PagePool(count)
        self.tree = RadixTree(page_size)

    @property
    def available(self) -> int:
        """Pages that can be had without taking them from anyone."""
        return self.pool.free_pages + self.tree.evictable

    def take(self, count: int) -> list[int]:
        """`count` of the available pages: prefixes that nobody uses are forgotten where too few are free."""
        shortage = count - self.pool.free_pages
        if shortage > 0:
            self.pool.give(self.tree.evict(shortage))
        pages = self.pool.take(count)
        assert pages is not None, "more pages are taken than are available"
        return pages

    def flush(self) -> tuple[int, int]:
        """Forget prefixes that nobody uses: pages freed, and pages still in use."""
        freed = self.tree.evict(self.tree.evictable)
        self.pool.give(freed)
        return len(freed), self.pool.size - self.pool.free_pages
