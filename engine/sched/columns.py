"""The two messages of every step while they are built, column by column.

Log-probabilities are only passed on: cut to the tokens that are kept, or joined where a prompt came in chunks.
"""

from array import array

from engine.messages.reply import Finish, Tokens
from engine.messages.step import Logprobs, SlotAdmit, StepPlan
from engine.sched.request import Request

POOL = 2  # what comes of a row: a vector


class StepColumns:
    """The columns of a StepPlan while it is built."""

    __slots__ = ("admits", "budget", "pages", "pooled", "rows", "sampled", "scoring")

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that may still be planned
        self.rows: list[int] = []  # slot, start, length, what comes of it; slot, …
        self.pages: dict[tuple[int, int], int] = {}  # (slot, index): page
        self.admits: list[SlotAdmit] = []
        self.sampled: list[tuple[Request, int]] = []  # request and position of each token to be sampled
        self.pooled: list[Request] = []  # whose vectors the step yields
        self.scoring: dict[int, Request] = {}  # by row: whose prompt's log-probabilities the step yields

    def add_row(self, request: Request, start: int, length: int, *, sample: bool) -> None:
        """Compute `length` tokens of `request` from position `start`, and sample after them."""
        if request.scores_in(start, start + length):
            self.scoring[len(self.rows) // 4] = request
        self.rows += (request.slot, start, length, int(sample))

    def add_pooled_row(self, request: Request) -> None:
        """Compute all of `request`, and make a vector of it."""
        self.rows += (request.slot, 0, request.length, POOL)
        self.pooled.append(request)
        self.budget -= request.length

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

    __slots__ = (
        *("cached", "counts", "finishes", "logprobs", "now", "prefills"),
        *("prompt_logprobs", "rids", "tokens", "vectors"),
    )

    def __init__(self, now: float) -> None:
        self.now = now
        self.rids: list[str] = []
        self.counts = array("i")
        self.tokens: list[int] = []
        self.finishes: list[Finish] = []
        self.cached: list[tuple[int, int]] = []
        self.prefills: list[tuple[int, float]] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        self.vectors: list[tuple[int, bytes]] = []

    def accept(self, request: Request, tokens: list[int]) -> bool:
        """Add `tokens` to `request` and to this reply, up to where the request ends; True if it does."""
        ids, kept = request.ids, 0
        finish: Finish | None = None
        for token in tokens:
            kept += 1
            ids.append(token)
            self.tokens.append(token)
            if token in request.stop_ids:
                finish = Finish(len(self.rids), "stop", token)
                break
            if len(ids) == request.limit:
                finish = Finish(len(self.rids), "length")
                break
        if finish is not None:
            self.finishes.append(finish)
        self.rids.append(request.rid)
        self.counts.append(kept)
        if request.first:
            request.first = False
            row = len(self.rids) - 1
            self.cached.append((row, request.cached))
            self.prefills.append((row, self.now - request.began))
            if request.scores:
                self.prompt_logprobs.append(joined(row, request.scores))
                request.scores = []
        return finish is not None

    def add_logprobs(self, scores: Logprobs, skip: int) -> None:
        """Add those of the tokens accepted last, which `scores` holds after `skip` others."""
        self.logprobs.append(cut(len(self.rids) - 1, scores, skip, skip + self.counts[-1]))

    def add_vector(self, request: Request, vector: bytes) -> None:
        """The one thing to say to a request that asks for a vector."""
        row = len(self.rids)
        self.rids.append(request.rid)
        self.counts.append(0)
        self.vectors.append((row, vector))
        self.finishes.append(Finish(row, "stop"))

    def message(self, number: int) -> Tokens:
        return Tokens(
            step=number,
            rids=self.rids,
            counts=self.counts.tobytes(),
            tokens=array("i", self.tokens).tobytes(),
            finishes=tuple(self.finishes),
            cached=tuple(self.cached),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            vectors=tuple(self.vectors),
            prefills=tuple(self.prefills),
        )


def joined(row: int, parts: list[Logprobs]) -> Logprobs:
    """Those of successive parts of a prompt, as one, of row `row`."""
    columns = zip(*((part.logprobs, part.ranks, part.top_ids, part.top_logprobs) for part in parts), strict=True)
    return Logprobs(row, *map(b"".join, columns))


def cut(row: int, scores: Logprobs, first: int, end: int) -> Logprobs:
    """Those of the tokens `first` .. `end` - 1 of `scores`, of row `row`."""
    wide = 4 * (len(scores.top_ids) // len(scores.ranks))  # bytes of a token's likeliest
    return Logprobs(
        row,
        scores.logprobs[4 * first : 4 * end],
        scores.ranks[4 * first : 4 * end],
        scores.top_ids[wide * first : wide * end],
        scores.top_logprobs[wide * first : wide * end],
    )
