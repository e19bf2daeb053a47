"""The cache-aware policy: where most of a prompt is cached, unless the wait there is longer than that saves.

A worker's load is its requests, and once more those prompts that wait for their first token, in the measure of a usual
one.

    1. workers whose load is near the least: the longest match among all wins, if it is one of theirs
    2. if another worker has a longer match, a score decides among all: the share of the prompt that a worker holds,
       less how much its load exceeds the mean, as a share of the mean. Neither has a unit, so it needs no tuning
    3. nobody holds a part: the least load wins, and prompts that wait count HASTE times more. What workers hold says
       nothing then. So a worker that has just come gets no heap of prompts at once

One worker's load moves that worker's requests alone, and only those whose match is not worth the wait. A prefix that
everybody asks for spreads by itself: its worker's load grows until the next one wins, which then holds it too.

A program stays with its worker while its load is near the least and it still holds half of what another one does. A
worker that says how much of a prompt was cached corrects what is thought of it. One that tells what is in its cache is
known to a block.

The score is that of vLLM's production stack, the window that of SGLang's router; docs/router.md compares them.
Left out: workers of different speed, which differ in their load alone.
"""

import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from engine.plugin.routing import BLOCK, Arrival, Choice, PrefixIndex, RoutingPolicy, View, chained

CHARS = 1 << 24  # that may be known of one worker
NEAR = 2.0  # requests above the least load that count as near it
NEAR_SHARE = 0.1  # and this share of the mean load, where that is more
WRONG = 0.5  # of what a worker was thought to hold: having less than this share of it is a mistake
PROGRAMS = 1 << 16  # that are remembered
OPEN = 1 << 16  # requests on their way that are remembered
HASTE = 8.0  # what a prompt that waits counts more, where no cache decides
USUAL = 4096.0  # characters of a prompt to compute, before any was seen
TIDY = 512  # blocks that one piece of `tidy` walks over


class CacheAware(RoutingPolicy):
    """See above. At most `chars` characters are known of one worker."""

    def __init__(self, chars: int = CHARS) -> None:
        self.index = PrefixIndex(chars // BLOCK)
        self._turn = 0
        self._usual = USUAL  # characters to compute of the prompts that came lately
        self._programs: OrderedDict[str, str] = OrderedDict()  # their workers, the least recently used first
        # Requests on their way, by identity and worker, with their blocks and how many of them were matched:
        self._open: OrderedDict[tuple[int, str], tuple[Arrival, array[int], int]] = OrderedDict()
        self._last: tuple[Arrival, array[int]] | None = None  # `choose`, `sent` and `answered` hash a text once

    def choose(self, arrival: Arrival, workers: Sequence[View]) -> Choice:
        """Where `arrival` goes; its text is hashed here, once for all methods."""
        held = self.index.lengths(self._blocks(arrival))
        matched = [held.get(worker.name, 0) for worker in workers]
        best, reason = self._best(arrival, workers, matched)
        return Choice(worker=best, matched=matched[best] * BLOCK, reason=reason)

    def _best(self, arrival: Arrival, workers: Sequence[View], matched: Sequence[int]) -> tuple[int, str]:
        count, longest = len(workers), max(matched)
        prompts = [worker.waiting_chars / max(BLOCK, self._usual) for worker in workers]
        loads = [worker.running + waiting for worker, waiting in zip(workers, prompts, strict=True)]

        def ease(index: int) -> tuple[float, int]:
            """More of it is better; equals take turns."""
            return -loads[index] - HASTE * prompts[index], -((index - self._turn) % count)

        mean = sum(loads) / count
        near = min(loads) + max(NEAR, NEAR_SHARE * mean)
        home = self._programs.get(arrival.program)
        for index, worker in enumerate(workers if home else ()):
            if worker.name == home and loads[index] <= near and 2 * matched[index] >= longest:
                return index, "its program's worker"
        if not longest:
            return max(range(count), key=ease), "nobody holds a part of it: the least load"
        inside = (index for index in range(count) if loads[index] <= near)
        best = max(inside, key=lambda index: (matched[index], ease(index)))
        if matched[best] == longest:
            return best, "the longest match, near the least load"
        blocks, scale = max(1, len(arrival.text) // BLOCK), max(1.0, mean)
        scores = [held / blocks - (load - mean) / scale for held, load in zip(matched, loads, strict=True)]
        best = max(range(count), key=lambda index: (scores[index], ease(index)))
        return best, f"the best score: it holds {matched[best] / blocks:.0%}, load {loads[best]:.1f} of {mean:.1f}"

    def sent(self, arrival: Arrival, worker: str) -> None:
        self._turn += 1
        blocks = self._blocks(arrival)
        matched = self.index.lengths(blocks).get(worker, 0)
        self.index.sent(blocks, worker)
        self._usual += (len(arrival.text) - matched * BLOCK - self._usual) / 64
        _remember(self._open, (id(arrival), worker), (arrival, blocks, matched), OPEN)
        if arrival.program:
            _remember(self._programs, arrival.program, worker, PROGRAMS)

    def answered(self, arrival: Arrival, worker: str, cached: float | None) -> None:
        if (known := self._open.pop((id(arrival), worker), None)) is None:
            return
        _, blocks, matched = known
        self.index.computed(blocks, worker)
        if cached is None or not matched:
            return
        if cached * len(arrival.text) < WRONG * matched * BLOCK:
            self.index.shrink(worker)
        else:
            self.index.grow(worker)

    def removed(self, worker: str) -> None:
        self.index.removed(worker)

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
        return False

    def _blocks(self, arrival: Arrival) -> "array[int]":
        if self._last is None or self._last[0] is not arrival:
            self._last = arrival, chained(arrival.text, arrival.space)
        return self._last[1]


def _remember(known: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put an entry last; of more than `most`, the first is forgotten."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > most:
        known.popitem(last=False)
