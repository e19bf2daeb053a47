"""The two messages of every step while they are built, column by column."""

from array import array

from engine.messages import Finish, SlotAdmit, StepPlan, Tokens
from engine.sched.request import Request


class StepColumns:
    """The columns of a StepPlan while it is built."""

    __slots__ = ("admits", "budget", "pages", "rows", "sampled")

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that may still be planned
        self.rows: list[int] = []  # slot, start, length, sample; slot, …
        self.pages: dict[tuple[int, int], int] = {}  # (slot, index): page
        self.admits: list[SlotAdmit] = []
        self.sampled: list[tuple[Request, int]] = []  # request and position of each token to be sampled

    def set_pages(self, request: Request, indices: range) -> None:
        """Tell the device which pages `request` has at `indices`."""
        for index in indices:
            self.pages[request.slot, index] = request.pages[index]

    def message(self, number: int) -> StepPlan:
        pages = array("i", [number for (slot, index), page in self.pages.items() for number in (slot, index, page)])
        rows = array("i", self.rows)
        return StepPlan(step=number, rows=rows.tobytes(), admits=tuple(self.admits), pages=pages.tobytes())


class ReplyColumns:
    """The columns of a Tokens while it is built."""

    __slots__ = ("cached", "counts", "finishes", "rids", "tokens")

    def __init__(self) -> None:
        self.rids: list[str] = []
        self.counts = array("i")
        self.tokens = array("i")
        self.finishes: list[Finish] = []
        self.cached: list[tuple[int, int]] = []

    def accept(self, request: Request, tokens: "array[int]") -> bool:
        """Add `tokens` to `request` and to this reply, up to where the request ends; True if it does."""
        ids = request.ids
        row, before, ended = len(self.rids), len(ids), True
        for token in tokens:
            ids.append(token)
            self.tokens.append(token)
            if token in request.stop_ids:
                self.finishes.append(Finish(row, "stop", token))
                break
            if len(ids) == request.limit:
                self.finishes.append(Finish(row, "length"))
                break
        else:
            ended = False
        self.rids.append(request.rid)
        self.counts.append(len(ids) - before)
        if request.first:
            request.first = False
            self.cached.append((row, request.cached))
        return ended

    def message(self, number: int) -> Tokens:
        return Tokens(
            step=number,
            rids=self.rids,
            counts=self.counts.tobytes(),
            tokens=self.tokens.tobytes(),
            finishes=tuple(self.finishes),
            cached=tuple(self.cached),
        )
