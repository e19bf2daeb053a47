"""Which blocks of texts lie in the cache, kept beside the radix tree, which knows nothing of them.

A router knows a prompt by the hashes of its text in blocks; the tree knows it by keys in pages. Each request brings
both, and how many tokens hold each block:

    text     ├── block a ──┼── block b ──┼── block c ──┤        a is held by page 0, b by page 1, c by page 2
    pages    ├──── 0 ────┼──── 1 ────┼──── 2 ────┼── 3

A block is named at the page that has its last token. It is held while one of the pages that it is named at is in the
tree: all pages before that one are there then, because a prefix is evicted from its end. Two pages name one block where
conversations part in the middle of that page.

A reply's pages have no names until the next turn brings its text; then that request matches them, and names them.
Left out: numbers of changes (log.py); who is told.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from engine.messages.cache import Blocks

MOST_NAMES = 32  # of one page: texts that differ and have the same tokens, such as reasoning that no template writes


class Named:
    """The blocks of one request, and how many leading pages hold each."""

    __slots__ = ("hashes", "pages", "space")

    def __init__(self, blocks: Blocks, page_size: int) -> None:
        self.space = blocks.space
        self.hashes = array("Q", blocks.hashes)
        self.pages = [-(-end // page_size) for end in array("i", blocks.ends)]
        assert len(self.hashes) == len(self.pages), f"{len(self.hashes)} blocks have {len(self.pages)} ends"


class Listener(Protocol):
    """Who is told of changes."""

    def stored(self, space: bytes, hashes: Sequence[int], /) -> None: ...
    def evicted(self, hashes: Sequence[int], /) -> None: ...
    def reset(self) -> None: ...


class HeldBlocks:
    """The blocks of one cache. `listener` is told of each that comes and goes."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._at: dict[int, tuple[bytes, list[int]]] = {}  # by page: the space, and the blocks named there
        self._pages: dict[int, int] = {}  # by block: how many pages name it

    def __len__(self) -> int:
        return len(self._pages)

    def name(self, named: Named, pages: Sequence[int], shared: int) -> None:
        """The first `shared` of `pages` are in the tree and hold the beginning of the prompt that `named` is of."""
        end = bisect_right(named.pages, shared)
        begin = end
        # Who named a block at this page has named those before it at this page and at those above it.
        while begin and not self._is_named(named.hashes[begin - 1], pages[named.pages[begin - 1] - 1]):
            begin -= 1
        new: list[int] = []
        for index in range(begin, end):
            page, block = pages[named.pages[index] - 1], named.hashes[index]
            _, blocks = self._at.setdefault(page, (named.space, []))
            if block in blocks:
                continue
            if len(blocks) == MOST_NAMES:
                break
            blocks.append(block)
            count = self._pages[block] = self._pages.get(block, 0) + 1
            if count == 1:
                new.append(block)
        if new:
            self._listener.stored(named.space, new)

    def _is_named(self, block: int, page: int) -> bool:
        at = self._at.get(page)
        return at is not None and block in at[1]

    def forget(self, pages: Iterable[int]) -> None:
        """`pages` are in the tree no longer."""
        gone: list[int] = []
        for page in pages:
            _, blocks = self._at.pop(page, (b"", ()))
            for block in blocks:
                count = self._pages[block] = self._pages[block] - 1
                if not count:
                    del self._pages[block]
                    gone.append(block)
        if gone:
            self._listener.evicted(gone)

    def reset(self) -> None:
        """The tree is empty."""
        self._at.clear()
        self._pages.clear()
        self._listener.reset()

    def all(self) -> Iterator[tuple[bytes, list[int]]]:
        """All blocks that are held, by space."""
        spaces: dict[bytes, dict[int, None]] = {}
        for space, blocks in self._at.values():
            spaces.setdefault(space, {}).update(dict.fromkeys(blocks))
        for space, found in spaces.items():
            yield space, list(found)

    def check_integrity(self, pages: Iterable[int], cache: range) -> None:
        """Assert that of the pages of `cache` only those of its tree, `pages`, have names, and these are counted."""
        assert {page for page in self._at if page in cache} <= set(pages), "a page names blocks that is not in the tree"
        counted: dict[int, int] = {}
        for _, blocks in self._at.values():
            for block in blocks:
                counted[block] = counted.get(block, 0) + 1
        assert counted == self._pages, "the pages that name a block are miscounted"
