"""Penalties and edits of logits for the rows that ask, in torch: the definition of triton_adjustments.py.

What each slot asks for lies in tables on the device, so a step says no more than which rows are meant. An edit adds a
value to one logit while the reply is shorter than `until` and the text so far ends in a prefix, which may be empty:
that is a bias, a stop id before min_tokens, or the last token of a bad word.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

# Lines of `SlotTables.columns`; the last three are float32 in the same bits.
PROMPT_LEN, EDITS, PREFIX_BASE, REPETITION, FREQUENCY, PRESENCE = range(6)
COLUMNS = 6
# Lines of `SlotTables.edits`; the value is float32 in the same bits. A prefix starts at PREFIX_BASE + START.
ID, VALUE, UNTIL, START, LENGTH = range(5)
EDIT_LINES = 5


@dataclass(slots=True)
class SlotTables:
    """What the slots ask for, all int32 on the device.

    A slot has its first EDITS edits, and no others: those that follow are of requests that had the slot before, and
    nothing of them may be read."""

    columns: Tensor  # [COLUMNS, slots]
    edits: Tensor  # [EDIT_LINES, slots, W]
    prefixes: Tensor  # [P]


@dataclass(frozen=True, slots=True)
class AskingRows:
    """Rows of a step, [N] int64 on the device: each one's place in the logits, its slot, and how many tokens it has."""

    rows: Tensor
    slots: Tensor
    ends: Tensor
    longest: int  # for penalties the largest of `ends`, for edits the longest prefix

    @classmethod
    def of(cls, numbers: Tensor, longest: int) -> "AskingRows":
        """Of the three in one tensor, [3, N]."""
        rows, slots, ends = numbers.unbind(0)
        return cls(rows, slots, ends, longest)


def penalize(logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor, scratch: Tensor) -> None:
    """Penalises, in place, what `asking` rows of `logits` [S, V] float32 have in `tokens` [slots, P] int32.

    The repetition penalty (Keskar et al. 2019, arXiv:1909.05858) looks at prompt and reply; the frequency and the
    presence penalty, OpenAI's, at the reply alone. `scratch` int32 [n, V] is zero, and is so afterwards.
    """
    if logits.is_cuda and find_spec("triton") is not None:
        from engine.kernels.logits import adjustments as triton_adjustments

        triton_adjustments.penalize(logits, asking, tables, tokens, scratch)
    else:
        penalize_reference(logits, asking, tables, tokens)


def penalize_reference(logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor) -> None:
    """The definition of `penalize`."""
    repetition, frequency, presence = tables.columns[REPETITION:, asking.slots].view(torch.float32)[:, :, None]
    starts = tables.columns[PROMPT_LEN, asking.slots]
    said = tokens[asking.slots, : asking.longest].to(torch.int64)  # what lies beyond a row's end weighs nothing
    place = torch.arange(said.shape[1], device=logits.device)
    known = (place < asking.ends[:, None]).to(logits.dtype)
    replied = known * (place >= starts[:, None])
    block = logits[asking.rows]
    seen = torch.zeros_like(block).scatter_add_(1, said, known) > 0
    counts = torch.zeros_like(block).scatter_add_(1, said, replied)
    block = torch.where(seen, torch.where(block > 0, block / repetition, block * repetition), block)
    logits[asking.rows] = block - frequency * counts - presence * (counts > 0)


def edit(logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor, most: int) -> None:
    """Adds to `logits` [S, V] float32, in place, what the edits of `asking` rows say; none has more than `most`."""
    if logits.is_cuda and find_spec("triton") is not None:
        from engine.kernels.logits import adjustments as triton_adjustments

        triton_adjustments.edit(logits, asking, tables, tokens, most)
    else:
        edit_reference(logits, asking, tables, tokens, most)


def edit_reference(logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor, most: int) -> None:
    """The definition of `edit`. Sums do not mind that an id may come twice."""
    there = torch.arange(most, device=logits.device) < tables.columns[EDITS, asking.slots, None]
    ids, values, until, start, length = torch.where(there, tables.edits[:, asking.slots, :most], 0)  # each [N, most]
    ends = asking.ends[:, None]
    acts = there & (ends - tables.columns[PROMPT_LEN, asking.slots, None] < until) & (length <= ends)
    base = tables.columns[PREFIX_BASE, asking.slots, None] + start
    # From the last token back, as few texts end in the last tokens of a prefix: a long one costs a step no more than
    # a short one, unless the text holds it.
    for back in range(1, asking.longest + 1):
        inside = back <= length
        if not (acts & inside).any():
            break
        said = tokens[asking.slots[:, None], torch.where(inside, ends - back, 0).clamp(min=0)]
        wanted = tables.prefixes[torch.where(inside, base + length - back, 0)]
        acts &= ~inside | (said == wanted)
    # What does not act adds 0 to the first logit.
    ids = torch.where(acts, ids, 0).to(torch.int64)
    values = torch.where(acts, values.view(torch.float32), 0.0)
    logits.index_put_((asking.rows[:, None].expand_as(ids), ids), values, accumulate=True)
