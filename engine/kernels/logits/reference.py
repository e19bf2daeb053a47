"""From logits to tokens, in torch: the definition of penalties, edits, masks, filters, the draw and log-probabilities.

triton.py computes the same on a GPU, host.py masks on a CPU. What each slot asks for lies in tables on the device, so a
step says no more than which rows are meant. An edit adds a value to one logit while the reply is shorter than `until`
and the text so far ends in a prefix, which may be empty: that is a bias, a stop id before min_tokens, or the last token
of a bad word.

Bit v % 32 of word v // 32 of a mask says whether entry v of a vocabulary stays, the layout of xgrammar and llguidance.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's odd increment, as a signed number
HALF = 0xFFFFFFFF
WORD = 32  # bits
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


class Filters(NamedTuple):
    """What is cut off each slot's rows before a draw, as `filtered` says, [slots]: 1, 0 and 0 are off."""

    top_ps: Tensor  # float32
    min_ps: Tensor  # float32
    top_ks: Tensor  # int32


class LogitOps:
    """The operations in torch. All tensors are on one device.

    `captures` says whether `draw` works on what is on the device alone, and so can be part of a CUDA graph."""

    captures = False

    def penalize(self, logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor, scratch: Tensor) -> None:
        """Penalises, in place, what `asking` rows of `logits` [S, V] float32 have in `tokens` [slots, P] int32.

        The repetition penalty (Keskar et al. 2019, arXiv:1909.05858) looks at prompt and reply; the frequency and the
        presence penalty, OpenAI's, at the reply alone. `scratch` int32 [n, V] is zero, and is so afterwards.
        """
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

    def edit(self, logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor, most: int) -> None:
        """Adds to `logits` [S, V] float32, in place, what the edits of `asking` rows say; none has more than `most`.

        Sums do not mind that an id may come twice."""
        there = torch.arange(most, device=logits.device) < tables.columns[EDITS, asking.slots, None]
        ids, values, until, start, length = torch.where(
            there, tables.edits[:, asking.slots, :most], 0
        )  # each [N, most]
        ends = asking.ends[:, None]
        acts = there & (ends - tables.columns[PROMPT_LEN, asking.slots, None] < until) & (length <= ends)
        base = tables.columns[PREFIX_BASE, asking.slots, None] + start
        # From the last token back, as few texts end in the last tokens of a prefix: a long one costs a step no more
        # than a short one, unless the text holds it.
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

    def apply_bitmask(self, logits: Tensor, mask: Tensor, rows: Tensor, lines: Tensor | None = None) -> None:
        """Sets to -inf, in place, what `mask` has no bit for: line i of it is that of row `rows[i]` of `logits`.

        `logits` [S, V], of any float type, each row dense; `mask` int32 [n, mask_words(V)], each line dense; `rows` [N]
        int64, no row twice. With `lines` [N] int64 it is line `lines[i]` instead. Nothing waits for the device.

        Here a byte of the mask is eight numbers of a table, which are added."""
        check_mask(logits, mask)
        chosen = mask[: len(rows)] if lines is None else mask[lines]
        table = torch.from_numpy(bars_of_bytes()).to(logits.device, logits.dtype)
        bars = table.index_select(0, chosen.contiguous().view(torch.uint8).to(torch.int32).flatten())
        logits.index_add_(0, rows, bars.view(len(chosen), -1)[:, : logits.shape[1]])

    def draw(
        self,
        logits: Tensor,
        slots: Tensor,
        lasts: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        filters: Filters | None = None,
        masks: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One token a row: ids [S] int64, also written into `tokens` [slots, positions] int32 after the row's last one,
        and counted in `lengths` [slots] int64: as many tokens as the slot then has.

        `logits` [S, V] of any float type, each row dense; `slots` and `lasts` [S] int64 are each row's slot and the
        position of its last token; `temperatures` float32 and `seeds` int64 are by slot. Temperature 0 is argmax, the
        lowest id of equals; else the draw is Gumbel-max (arXiv:1411.0030), keyed by the seed and the position
        `lasts` + 1, over what `filters` leave. `masks` are bits [lines, mask_words(V)] int32 and the line of each row
        [S] int64: what has no bit is not drawn. Not both: what filters leave depends on the masks, which are to be
        applied before.
        """
        assert masks is None or filters is None
        logits = logits.to(torch.float32, copy=masks is not None)
        if masks is not None:
            self.apply_bitmask(logits, masks[0], torch.arange(len(logits), device=logits.device), masks[1])
        ids, temperature = logits.argmax(dim=-1), temperatures[slots]
        if (temperature > 0).any():
            if filters is None:
                scores = scaled(logits, temperature[:, None])
            else:
                scores = filtered(logits, temperature, *(each[slots] for each in filters))
            scores += gumbel(seeds[slots], lasts + 1, logits.shape[1])
            ids = torch.where(temperature > 0, scores.argmax(dim=-1), ids)
        tokens[slots, lasts + 1] = ids.to(torch.int32)
        lengths[slots] = lasts + 2
        return ids

    def score(
        self, logits: Tensor, tokens: Tensor, rows: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of N tokens: log-probabilities [N] float32, ranks [N] int32, the `count` likeliest ids [N, count] int32, and
        those ids' log-probabilities.

        `logits` [S, V] of any float type, each row dense; `tokens` [N] int64, of the rows `rows` [N] int64, by default
        of all in turn. The order of equals is left open here.
        """
        logits = (logits if rows is None else logits[rows]).to(torch.float32)
        total = logits.logsumexp(dim=-1, keepdim=True)
        own = logits.gather(1, tokens.to(torch.int64)[:, None])
        best = logits.topk(count, dim=-1)
        ranks = (logits > own).sum(dim=-1) + 1
        return (own - total)[:, 0], ranks.to(torch.int32), best.indices.to(torch.int32), best.values - total


# ── masks ────────────────────────────────────────────────────────────────────────────────────


def mask_words(vocab_size: int) -> int:
    """int32 words in a line of a mask."""
    return -(-vocab_size // WORD)


def pack_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The line, int32 [mask_words], in which the bits of `ids` are set."""
    bits = np.zeros(mask_words(vocab_size) * WORD, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


def check_mask(logits: Tensor, mask: Tensor) -> None:
    assert mask.dtype == torch.int32 and mask.shape[1] == mask_words(logits.shape[1]), f"a mask of {mask.shape}"


@functools.cache
def bars_of_bytes() -> np.ndarray:
    """[256, 8] float32: -inf where bit i of a byte is 0, else 0."""
    return np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.float32(0), np.float32(-np.inf))


# ── filters ──────────────────────────────────────────────────────────────────────────────────


def scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """`logits` [S, V] float32 over `temperature` [S, 1], 0 the highest; over 1 where that is 0."""
    scores = logits - logits.amax(dim=-1, keepdim=True)  # the highest is 0: no overflow at any temperature
    return scores.div_(torch.where(temperature > 0, temperature, 1.0))


def filtered(logits: Tensor, temperatures: Tensor, top_ps: Tensor, min_ps: Tensor, top_ks: Tensor) -> Tensor:
    """`scaled` logits [S, V] with -inf for what the filters drop, which are by row, [S].

    They apply in the order temperature, top-k, top-p, min-p, each to what the one before left, as in transformers.
    Top-k keeps all that equal the k-th. Top-p keeps the fewest whose sum reaches p, of equals the lower ids.
    Min-p keeps all that are at least its share as likely as the likeliest, which always stays: it takes the same away
    wherever it stands, but before top-p, as in vLLM, it also makes the sum smaller that top-p has to reach.
    """
    scores = scaled(logits, temperatures[:, None])
    largest = int(top_ks.max())
    if largest > 0:
        _top_k(scores, top_ks[:, None].to(torch.int64), min(largest, logits.shape[1]))
    if (top_ps < 1).any():
        _top_p(scores, top_ps[:, None])
    if min_ps.any():
        scores.masked_fill_(scores < min_ps[:, None].log(), -torch.inf)
    return scores


def _top_k(scores: Tensor, top_k: Tensor, largest: int) -> None:
    """Drops, in place, what is less than the row's k-th score. `top_k` [S, 1], of which `largest` is the most."""
    best = scores.topk(largest, dim=-1).values
    threshold = best.gather(1, (top_k - 1).clamp(0, largest - 1))
    scores.masked_fill_((scores < threshold) & (top_k > 0), -torch.inf)


def _top_p(scores: Tensor, top_p: Tensor) -> None:
    """Nucleus sampling (arXiv:1904.09751): drops, in place, what lies beyond mass p. `top_p` [S, 1], 1 is off."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    mass = ordered.exp_()  # not normalised
    total = mass.cumsum(dim=-1)
    dropped = (total - mass >= top_p * total[:, -1:]) & (top_p < 1)
    dropped[:, 0] = False
    scores.masked_fill_(torch.zeros_like(dropped).scatter_(1, order, dropped), -torch.inf)


# ── noise ────────────────────────────────────────────────────────────────────────────────────


def gumbel(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise, float32 [S, size], of int64 `seeds` [S] and `positions` [S].

    A row's key is a mix of its seed and position by SplitMix64's finalizer (Steele, Lea, Flood: Fast splittable
    pseudorandom number generators, OOPSLA 2014). Entry i is lowbias32 (C. Wellons, hash-prospector), a hash of 32 bits,
    of i times a constant, plus the key's lower half; the upper one is mixed in half-way. The least number
    is 2**-33: what is less likely than that is drawn more seldom still.
    """
    key = _mix(_mix(seeds) + positions * GAMMA)[:, None]
    bits = (torch.arange(size, device=seeds.device) * (GAMMA >> 32 & HALF) + key) & HALF
    bits = (bits ^ bits >> 16) * 0x7FEB352D & HALF
    bits = (bits ^ bits >> 15 ^ _shifted(key, 32)) * 0x846CA68B & HALF
    bits ^= bits >> 16
    # As floats they keep their precision near 0, where log1p turns them into the noise's upper tail.
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    exponential = uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _mix(numbers: Tensor) -> Tensor:
    """SplitMix64's finalizer, on int64 that wraps round."""
    numbers = (numbers ^ _shifted(numbers, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    numbers = (numbers ^ _shifted(numbers, 27)) * (0x94D049BB133111EB - (1 << 64))
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, count: int) -> Tensor:
    """Logical shift to the right: torch's own copies the sign."""
    return (numbers >> count) & ((1 << (64 - count)) - 1)
