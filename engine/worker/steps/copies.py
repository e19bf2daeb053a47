"""A rank's part of a step where attention runs in copies: the rows of its own copy, and what the others have.

    plan     rows of copy 0 │ rows of copy 1 │ …      slots are numbered over all copies, pages within each
    copy 1                    rows of copy 1          slots are numbered from 0, as in the rank's tables

Every rank gets the whole plan. So it knows how many rows and tokens each copy has, and all ranks choose alike what
depends on that: whether a step replays a graph, of which size, and how large what they exchange is. A copy without rows
has one of the scratch slot, which yields nothing, and takes part in what the ranks do together.
"""

from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from engine.messages.step import DRAFTS, NOTHING, TOKEN, StepDone, StepPlan


@dataclass(frozen=True, slots=True)
class Among:
    """A step as all copies have it, and where this rank's rows stand in it."""

    tokens: tuple[int, ...]  # that each copy computes
    rows: int  # of the copy that has the most
    decode: bool  # each row, of any copy, computes one token and yields the next
    idle: bool  # this copy has no rows
    shows: bool  # a row, of any copy, computes a part of what its prompt shows
    first: int  # of the plan's rows, the first that is this copy's
    first_yielding: int  # the same, of those that yield tokens

    def numbered(self, done: StepDone) -> StepDone:
        """`done`, which numbers this copy's rows, with the numbers that they have in the plan."""
        if not (done.logprobs or done.prompt_logprobs or done.stuck):
            return done
        return replace(
            done,
            logprobs=tuple(replace(each, row=each.row + self.first_yielding) for each in done.logprobs),
            prompt_logprobs=tuple(replace(each, row=each.row + self.first) for each in done.prompt_logprobs),
            stuck=tuple((row + self.first_yielding, cause) for row, cause in done.stuck),
        )


@dataclass(frozen=True, slots=True)
class Copy:
    """Which of so many `copies` a rank is of, by `number`; each has so many `slots`."""

    number: int
    copies: int
    slots: int

    def own(self, plan: StepPlan, shows: bool = False) -> tuple[StepPlan, Among]:
        """This copy's part of `plan`, as if it were alone, and what is around it; `shows` as in Among."""
        slots, lengths, yields = (np.frombuffer(each, "<i4") for each in (plan.slots, plan.lengths, plan.yields))
        copies = slots // self.slots
        assert (np.diff(copies) >= 0).all(), "rows are in the order of their copies"
        first, end = np.searchsorted(copies, (self.number, self.number + 1)).tolist()
        yielding = (yields == TOKEN) | (yields == DRAFTS)
        among = Among(
            tokens=tuple(np.bincount(copies, lengths, self.copies).astype(int).tolist()),
            rows=int(np.bincount(copies, minlength=1).max()),
            decode=bool(((yields == TOKEN) & (lengths == 1)).all()),
            idle=first == end,
            shows=shows,
            first=first,
            first_yielding=int(yielding[:first].sum()),
        )
        offset = self.number * self.slots
        changed = {
            "admits": tuple(
                replace(admit, slot=admit.slot - offset)
                for admit in plan.admits
                if admit.slot // self.slots == self.number
            ),
            "keeps": tuple(
                replace(kept, slot=kept.slot - offset) for kept in plan.keeps if kept.slot // self.slots == self.number
            ),
            "pages": self._own_lines(plan.pages, 3),
            "encodes": self._own_lines(plan.encodes, 2),
            "forgets": self._own_lines(plan.forgets, 2),
        }
        if among.idle and len(slots):
            row = (self.slots, 0, 1, NOTHING)
            columns = [np.array([number], "<i4").tobytes() for number in row]
        else:
            part = slice(4 * first, 4 * end)
            columns = [(slots[first:end] - offset).tobytes(), plan.starts[part], plan.lengths[part], plan.yields[part]]
        names = ("slots", "starts", "lengths", "yields")
        return replace(plan, **dict(zip(names, columns, strict=True)), **changed), among

    def _own_lines(self, packed: bytes, columns: int) -> bytes:
        """Of lines that begin with a slot."""
        if not packed:
            return b""
        lines = np.frombuffer(packed, "<i4").reshape(-1, columns)
        own = lines[lines[:, 0] // self.slots == self.number].copy()
        own[:, 0] -= self.number * self.slots
        return own.tobytes()
