"""Masks on the device: a table of lines, of which those of states that have been met before are found again.

    state of a row ──> line     known: nothing is filled and nothing goes up but the number of the line
                       no line: the one that was used the longest ago is written anew

Lines are written between two steps, when all that were launched have been waited for as far as their masks: nothing
still reads a line that is given away. On a CPU they are written in place. Left out: telling apart masks that are equal.
"""

from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from engine.kernels.logits.reference import mask_words
from engine.layers.batch import upload

ROOM = 64 << 20  # bytes of masks
MOST_LINES = 4096
ENDS, ALL, FIXED = 0, 1, 2  # what ends a reply, and everything; then a line for each row
NEVER = np.iinfo(np.int64).max

Lines = dict[Hashable, int]  # of one grammar, by state


class MaskTable:
    """`masks` [lines, mask_words] int32, on the device. `only_ends[line]`: it lets nothing through but the end."""

    def __init__(self, vocab_size: int, ends: tuple[int, ...], slots: int, device: torch.device) -> None:
        words = mask_words(vocab_size)
        self._fixed = FIXED + slots
        count = self._fixed + max(2 * slots, min(MOST_LINES, ROOM // (4 * words)))
        self.masks = torch.zeros(count, words, dtype=torch.int32, device=device)
        bits = np.isin(np.arange(32 * words), ends)
        self._ends = np.packbits(bits, bitorder="little").view("<i4")
        self.masks[ENDS] = torch.from_numpy(self._ends).to(device)
        self.masks[ALL] = -1
        self.only_ends = np.zeros(count, bool)
        self._in_place = self.masks.numpy() if device.type == "cpu" else None
        staged = 0 if device.type == "cpu" else slots
        self._staged = np.zeros((staged, words), np.int32)
        self._used = np.zeros(count, np.int64)  # the step that last did
        self._used[: self._fixed] = NEVER
        self._owners: list[tuple[Lines, Hashable] | None] = [None] * count
        self._step = 0
        self.new: list[int] = []  # lines that are to go up

    def begin(self) -> None:
        """A step begins."""
        self._step += 1
        self.new = []

    def touch(self, lines: np.ndarray) -> None:
        """The step uses `lines`."""
        self._used[lines] = self._step

    def take(self, count: int) -> list[int]:
        """Lines for masks that will be remembered, which no other row of the step has: at most one a slot."""
        if not count:
            return []
        oldest = np.argpartition(self._used, count)[:count] if count > 1 else np.array([self._used.argmin()])
        self._used[oldest] = self._step
        lines: list[int] = oldest.tolist()
        for line in lines:
            if (owner := self._owners[line]) is not None:
                del owner[0][owner[1]]
                self._owners[line] = None
        return lines

    def own(self, row: int) -> int:
        """The line for a mask of `row` that nobody will ask for again."""
        return FIXED + row

    def place(self, lines: list[int]) -> tuple[np.ndarray, list[int]]:
        """Where the masks of `lines` are to be written: in which rows of which array."""
        first = len(self.new)
        self.new += lines
        if self._in_place is not None:
            return self._in_place, lines
        return self._staged, list(range(first, len(self.new)))

    def remember(self, line: int, lines: Lines, state: Hashable) -> None:
        """The mask of `line` is that of `state`."""
        lines[state] = line
        self._owners[line] = lines, state

    def forget(self, lines: Lines) -> None:
        """Those of a grammar that is dropped, with all that hangs on its states."""
        for line in lines.values():
            self._owners[line] = None
            self._used[line] = 0
        lines.clear()

    def look(self, line: int, mask: np.ndarray) -> None:
        """See whether `mask`, of `line`, lets through more than the end."""
        self.only_ends[line] = not (mask & ~self._ends).any()

    def send(self, lines: Tensor) -> None:
        """The masks that were written go up; `lines` [len(new)] int64 are `new` on the device."""
        if self._in_place is None and self.new:
            self.masks.index_copy_(0, lines, upload(self._staged[: len(self.new)], self.masks.device))
