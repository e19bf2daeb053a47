"""The requests that decode, as columns: a step of hundreds of rows is planned by a few operations on arrays.

    row        0    1    2      A row joins at the end; where one leaves, the last one takes its place. Lists are
    request    a    b    c      replaced and never changed: steps in flight and messages keep the ones they had.
    slot       4    0    2
    sure       9   31   17      tokens that it surely has once all plans sent have run
    most       9   31   20      tokens that it may have then: more than `sure` while drafts are in flight
    room      16   32   32      tokens that its pages hold
    limit     40   33   90      tokens at which it ends; a row leaves when it is sure to reach them
    span       1    1    4      positions that it may compute in a step: its last token and its drafts

A plan adds one token to `sure`, and to `most` all that the row may yield. Its result brings both to what the request
has and what else is in flight. Without drafts they are equal, and no result changes them.
"""

from array import array
from typing import Any

import numpy as np

from engine.messages.step import DRAFTS, TOKEN
from engine.sched.columns import StepColumns
from engine.sched.request import Request

COLUMNS = SLOT, SURE, MOST, ROOM, LIMIT, SPAN = range(6)


class DecodeRows:
    """At most `slots` requests that decode, each with up to `drafts` draft tokens in a step."""

    def __init__(self, slots: int, drafts: int) -> None:
        self.requests: list[Request] = []
        self.rids: list[str] = []
        self.ids: list[array[int]] = []
        self._table = np.zeros((len(COLUMNS), slots), np.int32)
        self._drafts = drafts
        self._calm = 0  # steps, without drafts, until a row outgrows its pages or ends

    def __len__(self) -> int:
        return len(self.requests)

    def join(self, request: Request, room: int) -> None:
        """`request`, whose first token is in flight, decodes from the next step on; its pages hold `room` tokens."""
        row = request.row = len(self.requests)
        length = len(request.ids) + 1
        span = 1 if request.grammar else 1 + self._drafts  # a grammar's masks are for one token after known ones
        self._table[:, row] = request.slot, length, length, room, request.limit, span
        self._calm = 0
        self.requests = [*self.requests, request]
        self.rids = [*self.rids, request.rid]
        self.ids = [*self.ids, request.ids]

    def leave(self, request: Request) -> None:
        """No more rows of `request` are planned; what is sure to be computed of it is written there."""
        row, last = request.row, self.requests[-1]
        request.computed, request.row = self.computed(request), -1
        if request is not last:
            self._table[:, row] = self._table[:, last.row]
            last.row = row
        self.requests, self.rids, self.ids = (_without(whole, row) for whole in (self.requests, self.rids, self.ids))

    def computed(self, request: Request) -> int:
        """Positions of `request` that are sure to be computed once all plans sent have run."""
        return int(self._table[SURE, request.row]) - 1

    def short(self) -> list[tuple[Request, int]]:
        """The rows whose next step may outgrow their pages, and the tokens that these must hold."""
        if self._calm:
            return []
        table = self._table[:, : len(self.requests)]
        needed = table[MOST]
        if self._drafts:
            needed = np.minimum(needed + table[SPAN], table[LIMIT]) - 1
        rows = np.flatnonzero(needed > table[ROOM])
        return [(self.requests[row], tokens) for row, tokens in zip(rows.tolist(), needed[rows].tolist(), strict=True)]

    def grow(self, request: Request, room: int) -> None:
        """The pages of `request` now hold `room` tokens."""
        self._table[ROOM, request.row] = room

    def plan(self, step: StepColumns) -> list[Request]:
        """Adds a row for each request to `step`, which has none yet. Those that it surely ends leave, and are told."""
        table = self._table[:, : len(self.requests)]
        step.requests, step.rids, step.ids = self.requests, self.rids, self.ids
        step.slots.frombytes(table[SLOT].tobytes())
        step.starts.frombytes((table[SURE] - 1).tobytes())
        if self._drafts:
            self._plan_drafts(step, table)
        else:
            step.lengths = array("i", [1]) * len(self.requests)
            step.yields = array("i", [TOKEN]) * len(self.requests)
            step.budget -= len(self.requests)
            table[SURE : MOST + 1] += 1
            if self._calm:
                self._calm -= 1
                return []
        step.ending = np.flatnonzero(table[SURE] == table[LIMIT]).tolist()
        ended = [self.requests[row] for row in step.ending]
        for request in ended:
            self.leave(request)
        if not self._drafts and self.requests:
            _, sure, _, room, limit, _ = self._table[:, : len(self.requests)]
            self._calm = max(0, int((np.minimum(room + 1, limit - 1) - sure).min()))
        return ended

    def _plan_drafts(self, step: StepColumns, table: np.ndarray) -> None:
        """What rows yield if they may yield several tokens."""
        spans = np.minimum(table[SPAN], table[LIMIT] - table[SURE])
        if spans.sum() > step.budget:
            spans = np.minimum(spans, 1)
        step.spans = spans
        step.lengths.frombytes(spans.tobytes())
        step.yields.frombytes(np.where(table[SPAN] > 1, DRAFTS, TOKEN).astype(np.int32).tobytes())
        step.budget -= int(spans.sum())
        table[SURE] += 1
        table[MOST] += spans

    def correct(self, request: Request, planned: int, count: int) -> bool:
        """A row of `request` that was planned to yield up to `planned` tokens has yielded `count`. True if what is in
        flight is now sure to end it: then it has left."""
        column = self._table[:, request.row]
        column[SURE] += count - 1
        column[MOST] -= planned - count
        if column[SURE] < column[LIMIT]:
            return False
        self.leave(request)
        return True

    def check_integrity(self, page_size: int) -> None:
        """Assert that columns and requests fit together."""
        slot, sure, most, room, limit, _ = self._table[:, : len(self.requests)]
        assert [request.row for request in self.requests] == list(range(len(self.requests)))
        assert self.rids == [request.rid for request in self.requests]
        assert slot.tolist() == [request.slot for request in self.requests]
        assert room.tolist() == [len(request.pages) * page_size for request in self.requests]
        assert (sure < limit).all() and (sure <= most).all() and (bool(self._drafts) or (sure == most).all())
        assert all(len(request.ids) <= length for request, length in zip(self.requests, sure.tolist(), strict=True))


def _without(whole: list[Any], row: int) -> list[Any]:
    """A copy in which the last element has taken the place of number `row`."""
    shorter = whole[:-1]
    if row < len(shorter):
        shorter[row] = whole[-1]
    return shorter
