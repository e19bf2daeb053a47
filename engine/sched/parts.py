"""What a step says to each of several fronts.

row      0 1 2 3 │ 4 5 6 │ 7 8      Rows that decode are in the order of their fronts (grouped.py), so a front's are
front    0 0 0 0   1 1 1   1 0      a slice of each column. The others, of prompts that end in this step, of drafts
                                    and of vectors, are few, or slow anyway: they go to their front one by one.
"""

from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
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
            begun = step.requests[len(step.requests) - step.firsts :] if step.firsts else ()
            decoding = len(self.rids) - sum(map(self._awaited, begun))
            dropped = len(step.requests) - len(self.rids)
            # A group begins where it began in the step, or by at most as many rows earlier as were dropped.
            self._ends = [
                bisect_right(self.rids, front, max(end - dropped, 0), min(end, decoding), key=front_of)
                for front, end in enumerate(step.ends)
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
        rids, counts, tokens, ends = self.rids, bytes(self.counts), bytes(self.tokens), self._ends
        own: list[tuple[list[str], bytearray, bytearray]] = []
        start = 0
        for end in ends:
            columns = bytearray(counts[4 * start : 4 * end]), bytearray(tokens[4 * start : 4 * end])
            own.append((rids[start:end], *columns))
            start = end
        others: dict[int, tuple[int, int]] = {}  # rows that do not decode: the front of each, and its place there
        if (at := start) < len(rids):
            for row, count in enumerate(array("i", counts[4 * start :]), start):
                front = front_of(rids[row])
                its_rids, its_counts, its_tokens = own[front]
                others[row] = front, len(its_rids)
                its_rids.append(rids[row])
                its_counts += count.to_bytes(4, "little")
                its_tokens += tokens[4 * at : 4 * (at + count)]
                at += count
        more = self._details(others)
        return [
            Tokens(self._number, its_rids, bytes(its_counts), bytes(its_tokens), **more.get(front, {}))
            for front, (its_rids, its_counts, its_tokens) in enumerate(own)
            if its_rids
        ]

    def _details(self, others: Mapping[int, tuple[int, int]]) -> dict[int, dict[str, Any]]:
        """What is said about single rows, by front, column and place there."""
        found: dict[int, dict[str, Any]] = {}
        columns: tuple[tuple[str, Sequence[Any]], ...] = (
            ("finishes", self.finishes), ("cached", self.cached), ("prefills", self.prefills),
            ("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs), ("vectors", self.vectors),
        )  # fmt: skip
        for name, column in columns:
            for item in column:
                pair = type(item) is tuple
                row = item[0] if pair else item.row
                if row in others:
                    front, place = others[row]
                else:
                    front = bisect_right(self._ends, row)
                    place = row - self._ends[front - 1] if front else row
                moved = (place, item[1]) if pair else replace(item, row=place)
                said = found.setdefault(front, {})
                said[name] = (*said.get(name, ()), moved)
        return found
