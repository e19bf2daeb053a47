"""Masks of tokens over logits: 32 tokens a word, the lowest bit first, 0 bars a token. The torch reference is here, the
Triton kernel in triton_mask.py; it writes what is barred and reads no logits.

On a CPU numpy does it, row by row: torch would wake its other threads for some tens of microseconds of work, which
costs ten times as much.
"""

import functools
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

PIECE = 1024  # bytes of a mask at a time: what they stand for is small enough to come from the heap, and for a cache


def apply_masks(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """-inf, in place, for what `masks` [R, words] int32 bar: line i is of row `rows[i]` of `logits` [S, V], V at most
    32 * words. `rows` [R] int64 holds each row once."""
    if logits.is_cuda and find_spec("triton") is not None:
        from engine.kernels.triton_mask import apply

        apply(logits, masks, rows)
    elif logits.is_cpu and logits.dtype is torch.float32:
        _apply_on_cpu(logits.numpy(), masks.numpy().view(np.uint8), rows.tolist())
    else:
        apply_reference(logits, masks, rows)


def apply_reference(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """As `apply_masks`, in torch: a byte of the masks is eight numbers of a table, which are added."""
    table = torch.from_numpy(_bars()).to(logits.device, logits.dtype)
    bars = table.index_select(0, masks.view(torch.uint8).to(torch.int32).flatten())
    logits.index_add_(0, rows, bars.view(len(masks), -1)[:, : logits.shape[1]])


def _apply_on_cpu(logits: np.ndarray, masks: np.ndarray, rows: list[int]) -> None:
    """`masks` [R, bytes] uint8."""
    table, bars = _bars(), np.empty((PIECE, 8), np.float32)
    for mask, row in zip(masks, rows, strict=True):
        for first in range(0, len(mask), PIECE):
            part = mask[first : first + PIECE]
            np.take(table, part, axis=0, out=bars[: len(part)], mode="clip")  # without `clip` it would copy first
            scores = logits[row, 8 * first : 8 * (first + PIECE)]
            scores += bars.reshape(-1)[: len(scores)]


@functools.cache
def _bars() -> np.ndarray:
    """[256, 8] float32: -inf where bit i of a byte is 0, else 0."""
    return np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.float32(0), np.float32(-np.inf))
