"""Which worker holds which prefix: one table from blocks of text to marks of workers.

A block is named by a hash that covers it and all text before it (engine/conversation/canonical.py), so the table needs
no tree: that a prefix of n blocks is held is said by its n-th block alone. Each worker has a slot with three marks
(table.py). A block is held by a worker that has any of its marks there.

    block   worker 2  worker 1  worker 0           A worker that tells what is in its cache: mark 0 is what it told,
    8f3a…      000       001       110             mark 1 what it will have, of requests on their way to it.
    11d0…      010       001       000             One that does not: the marks are generations of what was sent to it.

Generations stand for the least recently used order. What is sent marks the whole prefix with the youngest one. Once
that has marked half of what a worker may have, the older one is retired, and the youngest becomes the older. A retired
mark counts no more at once; `tidy` takes it off the blocks in small pieces. Until then the worker cannot retire another
one, so what is sent there stays within the bound, whether `tidy` comes in time or not. Blocks that a worker told of and
dropped, and those of one that left, stay in the table without a mark that counts until `tidy` comes by.

Left out: what a cache does that drops the beginning of a prefix before its end (its length is then said too long, until
the end goes too); recency in finer steps than half of the bound.
"""

from collections.abc import Sequence

from engine.router.compiled_table import CompiledTable, table
from engine.router.table import MARKS, Table, bit_of

TOLD, COMING = 0, 1  # the marks of a worker that tells what is in its cache
LEAST = 64  # blocks that a worker may have, at least


class Holder:
    """What the index knows of one worker. Its marks: the youngest generation, the older one, one that is taken off."""

    __slots__ = ("counts", "limit", "slot", "tells", "young")

    def __init__(self, slot: int, limit: int) -> None:
        self.slot = slot
        self.limit = limit  # blocks that it may have
        self.young = 0  # the mark of the youngest generation
        self.counts = [0] * MARKS  # blocks that each mark is on
        self.tells = False  # it tells what is in its cache

    def bit(self, mark: int) -> int:
        return bit_of(self.slot, mark)


class PrefixIndex:
    """Prefixes by worker, in blocks. Of each worker at most `limit` blocks are known.

    `blocks` are chained hashes of a text from its beginning on, integers of 64 bits. A worker is any name; one that was
    not heard of before holds nothing. `marks` is an empty table; by default the fastest that there is here."""

    def __init__(self, limit: int, marks: Table | CompiledTable | None = None) -> None:
        self.limit = max(LEAST, limit)
        self._table = table() if marks is None else marks
        self._holders: dict[str, Holder] = {}
        self._left: list[int] = []  # slots of workers that have left
        self._names: list[str] = []  # whose each slot is, or was last

    def lengths(self, blocks: Sequence[int]) -> dict[str, int]:
        """How many of `blocks`, from the first on, each worker holds that holds any."""
        names = self._names
        return {names[slot]: count for slot, count in self._table.lengths(blocks).items()}

    # ── what was sent, and what came of it ───────────────────────────────────────────────────

    def sent(self, blocks: Sequence[int], worker: str) -> None:
        """A prompt of `blocks` is on its way to `worker`, which will hold it."""
        holder = self._holder(worker)
        if holder.tells:
            self._mark(holder, blocks, self._table.leading(blocks, holder.bit(TOLD)), COMING)
            return
        half = holder.limit // 2
        start = self._table.leading(blocks, holder.bit(holder.young))
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
        holder.counts[COMING] -= self._table.unmark(blocks, holder.bit(COMING), trailing=True)

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

    def stored(self, blocks: Sequence[int], worker: str) -> None:
        """`worker` told that it now holds `blocks`, with all before them."""
        holder = self._holder(worker)
        if not holder.tells:
            holder = self.reset(worker)
            holder.tells = True
        self._mark(holder, blocks, 0, TOLD)

    def evicted(self, blocks: Sequence[int], worker: str) -> None:
        """`worker` told that it no longer holds `blocks`."""
        holder = self._holders.get(worker)
        if holder is not None and holder.tells:
            holder.counts[TOLD] -= self._table.unmark(blocks, holder.bit(TOLD), trailing=False)

    def reset(self, worker: str) -> Holder:
        """What `worker` holds is not known: nothing, until more is sent to it or it tells."""
        self.removed(worker)
        return self._holder(worker)

    def removed(self, worker: str) -> None:
        """`worker` has gone."""
        if (holder := self._holders.pop(worker, None)) is not None:
            for mark in range(MARKS):
                self._retire(holder, mark)
            self._left.append(holder.slot)

    # ── marks ────────────────────────────────────────────────────────────────────────────────

    def _holder(self, worker: str) -> Holder:
        if (holder := self._holders.get(worker)) is None:
            holder = self._holders[worker] = Holder(self._free_slot(), self.limit)
            self._names[holder.slot] = worker
            for mark in range(MARKS):
                self._table.use(holder.bit(mark))
        return holder

    def _free_slot(self) -> int:
        """A slot of which no mark is on any block."""
        for slot in self._left:
            if not any(self._table.retired(bit_of(slot, mark)) for mark in range(MARKS)):
                self._left.remove(slot)
                return slot
        self._names.append("")
        return len(self._names) - 1

    def _mark(self, holder: Holder, blocks: Sequence[int], start: int, mark: int) -> None:
        """Put `mark` on `blocks` from `start` on, as far as its holder may have them."""
        room = holder.limit // (1 if holder.tells else 2) - holder.counts[mark]
        holder.counts[mark] += self._table.mark(blocks, start, holder.bit(mark), room)

    # ── forgetting ───────────────────────────────────────────────────────────────────────────

    def _age(self, holder: Holder) -> bool:
        """Begin a new generation and retire the older one; False if the mark for it is not free yet."""
        young = (holder.young + 1) % MARKS
        if self._table.retired(holder.bit(young)):
            return False
        self._retire(holder, (holder.young + 2) % MARKS)
        holder.young = young
        self._table.use(holder.bit(young))
        return True

    def _retire(self, holder: Holder, mark: int) -> None:
        self._table.retire(holder.bit(mark), somewhere=holder.counts[mark] > 0)
        holder.counts[mark] = 0

    def tidy(self, most: int) -> bool:
        """Walk over about `most` blocks and take off retired marks; True while more is left."""
        return self._table.tidy(most)

    # ── looking ──────────────────────────────────────────────────────────────────────────────

    def __len__(self) -> int:
        """Blocks in the table."""
        return len(self._table)

    def held(self, worker: str) -> int:
        """Blocks that `worker` is thought to hold; one of two generations counts twice."""
        return sum(self._holders[worker].counts) if worker in self._holders else 0

    def check_integrity(self) -> None:
        """Assert what always holds: each count is that of the table."""
        counts = self._table.check_integrity()
        for holder in self._holders.values():
            for mark, count in enumerate(holder.counts):
                assert counts.get(holder.bit(mark), count) == count <= holder.limit, "a count is wrong"
