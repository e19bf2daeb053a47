"""What a step's result says of each copy of attention, where there are several.

plan        rows of copy 0 │ rows of copy 1            both number rows over the whole plan, and rows that yield
StepDone    its tokens     │ its tokens                tokens over all of these
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from engine.messages.step import StepDone

if TYPE_CHECKING:
    from engine.sched.batcher import Scheduler


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one copy in a step: how many rows it has, and how many of them yield tokens and vectors."""

    copy: "Scheduler"
    rows: int
    yielding: int
    vectors: int


def parted(done: StepDone, shares: Sequence[Share]) -> list[tuple[Share, StepDone]]:
    """What `done` says to each of `shares`, as a Scheduler that is alone would be told it."""
    if len(shares) == 1:
        return [(shares[0], done)]
    counts = array("i", done.counts)
    wide = len(done.vectors) // max(1, sum(share.vectors for share in shares))
    parts: list[tuple[Share, StepDone]] = []
    row = first = token = vector = 0
    for share in shares:
        end = first + share.yielding
        tokens = sum(counts[first:end])
        part = StepDone(
            step=done.step,
            counts=done.counts[4 * first : 4 * end],
            tokens=done.tokens[4 * token : 4 * (token + tokens)],
            seconds=done.seconds,
            vectors=done.vectors[vector : vector + share.vectors * wide],
        )
        if done.logprobs or done.prompt_logprobs or done.stuck:
            part = replace(
                part,
                logprobs=tuple(
                    replace(each, row=each.row - first) for each in done.logprobs if first <= each.row < end
                ),
                prompt_logprobs=tuple(
                    replace(each, row=each.row - row)
                    for each in done.prompt_logprobs
                    if row <= each.row < row + share.rows
                ),
                stuck=tuple((each - first, cause) for each, cause in done.stuck if first <= each < end),
            )
        parts.append((share, part))
        row, first, token, vector = row + share.rows, end, token + tokens, vector + share.vectors * wide
    return parts


def gathered(parts: Sequence[StepDone]) -> StepDone:
    """The result of a step, of those `parts` that the copies give, in their order: as slow as the slowest."""
    return StepDone(
        step=parts[0].step,
        counts=b"".join(part.counts for part in parts),
        tokens=b"".join(part.tokens for part in parts),
        seconds=max(part.seconds for part in parts),
        logprobs=tuple(each for part in parts for each in part.logprobs),
        prompt_logprobs=tuple(each for part in parts for each in part.prompt_logprobs),
        idle=max(part.idle for part in parts),
        vectors=b"".join(part.vectors for part in parts),
        stuck=tuple(each for part in parts for each in part.stuck),
        failed=tuple(each for part in parts for each in part.failed),
    )
