"""What mask.py defines, in Triton: one program writes -inf over a part of one row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # logits of one program


@triton.jit
def _mask_kernel(logits, masks, rows, size, words, stride, BLOCK: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < size
    word = tl.load(masks + line * words + ids // 32, mask=inside, other=-1)
    barred = ((word >> (ids % 32)) & 1) == 0
    row = tl.load(rows + line)
    tl.store(logits + row * stride + ids, float("-inf"), mask=inside & barred)


def apply(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """`masks` [R, words] int32 over the rows `rows` [R] int64 of `logits` [S, V], of any float type, each row dense."""
    assert masks.dtype == torch.int32 and logits.stride(1) == 1
    size = logits.shape[1]
    grid = (len(rows), triton.cdiv(size, CHUNK))
    _mask_kernel[grid](logits, masks, rows, size, masks.shape[1], logits.stride(0), BLOCK=CHUNK, num_warps=4)
