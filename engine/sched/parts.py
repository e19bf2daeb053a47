"""What a step says to each of several fronts.

row      0 1 2 3 │ 4 5 6 │ 7 8      Rows that decode are in the order of their fronts (grouped.py), so a front's are
front    0 0 0 0   1 1 1   1 0      a slice of each column. The others, of prompts that end in this step, of drafts
                                    and of vectors, are few, or slow anyway: they go to their front one by one.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from engine.messages.reply import Tokens
from engine.sched.request import Request


def parts(whole: Tokens, tokens: "array[int]", requests: Sequence[Request], ends: list[int]) -> list[Tokens]:
    """`whole`, the rows of which are of `requests`, as what is to be said to each front, of those that it concerns.

    The rows of front i that decode, with one token each, end before `ends[i]`, where those of the next front begin."""
    starts = [0, *ends[:-1]]
    rids = [whole.rids[start:end] for start, end in zip(starts, ends, strict=True)]
    ids = [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
    counts = [whole.counts[4 * start : 4 * end] for start, end in zip(starts, ends, strict=True)]
    others: dict[int, tuple[int, int]] = {}  # by row: its front and its place there
    if (at := ends[-1]) < len(requests):
        rest = array("i", whole.counts[4 * at :])
        for row, count in enumerate(rest, start=at):
            front = requests[row].front
            others[row] = front, len(rids[front])
            rids[front].append(whole.rids[row])
            counts[front] += count.to_bytes(4, "little")
            ids[front] += tokens[at : at + count]
            at += count

    def placed(row: int) -> tuple[int, int]:
        """The front of a row, and its place there."""
        if row in others:
            return others[row]
        front = bisect_right(ends, row)
        return front, row - starts[front]

    said: list[dict[str, list[Any]]] = [{} for _ in ends]
    for name in ("finishes", "logprobs", "prompt_logprobs"):
        for item in getattr(whole, name):
            front, place = placed(item.row)
            said[front].setdefault(name, []).append(replace(item, row=place))
    for name in ("cached", "prefills", "vectors"):
        for row, value in getattr(whole, name):
            front, place = placed(row)
            said[front].setdefault(name, []).append((place, value))
    return [
        Tokens(whole.step, rids[front], counts[front], ids[front].tobytes(), **{k: tuple(v) for k, v in more.items()})
        for front, more in enumerate(said)
        if rids[front]
    ]


def ends_of(awaited: list[bool], ends: list[int]) -> list[int]:
    """`ends` of groups of rows once those that are not `awaited` are left out."""
    found, start, count = [], 0, 0
    for end in ends:
        count += awaited[start:end].count(True)
        found.append(count)
        start = end
    return found
