"""Masking logits by bits: what a grammar allows next, or a client's list of ids. In torch, and in Triton on a GPU.

Bit v % 32 of word v // 32 says whether entry v of a vocabulary stays, the layout of xgrammar and llguidance.

On a CPU numpy does it, row by row: torch would wake its other threads for some tens of microseconds of work, which
costs ten times as much.
"""

import functools
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

WORD = 32
PIECE = 1024  # bytes of a mask at a time on a CPU: what they stand for fits into a cache


def mask_words(vocab_size: int) -> int:
    """int32 words in a line of a mask."""
    return -(-vocab_size // WORD)


def pack_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The line, int32 [mask_words], in which the bits of `ids` are set."""
    bits = np.zeros(mask_words(vocab_size) * WORD, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


def apply_bitmask(logits: Tensor, mask: Tensor, rows: Tensor, lines: Tensor | None = None) -> None:
    """Sets to -inf, in place, what `mask` has no bit for: line i of it is that of row `rows[i]` of `logits`.

    `logits` [S, V], of any float type, each row dense; `mask` int32 [n, mask_words(V)], each line dense; `rows` [N]
    int64, no row twice. With `lines` [N] int64 it is line `lines[i]` instead. All on one device; nothing waits for it.
    """
    assert mask.dtype == torch.int32 and mask.shape[1] == mask_words(logits.shape[1]), f"a mask of {mask.shape}"
    if not len(rows):
        return
    if logits.is_cuda and find_spec("triton") is not None:
        from engine.kernels.logits.bitmask import apply_bitmask as apply

        apply(logits, mask, rows, lines)
    elif logits.is_cpu and logits.dtype is torch.float32:
        _apply_on_cpu(
            logits.numpy(),
            mask.numpy().view(np.uint8),
            rows.tolist(),
            range(len(rows)) if lines is None else lines.tolist(),
        )
    else:
        apply_bitmask_reference(logits, mask, rows, lines)


def apply_bitmask_reference(logits: Tensor, mask: Tensor, rows: Tensor, lines: Tensor | None = None) -> None:
    """The definition of `apply_bitmask`. A byte of the mask is eight numbers of a table, which are added."""
    chosen = mask[: len(rows)] if lines is None else mask[lines]
    table = torch.from_numpy(_table()).to(logits.device, logits.dtype)
    bars = table.index_select(0, chosen.contiguous().view(torch.uint8).to(torch.int32).flatten())
    logits.index_add_(0, rows, bars.view(len(chosen), -1)[:, : logits.shape[1]])


def _apply_on_cpu(logits: np.ndarray, mask: np.ndarray, rows: Sequence[int], lines: Sequence[int]) -> None:
    """`mask` [n, bytes] uint8."""
    table, bars = _table(), np.empty((PIECE, 8), np.float32)
    for line, row in zip(lines, rows, strict=True):
        for first in range(0, mask.shape[1], PIECE):
            part = mask[line, first : first + PIECE]
            np.take(table, part, axis=0, out=bars[: len(part)], mode="clip")  # without `clip` it would copy first
            scores = logits[row, 8 * first : 8 * (first + PIECE)]
            scores += bars.reshape(-1)[: len(scores)]


@functools.cache
def _table() -> np.ndarray:
    """[256, 8] float32: -inf where bit i of a byte is 0, else 0."""
    return np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.float32(0), np.float32(-np.inf))
