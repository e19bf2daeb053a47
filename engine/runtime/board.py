"""The board: a few counters of each front in memory that all fronts of an engine share.

    row 0   BEATS  CONNECTIONS  REQUESTS  …      written by front 0 alone, read by all
    row 1   BEATS  CONNECTIONS  REQUESTS  …      and so on: a limit of the whole engine is a sum over a column
    kept 0 …  kept 1 …                           what each front counts for good: the metrics (http/counters.py)

A counter is an aligned 64-bit number that one process writes, so nobody takes a lock. Two fronts may look at a limit in
the same microsecond, and then both let one in. A front that is alone has a board of one row. The row of a front that is
gone is zeroed, and what is kept is not.
"""

import mmap
import os
import tempfile
from enum import IntEnum
from typing import Self

WIDTH = 16  # counters of a row: two lines of a processor's cache, so that fronts do not take them from each other
ROW = 8 * WIDTH  # bytes
KEPT = 8192  # bytes that each front keeps


class Counter(IntEnum):
    """The columns."""

    BEATS = 0  # grows while the front's event loop turns
    CONNECTIONS = 1  # open ones
    REQUESTS = 2  # open ones
    BODY_BYTES = 3  # of request bodies that are being read or decoded
    STORED = 4  # kept responses
    STORED_BYTES = 5
    BACKGROUND = 6  # those of the kept responses that are still being made
    BACKGROUND_BYTES = 7
    OLDEST = 8  # when the first of the kept responses ended, by the monotonic clock in ns; 0 where none has
    VIEWERS = 9  # of /live/events
    OPEN_BYTES = 10  # of the bodies of open requests, those of BODY_BYTES among them


class Board:
    """The counters of `count` fronts, as front `number` sees them; its row begins at zero."""

    def __init__(self, descriptor: int | None = None, number: int = 0, count: int = 1) -> None:
        self.descriptor = descriptor
        self.number = number
        self.count = count
        self._memory = mmap.mmap(-1 if descriptor is None else descriptor, (ROW + KEPT) * count)
        self._cells = memoryview(self._memory)[: ROW * count].cast("q")
        self._own = number * WIDTH

    @classmethod
    def shared(cls, count: int) -> Self:
        """A new board whose `descriptor` other processes inherit; the maker of it only reads, and clears rows."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("engine-board")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, (ROW + KEPT) * count)
        return cls(descriptor, count=count)

    def add(self, counter: Counter, by: int = 1) -> None:
        """Count up, or down, in the row of this front."""
        self._cells[self._own + counter] += by

    def set(self, counter: Counter, value: int) -> None:
        """Write into the row of this front."""
        self._cells[self._own + counter] = value

    def own(self, counter: Counter) -> int:
        """What this front has written."""
        return self._cells[self._own + counter]

    def of(self, number: int, counter: Counter) -> int:
        """What front `number` has written."""
        return self._cells[number * WIDTH + counter]

    def total(self, counter: Counter) -> int:
        """The sum over all fronts."""
        return sum(self._cells[counter::WIDTH])

    def kept(self, number: int) -> memoryview:
        """The bytes that front `number` keeps. A new front of that number finds them as the one before left them."""
        begin = ROW * self.count + KEPT * number
        return memoryview(self._memory)[begin : begin + KEPT]

    def clear(self, number: int) -> None:
        """Zero the row of a front that is gone."""
        self._cells[number * WIDTH : (number + 1) * WIDTH] = memoryview(bytes(ROW)).cast("q")

    def close(self) -> None:
        """Give back the memory and the descriptor."""
        self._cells.release()
        self._memory.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
