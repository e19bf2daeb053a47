"""Masks on a CPU by numpy, row by row: torch would wake its other threads for some tens of microseconds of work, which
costs ten times as much. The rest is as in torch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kernels.logits.reference import LogitOps, bars_of_bytes, check_mask

PIECE = 1024  # bytes of a mask at a time: what they stand for fits into a cache


class HostLogitOps(LogitOps):
    """The operations on tensors of a CPU."""

    def apply_bitmask(self, logits: Tensor, mask: Tensor, rows: Tensor, lines: Tensor | None = None) -> None:
        if logits.dtype is not torch.float32:
            return super().apply_bitmask(logits, mask, rows, lines)
        check_mask(logits, mask)
        chosen = range(len(rows)) if lines is None else lines.tolist()
        _apply(logits.numpy(), mask.numpy().view(np.uint8), rows.tolist(), chosen)


def _apply(logits: np.ndarray, mask: np.ndarray, rows: Sequence[int], lines: Sequence[int]) -> None:
    """`mask` [n, bytes] uint8."""
    table, bars = bars_of_bytes(), np.empty((PIECE, 8), np.float32)
    for line, row in zip(lines, rows, strict=True):
        for first in range(0, mask.shape[1], PIECE):
            part = mask[line, first : first + PIECE]
            np.take(table, part, axis=0, out=bars[: len(part)], mode="clip")  # without `clip` it would copy first
            scores = logits[row, 8 * first : 8 * (first + PIECE)]
            scores += bars.reshape(-1)[: len(scores)]
