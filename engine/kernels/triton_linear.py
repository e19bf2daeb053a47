"""A few tokens times a matrix, in Triton: as fast as the matrix can be read.

For few tokens a product takes as long as reading the matrix, and a device reads at full speed only while enough is
under way. Two things see to that: a program keeps several blocks of its rows in flight, and it asks for the first of
them while the kernel before it still runs (engine/kernels/launch.py), as a matrix depends on nothing. Tokens are padded
to the rows of a matrix unit, which costs nothing here. Left out: many tokens, where cuBLAS is at home.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch_dependents, wait_for_previous


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Rows and columns of the matrix that a program takes at a time, and whether it reads the first of them ahead."""

    rows: int
    columns: int
    warps: int
    stages: int
    ahead: bool = True
    tokens: int = 64  # at most, in a program


@triton.jit
def skinny_kernel(
    inputs, weight, bias, out, tokens, rows, columns, stride,
    BIASED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t, k = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    inside, real = n < rows, t < tokens
    lines = weight + tl.where(inside, n, 0).to(tl.int64)[:, None] * columns
    x_lines = inputs + t[:, None] * stride
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    first = 0
    if AHEAD:
        w = tl.load(lines + k[None, :], mask=(k < columns)[None, :], other=0.0)
        wait_for_previous(DEPENDS)
        x = tl.load(x_lines + k[None, :], mask=real[:, None] & (k < columns)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        first = COLUMNS
    else:
        wait_for_previous(DEPENDS)
    for begin in tl.range(first, columns, COLUMNS):
        at = begin + k
        if EVEN:
            x = tl.load(x_lines + at[None, :], mask=real[:, None], other=0.0)
            w = tl.load(lines + at[None, :])
        else:
            x = tl.load(x_lines + at[None, :], mask=real[:, None] & (at < columns)[None, :], other=0.0)
            w = tl.load(lines + at[None, :], mask=(at < columns)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    if BIASED:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = out + t[:, None] * rows + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


def skinny_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, cut: Cut) -> Tensor:
    """y = x Wᵀ + b: `inputs` [T, K] with dense rows, `weight` [N, K] dense, `bias` [N] to [T, N]."""
    (tokens, columns), rows = inputs.shape, weight.shape[0]
    out = torch.empty(tokens, rows, dtype=inputs.dtype, device=inputs.device)
    together = min(cut.tokens, max(16, triton.next_power_of_2(tokens)))
    skinny_kernel[(triton.cdiv(tokens, together), triton.cdiv(rows, cut.rows))](
        inputs, weight, weight if bias is None else bias, out, tokens, rows, columns, inputs.stride(0),
        BIASED=bias is not None, TOKENS=together, ROWS=cut.rows, COLUMNS=cut.columns,
        EVEN=columns % cut.columns == 0, AHEAD=cut.ahead,
        PRECISION="ieee" if inputs.dtype == torch.float32 else None,
        num_warps=cut.warps, num_stages=cut.stages, **launch_dependents(inputs),
    )  # fmt: skip
    return out
