"""The plan of a step while it is built, column by column."""

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from types import MappingProxyType

from engine.messages.step import NOTHING, TOKEN, VECTOR, KeptState, SlotAdmit, StepPlan
from engine.sched.request import Request


class StepColumns:
    """The columns of a StepPlan while it is built, and whose rows they are until its result comes.

    Rows that decode come first, so rows that yield tokens are in the same order in the plan, here and in its result.
    `requests`, `rids` and `ids` are of these, and may be lists that others hold: they are replaced, not changed. So is
    all that stands here without being made for each step, because most steps have none of it."""

    decodes: tuple[bytes, bytes, bytes, bytes] = (b"", b"", b"", b"")  # slots, starts, lengths, yields, of rows that do
    spans: list[int] | None = None  # of each row that decodes, if any may yield several tokens
    ends: list[int] | None = None  # of several fronts: where the rows of each end that decode
    admits: tuple[SlotAdmit, ...] = ()
    firsts = 0  # how many of `requests`, the last ones, do not decode yet: their prompt ends here
    ending: Sequence[int] = ()  # rows whose token is surely the last of their request
    pooled: tuple[Request, ...] = ()  # whose vectors the step yields
    scoring: Mapping[int, Request] = MappingProxyType({})  # by row: whose prompt's log-probabilities the step yields
    media: set[int] | None = None  # numbers of what its chunks show, if anything
    shown = made = 0  # their embeddings, and how many of these it makes
    keeps: tuple[KeptState, ...] = ()  # states that are copied before the step
    encodes: tuple[tuple[int, int], ...] = ()  # those that it makes: the slot that shows it, and a medium's number
    forgets: tuple[tuple[int, int], ...] = ()  # media whose embeddings make room, and for which slot
    lane = 0  # whose rows decode
    work = 0.0  # that its prompts may still take, in a pipeline (chunks.py)

    def __init__(self, budget: int, departures: int) -> None:
        self.budget = budget  # tokens that may still be planned
        self.departures = departures  # how many requests had left the device when the step was planned
        self.prompts: list[tuple[int, int, int, int]] = []  # slot, start, length, yields of each row of a prompt
        self.pages: dict[tuple[int, int], int] = {}  # (slot, index): page
        self.requests: list[Request] = []
        self.rids: list[str] = []
        self.ids: list[array[int]] = []

    @property
    def rows(self) -> int:
        return len(self.decodes[0]) // 4 + len(self.prompts)

    @property
    def tokens(self) -> int:
        """That it computes, where no row has drafts."""
        return len(self.decodes[0]) // 4 + sum(length for _, _, length, _ in self.prompts)

    def add_chunk(self, request: Request, start: int, length: int, *, last: bool) -> None:
        """Compute `length` prompt tokens of `request` from position `start`; after the `last` ones, draw a token."""
        if request.scores_in(start, start + length):
            self.scoring = {**self.scoring, self.rows: request}
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
        self.pooled += (request,)

    def _add(self, slot: int, start: int, length: int, yields: int) -> None:
        self.prompts.append((slot, start, length, yields))
        self.budget -= length

    def set_pages(self, request: Request, indices: range) -> None:
        """Tell the device which pages `request` has at `indices`."""
        for index in indices:
            self.pages[request.slot, index] = request.pages[index]

    def message(self, number: int) -> StepPlan:
        slots, starts, lengths, yields = self.decodes
        if self.prompts:
            slots, starts, lengths, yields = (
                column + array("i", more).tobytes()
                for column, more in zip(self.decodes, zip(*self.prompts, strict=True), strict=True)
            )
        pages = b""
        if self.pages:
            pages = array("i", chain.from_iterable((*place, page) for place, page in self.pages.items())).tobytes()
        return StepPlan(
            step=number,
            slots=slots,
            starts=starts,
            lengths=lengths,
            yields=yields,
            admits=self.admits,
            pages=pages,
            lane=self.lane,
            encodes=array("i", chain.from_iterable(self.encodes)).tobytes() if self.encodes else b"",
            forgets=array("i", chain.from_iterable(self.forgets)).tobytes() if self.forgets else b"",
            keeps=self.keeps,
        )
