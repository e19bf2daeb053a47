"""What a step's result says, and to whom: the Tokens of a step while it is built, column by column.

    result   a  b  c  d        b has ended, or lost its slot, after the step was planned: its token is dropped
    reply    a  c  d           d ends with its token, so it leaves the device

Most steps yield one token a row. Then whole columns are passed on, and only rows that begin, end or ask for more are
looked at. Log-probabilities are only passed on: cut to the tokens that are kept, or joined where a prompt came in
chunks.
"""

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate, compress

from engine.messages.reply import Finish, Tokens
from engine.messages.step import Logprobs
from engine.sched.columns import StepColumns
from engine.sched.request import Request
from engine.sched.rows import DecodeRows


class Reply:
    """What result `number`, that of `step`, says, at `now`. `ended` are the requests whose last word is said."""

    def __init__(self, number: int, step: StepColumns, now: float = 0.0) -> None:
        self._now = now
        self._number = number
        self._step = step
        self.ended: list[Request] = []
        self.rids: list[str] = []  # may be the step's own: replaced, not changed
        self.counts = array("i")
        self.tokens = array("i")
        self.finishes: list[Finish] = []
        self.cached: list[tuple[int, int]] = []
        self.prefills: list[tuple[int, float]] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        self.vectors: list[tuple[int, bytes]] = []

    def _awaited(self, request: Request) -> bool:
        """Whether `request` has not ended, nor lost its slot, since the step was planned."""
        return self._number >= request.since

    def add_prompt_scores(self, scores: Sequence[Logprobs]) -> None:
        """Keep the log-probabilities of prompts until their first tokens come."""
        for each in scores:
            request = self._step.scoring[each.row]
            if self._awaited(request):
                request.add_scores(each)

    def take_one_each(
        self, tokens: "array[int]", logprobs: Sequence[Logprobs], stop_ids: Mapping[int, int], *, whole: bool
    ) -> None:
        """Each row yielded one token. `stop_ids` has those of all that run; `whole`, all rows are awaited."""
        requests, rids, ids = self._step.requests, self._step.rids, self._step.ids
        place: Sequence[int] = range(len(requests))  # of each row in the reply
        if not whole:
            awaited = [self._number >= request.since for request in requests]
            place = [count - 1 if kept else -1 for kept, count in zip(awaited, accumulate(awaited), strict=True)]
            requests, rids = list(compress(requests, awaited)), list(compress(rids, awaited))
            ids, tokens = list(compress(ids, awaited)), array("i", compress(tokens, awaited))
        self.rids, self.counts, self.tokens = rids, array("i", [1]) * len(rids), tokens
        deque(map(array.append, ids, tokens), maxlen=0)  # a loop that runs in C
        for row in place[len(place) - self._step.firsts :]:
            if row >= 0:
                self._begin(row, requests[row])
        for scores in logprobs:
            if (row := place[scores.row]) >= 0:
                self.logprobs.append(cut(row, scores, 1))
        ending = {place[row] for row in self._step.ending if place[row] >= 0} if self._step.ending else set()
        if not stop_ids.keys().isdisjoint(tokens):
            ending |= {row for row, token in enumerate(tokens) if token in requests[row].stop_ids}
        for row in sorted(ending):
            assert self._finish(row, requests[row], tokens[row]), "a row's last token does not end it"

    def take_several(
        self, counts: "array[int]", tokens: "array[int]", logprobs: Sequence[Logprobs], decoding: DecodeRows
    ) -> list[Request]:
        """Rows yielded several tokens, or none. Returns whom of those `decoding` what is in flight is sure to end."""
        scored = {scores.row: scores for scores in logprobs}
        spans, sure, at = self._step.spans or [], [], 0
        for row, (request, count) in enumerate(zip(self._step.requests, counts, strict=True)):
            first, at = at, at + count
            if not self._awaited(request):
                continue
            if request.row >= 0 and row < len(spans) and decoding.correct(request, spans[row], count):
                sure.append(request)
            if count:
                self._accept(request, tokens[first:at], scored.get(row))
        return sure

    def _accept(self, request: Request, tokens: "array[int]", scores: Logprobs | None) -> None:
        """Add `tokens` to `request` and to the reply, up to where the request ends."""
        row, kept = len(self.rids), 0
        for token in tokens:
            kept += 1
            request.ids.append(token)
            if self._finish(row, request, token):
                break
        self.rids.append(request.rid)
        self.counts.append(kept)
        self.tokens += tokens[:kept]
        self._begin(row, request)
        if scores is not None:
            self.logprobs.append(cut(row, scores, kept))

    def _begin(self, row: int, request: Request) -> None:
        """Say what goes with the first token of `request`, if this is it."""
        if request.first:
            request.first = False
            self.cached.append((row, request.cached))
            self.prefills.append((row, self._now - request.began))
            if request.scores:
                self.prompt_logprobs.append(joined(row, request.scores))
                request.scores = []

    def _finish(self, row: int, request: Request, token: int) -> bool:
        """Whether `request` ends with `token`, its last one."""
        if token in request.stop_ids:
            self.finishes.append(Finish(row, "stop", token))
        elif len(request.ids) == request.limit:
            self.finishes.append(Finish(row, "length"))
        else:
            return False
        self.ended.append(request)
        return True

    def take_vectors(self, vectors: bytes) -> None:
        """`vectors` holds one of each request that asks for one; it is all that was wanted of them."""
        pooled = self._step.pooled
        size = len(vectors) // len(pooled) if pooled else 0
        assert size or not pooled, f"step {self._number} brought no vectors"
        for index, request in enumerate(pooled):
            if self._awaited(request):
                row = len(self.rids)
                self.rids = [*self.rids, request.rid]
                self.counts.append(0)
                self.vectors.append((row, vectors[index * size : (index + 1) * size]))
                self.finishes.append(Finish(row, "stop"))
                self.ended.append(request)

    def message(self) -> Tokens:
        return Tokens(
            step=self._number,
            rids=self.rids,
            counts=self.counts.tobytes(),
            tokens=self.tokens.tobytes(),
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
