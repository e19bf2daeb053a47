"""The requests that decode, as columns, so that a step of hundreds of rows is planned by few operations.

    row        0    1    2      A row joins at the end; where one leaves, the last one takes its place. Lists that
    request    a    b    c      steps in flight and messages hold are replaced and never changed.
    offset     4   26   12      plus the clock: the tokens that it surely has once all plans sent have run
    due       13    7   21      when the clock says so, the row outgrows its pages or is about to end

The clock counts the steps planned. Each gives every row one token at least, so no column changes from step to step, and
only rows that are due are looked at. A row of drafts may get more: `ahead` is how many more than it surely has, and its
result moves its offset. Such rows are always due.
"""

from array import array
from typing import TypeVar

from engine.messages.grammars import GRAMMAR
from engine.messages.step import DRAFTS, TOKEN
from engine.sched.columns import StepColumns
from engine.sched.request import Request

T = TypeVar("T")


class DecodeRows:
    """The requests that decode, each with up to `drafts` draft tokens in a step."""

    def __init__(self, drafts: int) -> None:
        self.requests: list[Request] = []
        self.rids: list[str] = []
        self.ids: list[array[int]] = []
        self._slots = array("i")
        self._plain: tuple[bytes, bytes, bytes] | None = None  # slots, lengths and yields of a step without drafts
        self._offsets: list[int] = []
        self._dues: list[int] = []
        self._due = 0  # no row is due before
        self._clock = 0
        self._drafts = drafts

    def __len__(self) -> int:
        return len(self.requests)

    def join(self, request: Request, room: int, tokens: int = 0) -> None:
        """`request`, whose first token is in flight, decodes from the next step on; its pages hold `room` tokens.
        `tokens` says how many it has once all plans sent have run, where there is more in flight than its first."""
        request.row, request.ahead = len(self.requests), 0
        ruled = any(bound.kind == GRAMMAR for bound in request.bound)  # its mask is for one token after known ones
        request.span = 1 if ruled else 1 + self._drafts
        self.requests = [*self.requests, request]
        self.rids = [*self.rids, request.rid]
        self.ids = [*self.ids, request.ids]
        self._slots.append(request.slot)
        self._plain = None
        self._offsets.append((tokens or len(request.ids) + 1) - self._clock)
        self._dues.append(0)
        self.grow(request, room)

    def leave(self, request: Request) -> None:
        """No more rows of `request` are planned; what is sure to be computed of it is written there."""
        row, last = request.row, self.requests[-1]
        request.computed = self.computed(request)
        last.row, request.row = row, -1
        self._plain = None
        self.requests = moved_up(self.requests.copy(), row)
        self.rids = moved_up(self.rids.copy(), row)
        self.ids = moved_up(self.ids.copy(), row)
        for column in (self._slots, self._offsets, self._dues):
            number = column.pop()
            if row < len(column):
                column[row] = number

    def computed(self, request: Request) -> int:
        """Positions of `request` that are sure to be computed once all plans sent have run. Its last token never is,
        however many plans more there are than it needs."""
        return min(self._clock + self._offsets[request.row], request.limit) - 1

    def _attention(self) -> list[int]:
        """The rows that are due."""
        clock = self._clock
        return [row for row, due in enumerate(self._dues) if due <= clock]

    def short(self) -> list[tuple[Request, int]]:
        """The rows whose next step may outgrow their pages, and the tokens that these must hold."""
        found: list[tuple[Request, int]] = []
        if self._clock < self._due:
            return found
        for row in self._attention():
            request = self.requests[row]
            most = self._clock + self._offsets[row] + request.ahead
            tokens = min(most + request.span, request.limit) - 1
            if tokens > request.room:
                found.append((request, tokens))
        return found

    def grow(self, request: Request, room: int) -> None:
        """The pages of `request` now hold `room` tokens."""
        request.room, row = room, request.row
        due = 0 if self._drafts else min(room + 1, request.limit - 1) - self._offsets[row]
        self._dues[row] = due
        self._due = min(self._due, due)

    def plan(self, step: StepColumns) -> list[Request]:
        """Adds a row for each request to `step`, which has none yet. Those that it surely ends leave, and are told."""
        last = self._clock - 1
        step.requests, step.rids, step.ids = self.requests, self.rids, self.ids
        starts = array("i", [offset + last for offset in self._offsets]).tobytes()
        slots, lengths, yields = self._plan_drafts(step) if self._drafts else self._plan_tokens(step)
        step.decodes = slots, starts, lengths, yields
        if self._clock < self._due:
            self._clock += 1
            return []
        attention = self._attention()
        self._clock += 1
        step.ending = [row for row in attention if self._clock + self._offsets[row] == self.requests[row].limit]
        ended = [self.requests[row] for row in step.ending]
        for request in ended:
            self.leave(request)
        self._due = min(self._dues, default=self._clock)
        return ended

    def _plan_tokens(self, step: StepColumns) -> tuple[bytes, bytes, bytes]:
        """The slots of the rows, and what they compute and yield: one token each. They change with who is here."""
        if self._plain is None:
            one, token = array("i", [1]), array("i", [TOKEN])
            self._plain = self._slots.tobytes(), (one * len(self)).tobytes(), (token * len(self)).tobytes()
        step.budget -= len(self.requests)
        return self._plain

    def _plan_drafts(self, step: StepColumns) -> tuple[bytes, bytes, bytes]:
        """The slots of the rows, and what they compute and yield where that may be several tokens."""
        spans = [
            min(request.span, request.limit - self._clock - offset)
            for request, offset in zip(self.requests, self._offsets, strict=True)
        ]
        if sum(spans) > step.budget:
            spans = [1] * len(spans)
        for request, span in zip(self.requests, spans, strict=True):
            request.ahead += span - 1
        step.spans = spans
        step.budget -= sum(spans)
        yields = array("i", [DRAFTS if request.span > 1 else TOKEN for request in self.requests])
        return self._slots.tobytes(), array("i", spans).tobytes(), yields.tobytes()

    def correct(self, request: Request, planned: int, count: int) -> bool:
        """A row of `request` that was planned to yield up to `planned` tokens has yielded `count`. True if what is in
        flight is now sure to end it: then it has left."""
        self._offsets[request.row] += count - 1
        request.ahead -= planned - 1
        if self._clock + self._offsets[request.row] < request.limit:
            return False
        self.leave(request)
        return True

    def check_integrity(self, page_size: int, idle: bool) -> None:
        """Assert that columns and requests fit together; `idle`, all that was planned is known."""
        assert [request.row for request in self.requests] == list(range(len(self.requests)))
        assert self.rids == [request.rid for request in self.requests]
        assert self._slots.tolist() == [request.slot for request in self.requests]
        assert self._due <= min(self._dues, default=self._due), "a row would be missed when it is due"
        for request, offset in zip(self.requests, self._offsets, strict=True):
            assert len(request.ids) <= self._clock + offset < request.limit
            assert request.room == len(request.pages) * page_size
            assert request.ahead >= 0 and (self._drafts or not request.ahead)
            assert not idle or (len(request.ids), 0) == (self._clock + offset, request.ahead)


def moved_up(whole: list[T], row: int) -> list[T]:
    """`whole`, whose last element has taken the place of number `row`."""
    last = whole.pop()
    if row < len(whole):
        whole[row] = last
    return whole
