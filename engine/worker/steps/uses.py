"""Which pages steps under way may use, so that copies of others need not wait for them.

    launched   step 7: slot 3 up to its page 12      step 8: slot 3 up to 12, slot 5 up to 2      table of slots
    a plan     gives slot 3 other pages ──> what slot 3 had counts as used by 7 and 8 until they are over

A step uses all pages that its rows have by its end, to read or to write. Left out: what else touches pages, such as
copies themselves (transfers.py).
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine.messages.step import DRAFTS, StepPlan


class End(Protocol):
    """Of a step: an event of the device."""

    def query(self) -> bool:
        """Whether it is over."""
        ...


@dataclass(slots=True)
class Launched:
    """A step's rows, the pages that each may use, and others: those that its slots had and have no more, and those that
    copies of states lie in."""

    slots: np.ndarray
    counts: np.ndarray
    end: End
    others: list[np.ndarray] = field(default_factory=list)


class PageUses:
    """Of a cache of `pages` pages of `page_size` tokens, of which each of `slots` has `each` at most."""

    def __init__(self, slots: int, each: int, page_size: int, pages: int) -> None:
        self._table = np.zeros((slots, each), np.int32)
        self._page_size, self._pages = page_size, pages
        self._under_way: list[Launched] = []

    def launched(self, plan: StepPlan, end: End) -> None:
        """The step of `plan`, which is this rank's, is under way, and over at `end`."""
        slots, indices, pages = np.frombuffer(plan.pages, "<i4").reshape(-1, 3).T
        had = self._table[slots, indices]
        for step in self._under_way:
            step.others.append(had)
        self._table[slots, indices] = pages
        columns = (plan.slots, plan.starts, plan.lengths, plan.yields)
        slots, starts, lengths, yields = (np.frombuffer(column, "<i4") for column in columns)
        counts = -(-(starts + lengths) // self._page_size)
        counts[yields == DRAFTS] = self._table.shape[1]  # where these begin is known to the device
        self._under_way = [*self._not_over(), Launched(slots, counts, end, [state_pages(plan)])]

    def busy(self, pages: np.ndarray) -> bool:
        """Whether a step under way may use one of these."""
        self._under_way = self._not_over()
        asked = np.zeros(self._pages, bool)
        asked[pages] = True
        for step in self._under_way:
            lines = asked[self._table[step.slots, : step.counts.max(initial=0)]]
            if (lines & (np.arange(lines.shape[1]) < step.counts[:, None])).any():
                return True
            if any(asked[pages].any() for pages in step.others):
                return True
        return False

    def _not_over(self) -> list[Launched]:
        return [step for step in self._under_way if not step.end.query()]


def state_pages(plan: StepPlan) -> np.ndarray:
    """The pages in which `plan` keeps copies of states, and those that slots begin with."""
    packed = [*(kept.pages for kept in plan.keeps), *(admit.state for admit in plan.admits)]
    return np.frombuffer(b"".join(packed), "<i4")
