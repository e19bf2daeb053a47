"""Masks of tokens over logits: 32 tokens a word, the lowest bit first, 0 bars a token. The torch reference is here, the
Triton kernel in triton_mask.py; it writes what is barred and reads no logits.
"""

import functools
from importlib.util import find_spec

import torch
from torch import Tensor


def apply_masks(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """-inf, in place, for what `masks` [R, words] int32 bar: line i is of row `rows[i]` of `logits` [S, V], V at most
    32 * words. `rows` [R] int64 holds each row once."""
    if logits.is_cuda and find_spec("triton") is not None:
        from engine.kernels.triton_mask import apply

        apply(logits, masks, rows)
    else:
        apply_reference(logits, masks, rows)


def apply_reference(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """As `apply_masks`, in torch: a byte of the masks is eight entries of a table."""
    barred = _bits(logits.device)[masks.view(torch.uint8).to(torch.int64)].flatten(1)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits.masked_fill_(barred[rows.argsort()], -torch.inf)
    else:
        logits[rows] = logits[rows].masked_fill_(barred, -torch.inf)


@functools.cache
def _bits(device: torch.device) -> Tensor:
    """[256, 8] bool: whether bit i of a byte is 0."""
    bytes_ = torch.arange(256, device=device)[:, None]
    return (bytes_ >> torch.arange(8, device=device)) & 1 == 0
