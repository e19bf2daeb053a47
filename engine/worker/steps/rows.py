"""The rows of a step on the host."""

from dataclasses import dataclass

import numpy as np

from engine.messages.step import DRAFTS, NOTHING, TOKEN, StepPlan
from engine.worker.steps.copies import Among


@dataclass(frozen=True, slots=True)
class Rows:
    """The columns of a StepPlan, int64 [R]. On a GPU `starts` of rows of drafts are the least that they may be.

    Where attention runs in copies, they are this rank's rows, and `among` those of all copies."""

    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    yields: np.ndarray
    among: Among | None = None

    @classmethod
    def planned(cls, plan: StepPlan, among: Among | None = None) -> "Rows":
        packed = (plan.slots, plan.starts, plan.lengths, plan.yields)
        slots, starts, lengths, yields = (np.frombuffer(column, "<i4").astype(np.int64) for column in packed)
        return cls(slots, starts, lengths, yields, among)

    @classmethod
    def of(cls, rows: np.ndarray) -> "Rows":
        """From integers [R, 4]: slot, start, length, what the row yields."""
        return cls(*rows.astype(np.int64).reshape(-1, 4).T)

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def decode(self) -> bool:
        """Whether each row, of any copy, computes one token and yields the next."""
        if self.among is not None:
            return self.among.decode
        return bool(((self.yields == TOKEN) & (self.lengths == 1)).all())

    @property
    def drafts(self) -> np.ndarray:
        """Which rows may yield several tokens, [R] bool."""
        return self.yields == DRAFTS

    @property
    def most_rows(self) -> int:
        """Of the copy that has the most."""
        return len(self) if self.among is None else self.among.rows

    @property
    def most_tokens(self) -> int:
        """Of the copy that has the most."""
        return int(self.lengths.sum()) if self.among is None else max(self.among.tokens)

    @property
    def idle(self) -> bool:
        """Whether there is nothing in them but padding."""
        return self.among is not None and self.among.idle

    @property
    def yielding(self) -> np.ndarray:
        """The rows that yield tokens, [S] int64."""
        return np.flatnonzero(self.yields != NOTHING)
