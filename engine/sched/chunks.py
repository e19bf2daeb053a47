"""How long the chunks of prompts are in a pipeline, so that all stages have work and none waits for a long one.

A token costs more the longer its context is: a chunk of c tokens from position s on takes work in proportion to

    c * (1 + attention * (s + c / 2))      attention: what a token of context adds, beside what a token costs alone

The prompts of one step get the work of a whole step's tokens without context, so a long prompt's late chunks are as
much shorter as each of their tokens costs more. Where less than that is left to compute for all stages, a step gets
a share of it: SHARES steps for each stage, so that no stage idles for long at the end. But no chunk is shorter for that
than LEAST tokens, below which a device is no faster.
Left out: what decode rows of the same step cost beyond one token each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from math import sqrt

from engine.sched.columns import StepColumns
from engine.sched.request import Request

SHARES = 2
LEAST = 512
LOOKED_AT = 32  # requests that run or wait, when it is asked how much there is to compute


@dataclass(frozen=True, slots=True)
class ChunkRule:
    """Of steps of `most` tokens in a pipeline of `stages`; `attention` is as above."""

    most: int
    stages: int
    attention: float
    least: int = LEAST

    def work(self, start: int, length: int) -> float:
        """In tokens without context."""
        return length * (1.0 + self.attention * (start + length / 2))

    def budget(self, requests: Iterable[Request]) -> float:
        """The work that a step's prompts get, where the prompts of `requests` are still to be computed."""
        some = islice(requests, LOOKED_AT)
        left = sum(self.work(each.computed, len(each.ids) - each.computed) for each in some)
        least, most = self.work(0, min(self.least, self.most)), self.work(0, self.most)
        return min(most, max(least, left / (SHARES * self.stages)))

    def cut(self, step: StepColumns, start: int, end: int, page_size: int) -> int:
        """Where a chunk ends that could go from `start` to `end`, so that it takes no more than what is left of the
        step's work. A step that has no more of that has no more budget either."""
        length = self.length(start, step.work)
        if length < end - start:
            end = start + length
            end = max(end - end % page_size, start + 1)
            step.work = 0.0
        else:
            step.work -= self.work(start, end - start)
        if step.work < 1.0:
            step.budget = end - start  # which the chunk takes
        return end

    def length(self, start: int, work: float) -> int:
        """Tokens from position `start` on that take as much `work`; `least` at least, and a step's most at most."""
        if work <= 0.0:
            return 0
        alone = 1.0 + self.attention * start
        found = int(2 * work / (alone + sqrt(alone * alone + 2 * self.attention * work)))
        return min(self.most, max(found, min(self.least, int(work), self.most), 1))
