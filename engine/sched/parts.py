"""What a step says to each of several fronts.

row      0 1 2 3 │ 4 5 6 │ 7 8      Rows that decode are in the order of their fronts (grouped.py), so a front's are
front    0 0 0 0   1 1 1   1 0      a slice of each column. The others, of prompts that end in this step, of drafts
                                    and of vectors, are few, or slow anyway: they go to their front one by one.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from engine.messages.reply import Tokens
from engine.messages.step import Logprobs
from engine.sched.columns import StepColumns
from engine.sched.fronts import front_of
from engine.sched.reply import Reply


class Parts(Reply):
    """What a result says, to each of so many `fronts`."""

    def __init__(self, number: int, step: StepColumns, now: float, fronts: int) -> None:
        super().__init__(number, step, now)
        # Where the rows of each front end that decode, and have one token each; those of the next one begin there.
        self._ends = [0] * fronts

    def take_one_each(
        self, tokens: "array[int]", logprobs: Sequence[Logprobs], stop_ids: Mapping[int, int], *, whole: bool
    ) -> None:
        """As Reply.take_one_each."""
        super().take_one_each(tokens, logprobs, stop_ids, whole=whole)
        step = self._step
        if step.ends is None:
            return
        self._ends = step.ends
        if not whole:
            begun = step.requests[len(step.requests) - step.firsts :]
            decoding = len(self.rids) - sum(map(self._awaited, begun))
            end = 0
            self._ends = [
                end := bisect_right(self.rids, front, end, decoding, key=front_of) for front in range(len(step.ends))
            ]

    def messages(self) -> list[Tokens]:
        """What is said to each front that it concerns, in their order."""
        rids, ends = self.rids, self._ends
        about_rows = self.finishes or self.cached or self.prefills or self.logprobs or self.prompt_logprobs
        if about_rows or self.vectors or ends[-1] < len(rids):
            return self._with_details()
        number, counts, tokens = self._number, bytes(self.counts), bytes(self.tokens)
        said, start = [], 0
        for end in ends:
            if end > start:
                said.append(Tokens(number, rids[start:end], counts[4 * start : 4 * end], tokens[4 * start : 4 * end]))
                start = end
        return said

    def _with_details(self) -> list[Tokens]:
        """As `messages`, where a row does not decode, or has more than a token to tell."""
        rids, counts, tokens = self.rids, bytes(self.counts), bytes(self.tokens)
        last = self._last(counts[4 * self._ends[-1] :], tokens[4 * self._ends[-1] :])
        details = self._placed(self._details())
        said, start = [], 0
        for end, (more_rids, more_counts, more_tokens), more in zip(self._ends, last, details, strict=True):
            own = rids[start:end] + more_rids
            if own:
                columns = counts[4 * start : 4 * end] + more_counts, tokens[4 * start : 4 * end] + more_tokens
                said.append(Tokens(self._number, own, *columns, **more))
            start = end
        return said

    def _details(self) -> dict[str, Sequence[Any]]:
        """The columns about single rows that are not empty."""
        columns: dict[str, Sequence[Any]] = {
            "finishes": self.finishes,
            "cached": self.cached,
            "logprobs": self.logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "vectors": self.vectors,
            "prefills": self.prefills,
        }
        return {name: column for name, column in columns.items() if column}

    def _last(self, counts: bytes, tokens: bytes) -> list[tuple[list[str], bytes, bytes]]:
        """For each front the rows behind those that decode, which have these `counts` and `tokens`."""
        found = [([], bytearray(), bytearray()) for _ in self._ends]  # type: ignore[var-annotated]
        at, rest = 0, self.rids[self._ends[-1] :]
        for rid, count in zip(rest, array("i", counts), strict=True):
            own = found[front_of(rid)]
            own[0].append(rid)
            own[1].extend(count.to_bytes(4, "little"))
            own[2].extend(tokens[at : at + 4 * count])
            at += 4 * count
        return [(rids, bytes(own_counts), bytes(own_tokens)) for rids, own_counts, own_tokens in found]

    def _placed(self, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """For each front what `columns` say of its rows, by their places there."""
        place = self._places()
        found: list[dict[str, Any]] = [{} for _ in self._ends]
        for name, column in columns.items():
            for item in column:
                if isinstance(item, tuple):
                    front, row = place(item[0])
                    moved: Any = (row, item[1])
                else:
                    front, row = place(item.row)
                    moved = item if row == item.row else replace(item, row=row)
                found[front][name] = (*found[front].get(name, ()), moved)
        return found

    def _places(self) -> Callable[[int], tuple[int, int]]:
        """What tells the front of a row, and its place there."""
        ends = self._ends
        starts = [0, *ends[:-1]]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        others: dict[int, tuple[int, int]] = {}
        for row in range(ends[-1], len(self.rids)):
            front = front_of(self.rids[row])
            others[row] = front, lengths[front]
            lengths[front] += 1

        def place(row: int) -> tuple[int, int]:
            if row in others:
                return others[row]
            front = bisect_right(ends, row)
            return front, row - starts[front]

        return place
