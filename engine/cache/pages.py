"""The pages of one device's cache: free ones in the pool, cached ones in the tree, and what a router is told of these.

Pages leave the tree here only, so the blocks of texts that lie in them (blocks.py) are never out of date.
Nobody is told of anything unless there is a `held`. Several caches may share one: it knows the pages of each by numbers
of their own, from `first` on. Pages that other requests wait for may come up from `tiers` below.
"""

from collections.abc import Sequence
from typing import Self

from engine.cache.blocks import HeldBlocks, Named
from engine.cache.pins import Pins
from engine.cache.pool import PagePool
from engine.cache.radix import Node, RadixTree
from engine.cache.tiers import TierOptions, Tiers
from engine.messages.cache import Blocks


class CachePages:
    """`size` pages of `page_size` tokens, all free; `held` is emptied."""

    def __init__(
        self,
        size: int,
        page_size: int,
        held: HeldBlocks | None = None,
        first: int = 0,
        tiers: TierOptions | None = None,
    ) -> None:
        self.pool = PagePool(size)
        self.tree = RadixTree(page_size)
        self.tiers = None if tiers is None else Tiers(tiers, self.tree, self.pool)
        self.pins = Pins(self.tree)
        self._page_size = page_size
        self._held = held
        self._first = first
        if held is not None:
            held.reset()

    def afresh(self) -> Self:
        """As many pages, all of them free."""
        fresh = type(self)(self.pool.size, self._page_size, self._held, self._first)
        fresh.pins = Pins(fresh.tree, self.pins.released)
        if self.tiers is not None:
            fresh.tiers = Tiers(self.tiers.options, fresh.tree, fresh.pool, before=self.tiers)
        return fresh

    @property
    def available(self) -> int:
        """Pages that can be had without retracting anyone; some may be pinned until they are taken."""
        return self.pool.free_pages + self.tree.evictable

    def take(self, count: int) -> list[int]:
        """`count` of the available pages."""
        shortage = count - self.pool.free_pages
        if shortage > 0:
            self.evict(shortage)
        pages = self.pool.take(count)
        assert pages is not None, "more pages are taken than are available"
        return pages

    def evict(self, count: int) -> int:
        """Free `count` cached pages that nobody uses, or all there are; how many were freed. Pinned ones come last."""
        freed = self.tree.evict(count)
        while len(freed) < count and self.tree.evictable:
            self.pins.drop()
            freed += self.tree.evict(count - len(freed))
        if self.tiers is not None:
            self.tiers.evicted(freed)
        self._free(freed)
        return len(freed)

    def forget(self, key: bytes, salt: bytes) -> bool:
        """Free all pages of texts that begin with `key`, which need not be whole pages, from the one on where it ends.
        False where some of them are in use; then none is freed."""
        nodes = self.tree.below(key, salt)
        if any(node.locks for node in nodes):
            return False
        self.remove(nodes)
        return True

    def remove(self, nodes: list[Node]) -> None:
        """Free the pages of `nodes`, which nobody locks, with all that go on from them."""
        self.pins.let_go(nodes)
        freed = self.tree.remove(nodes)
        if self.tiers is not None:
            self.tiers.device.forget(freed)
        self._free(freed)

    def _free(self, pages: list[int]) -> None:
        """The tree has these no more."""
        if self._held is not None:
            self._held.forget(self._first + page for page in pages)
        self.pool.give(pages)

    def flush(self) -> tuple[int, int]:
        """Free all cached pages that nobody uses: how many, and pages still in use. Tiers below are emptied, too."""
        if self.tiers is not None:
            self.tiers.clear()
        self.pins.clear()
        self._free(freed := self.tree.clear())
        return len(freed), self.pool.size - self.pool.free_pages

    def named(self, blocks: Blocks | None) -> Named | None:
        """What a prompt's `blocks` are here; None where nobody is told of them."""
        return None if blocks is None or self._held is None else Named(blocks, self._page_size)

    def name(self, named: Named, pages: Sequence[int], shared: int) -> None:
        """The first `shared` of `pages` are in the tree and hold the beginning of the prompt that `named` is of."""
        assert self._held is not None, "nobody is told of blocks"
        self._held.name(named, [self._first + page for page in pages] if self._first else pages, shared)

    def check_integrity(self) -> None:
        """Assert that what is told of is in the tree, and that what lies below fits together."""
        if self.tiers is not None:
            self.tiers.check_integrity(page for node in self.tree.nodes() for page in node.pages)
        if self._held is not None:
            pages = (self._first + page for node in self.tree.nodes() for page in node.pages)
            self._held.check_integrity(pages, range(self._first, self._first + self.pool.size))
