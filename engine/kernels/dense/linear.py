"""Some tokens times a small matrix, in Triton.

Such a product takes about as long as it takes to launch it. cuBLAS cuts it into few programs; here there are enough for
all processors, and they are on the device before the kernel in front is over (engine/kernels/launch.py). Tokens are
padded to the rows of a matrix unit, which costs nothing. Left out: large matrices and many tokens, where cuBLAS is at
home.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch_dependents, wait_for_previous

SMALL = 8 << 20  # numbers in a matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Rows and columns of the matrix, and at most how many tokens, that a program takes at a time."""

    rows: int
    columns: int
    warps: int
    stages: int
    tokens: int = 64


def skinny_cut(tokens: int, rows: int, columns: int) -> Cut | None:
    """The cut for a matrix [rows, columns], where that is better than cuBLAS on an H200 (bench/kernels/linear.py)."""
    if not 32 < tokens <= 128 or rows * columns > SMALL or columns % 256:
        return None
    if rows <= 2048:
        return Cut(rows=16, columns=256, warps=4, stages=4)
    if tokens <= 64 and rows <= 4096:
        return Cut(rows=32, columns=128, warps=4, stages=5)
    if tokens <= 64 or rows <= 4096:
        return Cut(rows=64, columns=128, warps=4, stages=4)
    return None


@triton.jit
def silu_times(gate, up, dtype: tl.constexpr):
    """silu(gate) * up in float32, of sums that are rounded to `dtype` first."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up


@triton.jit(do_not_specialize=["tokens"])  # or a step of another number would wait for a compiler
def skinny_kernel(
    inputs, weight, bias, out, tokens, rows, columns, stride,
    BIASED: tl.constexpr, GATED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """GATED, the weight is gate and up, of `rows` each, and silu(gate) * up is what is stored."""
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t, k = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    inside, real = n < rows, t < tokens
    lines = weight + tl.where(inside, n, 0).to(tl.int64)[:, None] * columns
    x_lines = inputs + t[:, None] * stride
    up_lines = lines + rows.to(tl.int64) * columns if GATED else lines
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    up_total = tl.zeros([TOKENS, ROWS], tl.float32)
    wait_for_previous(DEPENDS)
    for begin in tl.range(0, columns, COLUMNS):
        at = begin + k
        if EVEN:
            x = tl.load(x_lines + at[None, :], mask=real[:, None], other=0.0)
            w = tl.load(lines + at[None, :])
        else:
            x = tl.load(x_lines + at[None, :], mask=real[:, None] & (at < columns)[None, :], other=0.0)
            w = tl.load(lines + at[None, :], mask=(at < columns)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        if GATED:
            v = tl.load(up_lines + at[None, :], mask=(at < columns)[None, :], other=0.0)
            up_total = tl.dot(x, tl.trans(v), up_total, input_precision=PRECISION)
    if BIASED:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIASED:
            up_total += tl.load(bias + rows + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        total = silu_times(total, up_total, out.dtype.element_ty)
    target = out + t[:, None] * rows + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


def skinny_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, cut: Cut, gated: bool = False) -> Tensor:
    """y = x Wᵀ + b: `inputs` [T, K] with dense rows, `weight` [N, K] dense, `bias` [N] to [T, N]; `gated`, silu of
    the first half of y times the second, [T, N / 2]."""
    (tokens, columns), rows, each = inputs.shape, weight.shape[0], cut.rows
    if gated:
        rows, each = rows // 2, each // 2
    out = torch.empty(tokens, rows, dtype=inputs.dtype, device=inputs.device)
    together = min(cut.tokens, max(16, triton.next_power_of_2(tokens)))
    skinny_kernel[(triton.cdiv(tokens, together), triton.cdiv(rows, each))](
        inputs, weight, weight if bias is None else bias, out, tokens, rows, columns, inputs.stride(0),
        BIASED=bias is not None, GATED=gated, TOKENS=together, ROWS=each, COLUMNS=cut.columns,
        EVEN=columns % cut.columns == 0,
        PRECISION="ieee" if inputs.dtype == torch.float32 else None,
        num_warps=cut.warps, num_stages=cut.stages, **launch_dependents(inputs),
    )  # fmt: skip
    return out
