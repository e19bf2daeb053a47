"""A table from blocks to marks, in Python: what the index of prefixes (index.py) stands on where there is no compiler.

A mark is a bit, and each slot has three side by side. A mark is free, or it counts, or it is retired: then it counts no
more, and a walk over the table, in small pieces, takes it off the blocks and frees it. The walk also takes out blocks
that have no marks left. table.c does the same in C (compiled_table.py). Left out: whose a slot is, and when a mark is
retired.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice

MARKS = 3  # of a slot
SLOTS = 21  # in a word of 64 bits


def bit_of(slot: int, mark: int) -> int:
    """Which bit the mark `mark` of `slot` is. No slot's marks lie in two words."""
    return 64 * (slot // SLOTS) + MARKS * (slot % SLOTS) + mark


class Table:
    """Marks by block. A block is an integer of 64 bits, a mark the number of its bit."""

    def __init__(self) -> None:
        self._marks: dict[int, int] = {}
        self._blocks: list[int] = []  # the keys, in no order, to walk over while they change
        self._alike: dict[int, int] = {}  # marks that many blocks have, each once: they would take most of the memory
        self._valid = 0  # marks that count
        self._ones = 0  # the first mark of each slot that ever had one that counts
        self._retired = 0  # marks to be taken off
        self._walking = 0  # those of them that the walk under way takes off
        self._at = 0  # blocks that it still has to come by
        self._unmarked = 0  # blocks without marks

    def __len__(self) -> int:
        """Blocks in the table."""
        return len(self._marks)

    # ── marks ────────────────────────────────────────────────────────────────────────────────

    def use(self, bit: int) -> None:
        """A free mark counts from now on."""
        self._valid |= 1 << bit
        self._ones |= 1 << (bit - bit % 64 % MARKS)

    def retire(self, bit: int, *, somewhere: bool) -> None:
        """A mark counts no more. If it is `somewhere`, on any block, it is not free before a walk has taken it off."""
        self._valid &= ~(1 << bit)
        self._retired |= somewhere << bit

    def retired(self, bit: int) -> bool:
        """Whether a mark is still to be taken off."""
        return bool(self._retired >> bit & 1)

    # ── finding ──────────────────────────────────────────────────────────────────────────────

    def lengths(self, blocks: Sequence[int]) -> dict[int, int]:
        """How many of `blocks`, from the first on, each slot has marks on that has any on the first.

        What has marks on a long prefix has them on the shorter ones, so the slots on 1, 2, … n blocks are fewer and
        fewer. Where they become fewer is found by bisection: n blocks and k different lengths take k log n look-ups."""
        held: dict[int, int] = {}
        if not blocks or not (first := self._marked_by(blocks[0])):
            return held
        spans = [(1, first, len(blocks) + 1, 0)]  # of blocks: how many, whose marks are on them; how many more, whose
        while spans:
            low, holding, high, beyond = spans.pop()
            while holding != beyond and high - low > 1:
                middle = (low + high) // 2
                seen = self._marked_by(blocks[middle - 1]) & holding
                spans.append((low, holding, middle, seen))
                low, holding = middle, seen
            ending = holding & ~beyond
            while ending:
                bit = ending.bit_length() - 1
                ending ^= 1 << bit
                held[SLOTS * (bit // 64) + bit % 64 // MARKS] = low  # of two of a slot the smaller one stays
        return held

    def _marked_by(self, block: int) -> int:
        """Whose marks that count are on `block`: the first bit of each slot."""
        marks = self._marks.get(block, 0) & self._valid
        return (marks | marks >> 1 | marks >> 2) & self._ones

    def leading(self, blocks: Sequence[int], bit: int) -> int:
        """How many of `blocks`, from the first on, have a mark."""
        get, mark = self._marks.get, 1 << bit
        return bisect_left(blocks, True, key=lambda block: not get(block, 0) & mark)

    # ── changing ─────────────────────────────────────────────────────────────────────────────

    def mark(self, blocks: Sequence[int], start: int, bit: int, most: int) -> int:
        """Put a mark on those of `blocks` from `start` on that do not have it, at most on so many; on how many."""
        mark, table, alike = 1 << bit, self._marks, self._alike
        count = 0
        if len(alike) > 4096:
            alike.clear()
        for block in islice(blocks, start, None):
            if count >= most:
                break
            marks = table.get(block)
            if marks is None:
                self._blocks.append(block)
                marks = 0
            elif not marks:
                self._unmarked -= 1
            elif marks & mark:
                continue
            marks |= mark
            table[block] = alike.setdefault(marks, marks)
            count += 1
        return count

    def unmark(self, blocks: Sequence[int], bit: int, *, trailing: bool) -> int:
        """Take a mark off `blocks`; off how many. With `trailing`, begin at the last, and end at the first without it.
        A block without marks stays until a walk comes by."""
        mark, count = 1 << bit, 0
        for block in reversed(blocks):
            marks = self._marks.get(block, 0)
            if marks & mark:
                marks &= ~mark
                self._marks[block] = marks
                self._unmarked += not marks
                count += 1
            elif trailing:
                break
        return count

    def tidy(self, most: int) -> bool:
        """Walk over at most `most` blocks and take off retired marks; True while more is left."""
        if not self._at:
            if not self._retired and self._unmarked * 4 <= len(self._blocks):
                return False
            self._walking, self._at = self._retired, len(self._blocks)
        blocks, table, keep = self._blocks, self._marks, ~self._walking
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
            self._retired &= ~self._walking
            self._walking = 0
        return bool(end or self._retired)

    def check_integrity(self) -> dict[int, int]:
        """Assert what always holds, and tell on how many blocks each mark is that counts."""
        assert sorted(self._blocks) == sorted(self._marks), "the walk would miss a block, or come by one twice"
        assert not self._valid & self._retired
        assert sum(not marks for marks in self._marks.values()) == self._unmarked
        bits = self._valid | self._retired
        assert not any(marks & ~bits for marks in self._marks.values()), "a mark is nobody's"
        counts = {bit: 0 for bit in range(self._valid.bit_length()) if self._valid >> bit & 1}
        for bit in counts:
            counts[bit] = sum(marks >> bit & 1 for marks in self._marks.values())
        return counts
