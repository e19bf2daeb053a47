"""Masking logits by bits: what a grammar allows next, or a client's list of ids. In torch, and in Triton on a GPU.

Bit v % 32 of word v // 32 says whether entry v of a vocabulary stays, the layout of xgrammar and llguidance.
"""

import functools
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

WORD = 32


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
        from engine.kernels.triton_bitmask import apply_bitmask as apply

        apply(logits, mask, rows, lines)
    else:
        apply_bitmask_reference(logits, mask, rows, lines)


def apply_bitmask_reference(logits: Tensor, mask: Tensor, rows: Tensor, lines: Tensor | None = None) -> None:
    """The definition of `apply_bitmask`. A byte of the mask is eight entries of a table."""
    chosen = mask[: len(rows)] if lines is None else mask[lines]
    banned = _unset_bits(mask.device)[chosen.view(torch.uint8).to(torch.int64)].flatten(1)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits.masked_fill_(banned[rows.argsort()], -torch.inf)
    else:
        logits[rows] = logits[rows].masked_fill_(banned, -torch.inf)


@functools.cache
def _unset_bits(device: torch.device) -> Tensor:
    """[256, 8] bool: whether bit i of a byte is 0."""
    return (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1 == 0
