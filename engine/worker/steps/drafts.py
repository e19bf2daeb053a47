"""Rows of drafts: where they begin on the device, and how many of their tokens hold.

    slot     a  b  c │ d  e  f        the slot has a b c, and the drafts d e f behind them
    row            c │ d  e  f        it computes c and the drafts, and draws a token after each
    drawn            │ d  e  x  y     d and e are drawn as drafted, so x is right: d e x are yielded, y is dropped

A token is drawn after each position of such a row as if all drafts before it held. A draw is a function of logits, seed
and position alone, so what holds is what one token at a time would give. A row that comes too close to its request's
limit begins so much earlier that it ends in time: tokens that it has already count as drafts that hold, and stay.

Left out: who writes drafts into the table of tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import upload
from engine.worker.steps.rows import Rows


def real_starts(rows: Rows, lengths: Tensor, limits: np.ndarray) -> Tensor:
    """Where rows begin, [R] int64 on the device: `lengths` [slots] int64 there are the tokens of each slot, and
    `limits` [slots] those at which its request ends."""
    latest = np.where(rows.drafts, limits[rows.slots] - 1 - rows.lengths, rows.starts)
    slots, planned, last = upload(np.stack((rows.slots, rows.starts, latest)), lengths.device)
    return torch.where(upload(rows.drafts, lengths.device), torch.minimum(lengths[slots] - 1, last), planned)


@dataclass(frozen=True, slots=True)
class Draws:
    """The tokens that a step draws: D of S rows, each after the last token of a row, or after each of a row of drafts.

    `index` are the positions drawn after, of all that the step computes."""

    rows: Rows  # that yield tokens, [S]
    firsts: np.ndarray  # [S] int64: the first draw of each
    counts: np.ndarray  # [S] int64: how many each has
    slots: np.ndarray  # [D] int64
    index: np.ndarray  # [D] int64
    lasts: np.ndarray  # [D] int64: the position drawn after, as far as the host knows

    @classmethod
    def decode(cls, rows: Rows) -> "Draws":
        """Of rows that compute one token and yield the next."""
        each = np.arange(len(rows))
        return cls(rows, each, rows.lengths, rows.slots, each, rows.starts)

    @classmethod
    def of(cls, rows: Rows) -> "Draws":
        which = rows.yielding
        own = Rows(rows.slots[which], rows.starts[which], rows.lengths[which], rows.yields[which])
        ends = np.cumsum(rows.lengths)[which]
        counts = np.where(own.drafts, own.lengths, 1)
        firsts = np.cumsum(counts) - counts
        back = np.repeat(firsts + counts, counts) - 1 - np.arange(counts.sum())  # draws of the same row after each
        lasts = np.repeat(own.starts + own.lengths, counts) - 1 - back
        return cls(own, firsts, counts, np.repeat(own.slots, counts), np.repeat(ends, counts) - 1 - back, lasts)

    def chosen(self, skipped: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The draws that are yielded, int64: `counts` [S] of each row after the first `skipped` [S]."""
        each = np.arange(len(self.slots)) - np.repeat(self.firsts, self.counts)
        first, count = np.repeat(skipped, self.counts), np.repeat(counts, self.counts)
        return np.flatnonzero((each >= first) & (each < first + count))


@dataclass(frozen=True, slots=True)
class Held:
    """What holds of the draws of each of S rows, [S] int64: `counts` of them after the first `skipped`."""

    skipped: Tensor
    counts: Tensor


def held(draws: Draws, drawn: Tensor, drafted: Tensor, positions: Tensor, known: Tensor) -> Held:
    """`drawn` [D] are the tokens drawn and `drafted` [D] those that stood there, at `positions` [D]; `known` [D] are
    the tokens that each draw's slot had before."""
    had = positions < known
    firsts, counts = upload(np.stack((draws.firsts, draws.counts)), drawn.device)
    each = torch.arange(int(draws.counts.max()), device=drawn.device)
    which = firsts[:, None] + torch.minimum(each, counts[:, None] - 1)  # [S, most]
    right = ((drawn == drafted) | had)[which] & (each < counts[:, None] - 1)
    reached = 1 + right.cumprod(1).sum(1)
    skipped = (had[which] & (each < counts[:, None])).sum(1)
    return Held(skipped, reached - skipped)
