"""Which worker holds which prefix: one table from blocks of text to marks of workers.

A block is named by a hash that covers it and all text before it (engine/conversation/canonical.py), so the table needs
no tree: that a prefix of n blocks is held is said by its n-th block alone. Its value is an integer with three bits for
each worker, its marks. A block is held by a worker that has any of its marks there.

    block   worker 2  worker 1  worker 0           A worker that tells what is in its cache: mark 0 is what it told,
    8f3a…      000       001       110             mark 1 what it will have, of requests on their way to it.
    11d0…      010       001       000             One that does not: the marks are generations of what was sent to it.

What holds a long prefix holds the shorter ones, so the workers that hold 1, 2, … n blocks are fewer and fewer. Where
they become fewer is found by bisection: a request of n blocks and k different lengths asks for k log n of them, not n.

Generations stand for the least recently used order. What is sent marks the whole prefix with the youngest one. Once
that has marked half of what a worker may have, the older one is retired, and the youngest becomes the older. A retired
mark counts no more at once; `tidy` takes it off the blocks in small pieces. Until then the worker cannot retire another
one, and is learnt no more of than it may have. So memory is bounded even if `tidy` is never called.

Left out: what a cache does that drops the beginning of a prefix before its end (its length is then said too long, until
the end goes too); recency in finer steps than half of the bound.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import islice

MARKS = 3  # of a worker: the youngest generation, the older one, one that is being taken off
TOLD, COMING = 0, 1  # the marks of a worker that tells what is in its cache
LEAST = 64  # blocks that a worker may have, at least


class Holder:
    """What the index knows of one worker. `slot` is the place of its marks."""

    __slots__ = ("counts", "limit", "slot", "tells", "young")

    def __init__(self, slot: int, limit: int) -> None:
        self.slot = slot
        self.limit = limit  # blocks that it may have
        self.young = 0  # the mark of the youngest generation
        self.counts = [0] * MARKS  # blocks that each mark is on
        self.tells = False  # it tells what is in its cache

    def bit(self, mark: int) -> int:
        return 1 << (MARKS * self.slot + mark)


class PrefixIndex:
    """Prefixes by worker, in blocks. Of each worker at most `limit` blocks are known.

    `blocks` are chained hashes of a text from its beginning on, integers of 64 bits. A worker is any name; one that was
    not heard of before holds nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = max(LEAST, limit)
        self._table: dict[int, int] = {}  # marks by block
        self._blocks: list[int] = []  # the table's keys, in no order, to walk over while it changes
        self._alike: dict[int, int] = {}  # marks that many blocks have, each once: they would take most of the memory
        self._holders: dict[str, Holder] = {}
        self._free: list[int] = []  # slots without marks
        self._names: list[str] = []  # whose each slot is, or was last
        self._valid = 0  # marks that count
        self._ones = 0  # the first mark of each slot
        self._retired = 0  # marks to be taken off
        self._walking = 0  # those of them that the walk under way takes off
        self._at = 0  # blocks that it still has to come by
        self._unmarked = 0  # blocks without marks, at most

    # ── finding ──────────────────────────────────────────────────────────────────────────────

    def lengths(self, blocks: Sequence[int]) -> dict[str, int]:
        """How many of `blocks`, from the first on, each worker holds that holds any."""
        held, names = {}, self._names
        for count, ending in self._ends(blocks):
            while ending:
                place = ending.bit_length() - 1
                ending ^= 1 << place
                held[names[place // MARKS]] = count
        return held

    def _ends(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """(n, the workers that hold n blocks and no more) for each such n but 0, the greatest first."""
        found: list[tuple[int, int]] = []
        if not blocks or not (first := self._holding(blocks[0])):
            return found
        get, valid, ones = self._table.get, self._valid, self._ones
        spans = [(1, first, len(blocks) + 1, 0)]  # of blocks: how many, who holds as many; how many more, who as many
        while spans:
            low, holding, high, beyond = spans.pop()
            while holding != beyond and high - low > 1:
                middle = (low + high) // 2
                marks = get(blocks[middle - 1], 0) & valid
                seen = (marks | marks >> 1 | marks >> 2) & ones & holding
                spans.append((low, holding, middle, seen))
                low, holding = middle, seen
            if ending := holding & ~beyond:
                found.append((low, ending))
        return found

    def _holding(self, block: int) -> int:
        """Who holds `block`: the first mark's place of each slot."""
        marks = self._table.get(block, 0) & self._valid
        return (marks | marks >> 1 | marks >> 2) & self._ones

    # ── what was sent, and what came of it ───────────────────────────────────────────────────

    def sent(self, blocks: Sequence[int], worker: str) -> None:
        """A prompt of `blocks` is on its way to `worker`, which will hold it."""
        holder = self._holder(worker)
        if holder.tells:
            self._mark(holder, blocks, self._marked(holder.bit(TOLD), blocks), COMING)
            return
        half = holder.limit // 2
        start = self._marked(holder.bit(holder.young), blocks)
        if start < len(blocks) and holder.counts[holder.young] >= half:
            if not self._age(holder):
                return
            start = 0
        self._mark(holder, blocks, start, holder.young)

    def computed(self, blocks: Sequence[int], worker: str) -> None:
        """The prompt of `blocks` is on its way to `worker` no more. If that tells, it has told what it holds of it."""
        holder = self._holders.get(worker)
        if holder is None or not holder.tells:
            return
        bit = holder.bit(COMING)
        for block in reversed(blocks):
            if not self._unmark(block, bit):
                break
            holder.counts[COMING] -= 1

    def shrink(self, worker: str) -> None:
        """`worker` holds less than is thought: forget its older generation, and let it have less from now on."""
        holder = self._holders.get(worker)
        if holder is not None and not holder.tells and self._age(holder):
            holder.limit = max(LEAST, holder.limit * 3 // 4)

    def grow(self, worker: str) -> None:
        """`worker` holds what is thought: let it have a little more."""
        if (holder := self._holders.get(worker)) is not None:
            holder.limit = min(self.limit, holder.limit + holder.limit // 64)

    # ── what workers tell ────────────────────────────────────────────────────────────────────

    def stored(self, blocks: Iterable[int], worker: str) -> None:
        """`worker` told that it now holds `blocks`, with all before them."""
        holder = self._holder(worker)
        if not holder.tells:
            holder = self.reset(worker)
            holder.tells = True
        self._mark(holder, list(blocks), 0, TOLD)

    def evicted(self, blocks: Iterable[int], worker: str) -> None:
        """`worker` told that it no longer holds `blocks`."""
        holder = self._holder(worker)
        bit = holder.bit(TOLD)
        if holder.tells:
            holder.counts[TOLD] -= sum(self._unmark(block, bit) for block in blocks)

    def reset(self, worker: str) -> Holder:
        """What `worker` holds is not known: nothing, until more is sent to it or it tells."""
        self.removed(worker)
        return self._holder(worker)

    def removed(self, worker: str) -> None:
        """`worker` has gone."""
        if (holder := self._holders.pop(worker, None)) is not None:
            for mark in range(MARKS):
                self._retire(holder, mark)
            if not self._retired & 7 * holder.bit(0):
                self._free.append(holder.slot)

    # ── marks ────────────────────────────────────────────────────────────────────────────────

    def _holder(self, worker: str) -> Holder:
        if (holder := self._holders.get(worker)) is None:
            if not self._free:
                self._free.append(len(self._names))
                self._ones |= 1 << (MARKS * len(self._names))
                self._names.append("")
            holder = self._holders[worker] = Holder(self._free.pop(), self.limit)
            self._names[holder.slot] = worker
            self._valid |= 7 * holder.bit(0)
        return holder

    def _marked(self, bit: int, blocks: Sequence[int]) -> int:
        """How many of `blocks`, from the first on, have the mark `bit`."""
        get = self._table.get
        return bisect_left(blocks, True, key=lambda block: not get(block, 0) & bit)

    def _mark(self, holder: Holder, blocks: Sequence[int], start: int, mark: int) -> None:
        """Put `mark` on `blocks` from `start` on, as far as its holder may have them."""
        bit, table, alike = holder.bit(mark), self._table, self._alike
        room = holder.limit // (1 if holder.tells else 2) - holder.counts[mark]
        count = 0
        if len(alike) > 4096:
            alike.clear()
        for block in islice(blocks, start, None):
            if count >= room:
                break
            marks = table.get(block)
            if marks is None:
                self._blocks.append(block)
                marks = 0
            elif not marks:
                self._unmarked -= 1
            elif marks & bit:
                continue
            marks |= bit
            table[block] = alike.setdefault(marks, marks)
            count += 1
        holder.counts[mark] += count

    def _unmark(self, block: int, bit: int) -> bool:
        """Take a mark off `block`; False if it is not there. A block without marks stays until a walk comes by."""
        marks = self._table.get(block, 0)
        if not marks & bit:
            return False
        marks &= ~bit
        self._table[block] = marks
        self._unmarked += not marks
        return True

    # ── forgetting ───────────────────────────────────────────────────────────────────────────

    def _age(self, holder: Holder) -> bool:
        """Begin a new generation and retire the older one; False if the mark for it is not free yet."""
        young = (holder.young + 1) % MARKS
        if self._retired & holder.bit(young):
            return False
        self._retire(holder, (holder.young + 2) % MARKS)
        holder.young = young
        self._valid |= holder.bit(young)
        return True

    def _retire(self, holder: Holder, mark: int) -> None:
        self._valid &= ~holder.bit(mark)
        if holder.counts[mark]:
            self._retired |= holder.bit(mark)
            holder.counts[mark] = 0

    def tidy(self, most: int) -> bool:
        """Walk over at most `most` blocks and take off retired marks; True while more is left."""
        if not self._at:
            if not self._retired and self._unmarked * 4 <= len(self._blocks):
                return False
            self._walking, self._at = self._retired, len(self._blocks)
        blocks, table, keep = self._blocks, self._table, ~self._walking
        end = max(0, self._at - most)
        for index in range(self._at - 1, end - 1, -1):
            block = blocks[index]
            marks = table[block]
            if kept := marks & keep:
                if kept != marks:
                    table[block] = self._alike.setdefault(kept, kept)
                continue
            self._unmarked -= not marks
            del table[block]
            blocks[index] = blocks[-1]  # one that the walk has come by, or that came since
            blocks.pop()
        self._at = end
        if not end:
            self._free_marks()
        return bool(end or self._retired)

    def _free_marks(self) -> None:
        """The walk is over: what it took off may be used again."""
        self._retired &= ~self._walking
        self._walking = 0
        used = {holder.slot for holder in self._holders.values()}
        free = {slot for slot in range(len(self._names)) if not self._retired >> (MARKS * slot) & 7}
        self._free = sorted(free - used, reverse=True)

    # ── looking ──────────────────────────────────────────────────────────────────────────────

    def __len__(self) -> int:
        """Blocks in the table."""
        return len(self._table)

    def held(self, worker: str) -> int:
        """Blocks that `worker` is thought to hold; one of two generations counts twice."""
        return sum(self._holders[worker].counts) if worker in self._holders else 0

    def check_integrity(self) -> None:
        """Assert what always holds: keys and counts fit the table, and no mark is both valid and retired."""
        assert sorted(self._blocks) == sorted(self._table), "the walk would miss a block, or come by one twice"
        assert not self._valid & self._retired
        assert sum(not marks for marks in self._table.values()) == self._unmarked
        bits = self._valid | self._retired
        assert not any(marks & ~bits for marks in self._table.values()), "a mark is nobody's"
        for holder in self._holders.values():
            for mark, count in enumerate(holder.counts):
                bit = holder.bit(mark)
                if self._valid & bit:
                    assert count == sum(bool(marks & bit) for marks in self._table.values()), "a count is wrong"
                assert count <= holder.limit
