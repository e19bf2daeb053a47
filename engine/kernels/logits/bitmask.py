"""Masks in Triton: -inf where a bit is missing.

Whole lines are read and written, 16 bytes a thread. To write only what is barred would take as many stores as there
are numbers, and the memory 32 bytes for each."""

import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # logits that one program looks at


@triton.jit
def lets_through(mask, line, stride, ids, inside):
    """Whether `line` of `mask` has the bits of `ids`; what is not `inside` has none."""
    words = tl.load(mask + line * stride + ids // 32, mask=inside, other=0)
    return ((words >> (ids % 32)) & 1) != 0


@triton.jit(do_not_specialize_on_alignment=["rows", "lines"])
def _bitmask_kernel(logits, mask, rows, lines, size, stride, mask_stride, LINES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    line = tl.load(lines + i) if LINES else i
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < size
    scores = tl.load(logits + row * stride + ids, mask=inside)
    kept = tl.where(lets_through(mask, line, mask_stride, ids, inside), scores, float("-inf"))
    tl.store(logits + row * stride + ids, kept, mask=inside)


def apply_bitmask(logits: Tensor, mask: Tensor, rows: Tensor, lines: Tensor | None = None) -> None:
    """As `LogitOps.apply_bitmask`."""
    size = logits.shape[1]
    _bitmask_kernel[(len(rows), triton.cdiv(size, CHUNK))](
        logits, mask, rows, rows if lines is None else lines, size, logits.stride(0), mask.stride(0),
        LINES=lines is not None, BLOCK=CHUNK, num_warps=8,
    )  # fmt: skip
