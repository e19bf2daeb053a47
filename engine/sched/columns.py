"""The plan of a step while it is built, column by column."""

from array import array

from engine.messages.step import NOTHING, TOKEN, VECTOR, SlotAdmit, StepPlan
from engine.sched.request import Request


class StepColumns:
    """The columns of a StepPlan while it is built, and whose rows they are until its result comes.

    Rows that decode come first, so rows that yield tokens are in the same order in the plan, here and in its result.
    `requests`, `rids` and `ids` are of these, and may be lists that others hold: they are replaced, not changed."""

    __slots__ = (
        "admits", "budget", "departures", "ending", "ends", "firsts", "ids", "lengths", "pages", "pooled", "requests",
        "rids", "scoring", "slots", "spans", "starts", "yields",
    )  # fmt: skip

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that may still be planned
        self.slots, self.starts, self.lengths, self.yields = array("i"), array("i"), array("i"), array("i")
        self.spans: list[int] | None = None  # of each row that decodes, if any may yield several tokens
        self.pages: dict[tuple[int, int], int] = {}  # (slot, index): page
        self.admits: list[SlotAdmit] = []
        self.requests: list[Request] = []
        self.rids: list[str] = []
        self.ids: list[array[int]] = []
        self.firsts = 0  # how many of them, the last ones, do not decode yet: their prompt ends here
        self.ends: list[int] | None = None  # of several fronts: where the rows of each end that decode
        self.ending: list[int] = []  # rows whose token is surely the last of their request
        self.pooled: list[Request] = []  # whose vectors the step yields
        self.scoring: dict[int, Request] = {}  # by row: whose prompt's log-probabilities the step yields
        self.departures = 0  # how many requests had left the device when the step was planned

    def add_chunk(self, request: Request, start: int, length: int, *, last: bool) -> None:
        """Compute `length` prompt tokens of `request` from position `start`; after the `last` ones, draw a token."""
        if request.scores_in(start, start + length):
            self.scoring[len(self.slots)] = request
        self._add(request.slot, start, length, TOKEN if last else NOTHING)
        if last:
            if len(request.ids) + 1 == request.limit:
                self.ending = [*self.ending, len(self.requests)]
            self.requests = [*self.requests, request]
            self.rids = [*self.rids, request.rid]
            self.ids = [*self.ids, request.ids]
            self.firsts += 1

    def add_whole(self, request: Request) -> None:
        """Compute all of `request`, and make a vector of it."""
        self._add(request.slot, 0, len(request.ids), VECTOR)
        self.pooled.append(request)

    def _add(self, slot: int, start: int, length: int, yields: int) -> None:
        self.slots.append(slot)
        self.starts.append(start)
        self.lengths.append(length)
        self.yields.append(yields)
        self.budget -= length

    def set_pages(self, request: Request, indices: range) -> None:
        """Tell the device which pages `request` has at `indices`."""
        for index in indices:
            self.pages[request.slot, index] = request.pages[index]

    def message(self, number: int) -> StepPlan:
        pages = array("i", [number for (slot, index), page in self.pages.items() for number in (slot, index, page)])
        return StepPlan(
            step=number,
            slots=self.slots.tobytes(),
            starts=self.starts.tobytes(),
            lengths=self.lengths.tobytes(),
            yields=self.yields.tobytes(),
            admits=tuple(self.admits),
            pages=pages.tobytes(),
        )
