"""The rows of a step on the host."""

from dataclasses import dataclass

import numpy as np

from engine.messages.step import DRAFTS, NOTHING, TOKEN, StepPlan


@dataclass(frozen=True, slots=True)
class Rows:
    """The columns of a StepPlan, int64 [R]. On a GPU `starts` of rows of drafts are the least that they may be."""

    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    yields: np.ndarray

    @classmethod
    def planned(cls, plan: StepPlan) -> "Rows":
        columns = (plan.slots, plan.starts, plan.lengths, plan.yields)
        return cls(*(np.frombuffer(column, "<i4").astype(np.int64) for column in columns))

    @classmethod
    def of(cls, rows: np.ndarray) -> "Rows":
        """From integers [R, 4]: slot, start, length, what the row yields."""
        return cls(*rows.astype(np.int64).reshape(-1, 4).T)

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def decode(self) -> bool:
        """Whether each row computes one token and yields the next."""
        return bool(((self.yields == TOKEN) & (self.lengths == 1)).all())

    @property
    def drafts(self) -> np.ndarray:
        """Which rows may yield several tokens, [R] bool."""
        return self.yields == DRAFTS

    @property
    def yielding(self) -> np.ndarray:
        """The rows that yield tokens, [S] int64."""
        return np.flatnonzero(self.yields != NOTHING)
