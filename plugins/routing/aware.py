"""The cache-aware policy: where most of a prompt is cached, unless the wait there is longer than that saves.

One score decides, and the highest wins. None of its parts has a unit, so nothing is to be tuned to a model:

      the share of the prompt that the worker holds
    - the prompts that wait there for their first token, in lengths of this one; a quarter of it counts against a match
    - how much its requests exceed the mean, as a share of the mean
    + a little, if it is the worker of the request's program
    - a little, if it is not its turn: of n workers, it got one of the last n requests

A match saves the fleet work, while a wait costs this request alone: therefore the quarter. Where nobody holds a part of
the prompt, all of the wait counts, and what workers hold says nothing. So a worker that has just come gets no heap of
prompts at once, and the one that holds the least gets no more than others.

A worker has the least load when a step of it has ended requests, so it would get the next ones just as another step has
begun, for whose end they wait. Turns spread them over the time between steps.

One worker's load moves that worker's requests alone, and only those whose match is not worth it. A prefix that
everybody asks for spreads by itself: its worker's load grows until the next one wins, which then holds it too.

A worker that says how much of a prompt was cached corrects what is thought of it. One that tells what is in its cache
is known to a block.
A score of shares is how vLLM's production stack routes (its issue 1035); what waits and what runs are one there.
Left out: workers of different speed, which differ in their load alone.
"""

import time
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from math import inf

from engine.plugin.routing import BLOCK, INDEX_CHARS, Arrival, Choice, PrefixIndex, RoutingPolicy, View, chained

AGAINST_MATCH = 0.25  # what a wait counts where a match is to be lost
FEW = 4.0  # requests a worker: where there are fewer, one more or less says little
STICKS = 0.25  # what the worker of a program has ahead
TURN = 0.1  # what the worker that got the last request has against it; none is left n requests later, with n workers
WRONG = 0.5  # of what a worker was thought to hold: having less than this share of it is a mistake
PROGRAMS = 1 << 16  # that are remembered
TIDY = 512  # blocks that one piece of `tidy` walks over
LATE = 3  # calls of `tidy` by which a worker may tell later than it answers: some of its events lie between two calls


class CacheAware(RoutingPolicy):
    """See above."""

    def __init__(self) -> None:
        self.bound(INDEX_CHARS)
        self._turn = 0
        self._latest: dict[str, int] = {}  # the turn of the last request that each worker got
        self._programs: OrderedDict[str, str] = OrderedDict()  # their workers, the least recently used first
        # Requests on their way, by identity and worker: their blocks, and how many of them were matched.
        self._open: dict[tuple[int, str], tuple[weakref.ref[Arrival], array[int], int]] = {}
        # Blocks and workers of requests that were answered, by how many calls of `tidy` ago; the last ones are last.
        self._answered: deque[list[tuple[array[int], str]]] = deque([[]], maxlen=LATE)
        # What `choose` found, so that `sent`, right after it, need not look again:
        self._last: tuple[Arrival, array[int], dict[str, int]] | None = None

    def bound(self, chars: int) -> None:
        self.index = PrefixIndex(chars // BLOCK)

    def choose(self, arrival: Arrival, workers: Sequence[View]) -> Choice:
        """Where `arrival` goes; its text is hashed here, once for all methods."""
        blocks = chained(arrival.text, arrival.space)
        held = self.index.lengths(blocks)
        self._last = arrival, blocks, held
        size, count = max(BLOCK, len(arrival.text)), len(workers)
        weight = AGAINST_MATCH if any(worker.name in held for worker in workers) else 1.0
        mean = sum(worker.running for worker in workers) / count
        scale = max(FEW, mean)
        home = self._programs.get(arrival.program)
        best, highest = 0, -inf
        for turn in range(count):  # equals take turns
            index = (self._turn + turn) % count
            worker = workers[index]
            saved = held.get(worker.name, 0) * BLOCK - weight * worker.waiting_chars
            score = saved / size - (worker.running - mean) / scale + STICKS * (worker.name == home)
            since = self._turn - self._latest.get(worker.name, -count)
            if since < count:
                score -= TURN * (count - since) / count
            if score > highest:
                best, highest = index, score
        matched = held.get(workers[best].name, 0) * BLOCK
        longest = max(held.values(), default=0) * BLOCK
        reason = f"score {highest:.2f}, {matched / size:.0%} of the prompt is there, {longest / size:.0%} at most"
        return Choice(worker=best, matched=matched, reason=reason)

    def sent(self, arrival: Arrival, worker: str) -> None:
        self._turn += 1
        self._latest[worker] = self._turn
        if self._last is None or self._last[0] is not arrival:
            blocks = chained(arrival.text, arrival.space)
            self._last = arrival, blocks, self.index.lengths(blocks)
        _, blocks, held = self._last
        matched = held.get(worker, 0)
        self._last = None  # what is sent changes what is held
        self.index.sent(blocks, worker)
        key = id(arrival), worker
        self._open[key] = weakref.ref(arrival, lambda _: self._lost(key)), blocks, matched
        if arrival.program:
            self._programs[arrival.program] = worker
            self._programs.move_to_end(arrival.program)
            if len(self._programs) > PROGRAMS:
                self._programs.popitem(last=False)

    def answered(self, arrival: Arrival, worker: str, cached: float | None) -> None:
        if (known := self._open.pop((id(arrival), worker), None)) is None:
            return
        _, blocks, matched = known
        self._answered[-1].append((blocks, worker))  # the next turn may come before the event
        if cached is None or not matched:
            return
        if cached * len(arrival.text) < WRONG * matched * BLOCK:
            self.index.shrink(worker)
        else:
            self.index.grow(worker)

    def _lost(self, key: tuple[int, str]) -> None:
        """Nobody knows of a request any more that was not answered."""
        if (known := self._open.pop(key, None)) is not None:
            self.index.computed(known[1], key[1])

    def removed(self, worker: str) -> None:
        self.index.removed(worker)
        self._latest.pop(worker, None)

    def stored(self, worker: str, space: bytes, blocks: Sequence[int]) -> None:
        self.index.stored(blocks, worker)

    def evicted(self, worker: str, blocks: Sequence[int]) -> None:
        self.index.evicted(blocks, worker)

    def reset(self, worker: str) -> None:
        self.index.reset(worker)

    def tidy(self, budget_s: float) -> bool:
        end = time.perf_counter() + budget_s
        while self.index.tidy(TIDY):
            if time.perf_counter() >= end:
                return True
        if len(self._answered) == LATE:
            for blocks, worker in self._answered[0]:
                self.index.computed(blocks, worker)
        self._answered.append([])
        return False
