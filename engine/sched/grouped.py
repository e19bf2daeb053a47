"""Rows that decode, in the order of the fronts that they are of: what a step says to a front is then a slice of it.

front 0    front 1      front 2        a row joins its group at the end of it: the first row of each later group
a b c d  │ e f g      │ h i j k        moves to the end of its own, so one place of each changes and no more;
         4            7            11  = ends      and a row leaves in the same way, backwards
"""

from itertools import pairwise
from typing import Any

from engine.sched.columns import StepColumns
from engine.sched.request import Request
from engine.sched.rows import DecodeRows


class GroupedRows(DecodeRows):
    """The requests that decode, of so many `fronts`."""

    def __init__(self, drafts: int, fronts: int) -> None:
        super().__init__(drafts)
        self._ends = [0] * fronts  # where the group of each front ends

    def join(self, request: Request, room: int, tokens: int = 0) -> None:
        """As DecodeRows.join; its lists are new, so rows change places in them."""
        super().join(request, room, tokens)
        ends = self._ends
        self._move(request, [ends[front - 1] for front in range(len(ends) - 1, request.front, -1)])
        for front in range(request.front, len(ends)):
            ends[front] += 1

    def leave(self, request: Request) -> None:
        """As DecodeRows.leave, which takes the last row, so it becomes that."""
        self.requests, self.rids, self.ids = self.requests.copy(), self.rids.copy(), self.ids.copy()
        ends = self._ends
        for front in range(request.front, len(ends)):
            ends[front] -= 1
        self._move(request, ends[request.front :])
        super().leave(request)

    def _move(self, request: Request, rows: list[int]) -> None:
        """Let `request` change places with who is in each of `rows`, one after the other."""
        at = request.row
        steps = [(before, row) for before, row in pairwise([at, *rows]) if before != row]
        if not steps:
            return
        columns: tuple[Any, ...] = (self.requests, self.rids, self.ids, self._slots, self._offsets, self._dues)
        for column in columns:
            for before, row in steps:
                column[before], column[row] = column[row], column[before]
        for before, row in steps:
            self.requests[before].row = before
            request.row = row

    def plan(self, step: StepColumns) -> list[Request]:
        """As DecodeRows.plan; the step knows where the groups end."""
        step.ends = self._ends.copy()
        return super().plan(step)

    def check_integrity(self, page_size: int, idle: bool) -> None:
        """Assert that rows are in the order of their fronts, and all else."""
        super().check_integrity(page_size, idle)
        for front, end in enumerate(self._ends):
            start = self._ends[front - 1] if front else 0
            assert all(request.front == front for request in self.requests[start:end])
        assert self._ends[-1] == len(self.requests)
