"""The two messages of every step while they are built, column by column.

Log-probabilities are only passed on: cut to the tokens that are kept, or joined where a prompt came in chunks.
"""

from array import array
from collections import deque
from collections.abc import Sequence

from engine.messages.reply import Finish, Tokens
from engine.messages.step import NOTHING, TOKEN, VECTOR, Logprobs, SlotAdmit, StepPlan
from engine.sched.request import Request


class StepColumns:
    """The columns of a StepPlan while it is built, and whose rows they are until its result comes.

    Rows that decode come first, so rows that yield tokens are in the same order in the plan, here and in its result.
    `requests`, `rids` and `ids` are of these, and may be lists that others hold: they are replaced, not changed."""

    __slots__ = (
        "admits", "budget", "departures", "ending", "firsts", "ids", "lengths", "pages", "pooled", "requests", "rids",
        "scoring", "slots", "spans", "starts", "yields",
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


class ReplyColumns:
    """The columns of a Tokens while it is built."""

    __slots__ = ("cached", "counts", "finishes", "logprobs", "prompt_logprobs", "rids", "tokens", "vectors")

    def __init__(self) -> None:
        self.rids: list[str] = []
        self.counts = array("i")
        self.tokens = array("i")
        self.finishes: list[Finish] = []
        self.cached: list[tuple[int, int]] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        self.vectors: list[tuple[int, bytes]] = []

    def accept_one_each(self, rids: list[str], ids: "Sequence[array[int]]", tokens: "array[int]") -> None:
        """Add one token to each request, of which `ids` are the tokens so far."""
        self.rids, self.tokens = rids, tokens
        self.counts = array("i", [1]) * len(rids)
        deque(map(array.append, ids, tokens), maxlen=0)  # a loop that runs in C

    def accept(self, request: Request, tokens: "array[int]") -> bool:
        """Add `tokens` to `request` and to this reply, up to where the request ends; True if it does."""
        row, kept, finish = len(self.rids), 0, None
        for token in tokens:
            kept += 1
            request.ids.append(token)
            if finish := finish_of(row, request, token):
                self.finishes.append(finish)
                break
        self.rids.append(request.rid)
        self.counts.append(kept)
        self.tokens += tokens[:kept]
        return finish is not None

    def begin(self, row: int, request: Request) -> None:
        """Say what goes with the first token of `request`, if it is in this reply, in this row."""
        if request.first:
            request.first = False
            self.cached.append((row, request.cached))
            if request.scores:
                self.prompt_logprobs.append(joined(row, request.scores))
                request.scores = []

    def add_logprobs(self, row: int, scores: Logprobs) -> None:
        """Add those of the tokens accepted in `row`, which `scores` begins with."""
        self.logprobs.append(cut(row, scores, self.counts[row]))

    def add_vector(self, request: Request, vector: bytes) -> None:
        """The one thing to say to a request that asks for a vector."""
        row = len(self.rids)
        self.rids = [*self.rids, request.rid]
        self.counts.append(0)
        self.vectors.append((row, vector))
        self.finishes.append(Finish(row, "stop"))

    def message(self, number: int) -> Tokens:
        return Tokens(
            step=number,
            rids=self.rids,
            counts=self.counts.tobytes(),
            tokens=self.tokens.tobytes(),
            finishes=tuple(self.finishes),
            cached=tuple(self.cached),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            vectors=tuple(self.vectors),
        )


def finish_of(row: int, request: Request, token: int) -> Finish | None:
    """How `request` ends with `token`, its last one, if it does."""
    if token in request.stop_ids:
        return Finish(row, "stop", token)
    if len(request.ids) == request.limit:
        return Finish(row, "length")
    return None


def joined(row: int, parts: list[Logprobs]) -> Logprobs:
    """Those of successive parts of a prompt, as one, of row `row`."""
    columns = zip(*((part.logprobs, part.ranks, part.top_ids, part.top_logprobs) for part in parts), strict=True)
    return Logprobs(row, *map(b"".join, columns))


def cut(row: int, scores: Logprobs, count: int) -> Logprobs:
    """Those of the first `count` tokens of `scores`, of row `row`."""
    wide = 4 * (len(scores.top_ids) // len(scores.ranks))  # bytes of a token's likeliest
    return Logprobs(
        row,
        scores.logprobs[: 4 * count],
        scores.ranks[: 4 * count],
        scores.top_ids[: wide * count],
        scores.top_logprobs[: wide * count],
    )
