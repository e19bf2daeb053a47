"""The products of a mixture of experts where weights and activations are FP8, by a Hopper's matrix units.

    choices of a task [rows, K] ─┐
    its expert's matrix [N, K] ──┴─ product of a step of K ─ times the scales of both ─ sum

To bfloat16 a Hopper converts E4M3 by a unit that makes 16 numbers a cycle: slower than memory gives them. Its matrix
units take E4M3 from shared memory as it is, 64 lines or more. Where tasks have fewer, the lines are the matrix's, and
the product is transposed: no weight passes through a register. Scales are loaded a step before they are wanted. Left
out: sizes that are no multiples of 128, which products.py multiplies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.experts.reference import ExpertWeights
from engine.kernels.experts.routing import Order
from engine.kernels.fp8.reference import BLOCK, E4M3, LARGEST
from engine.kernels.fp8.triton import BLOCK_SCALES, ROW_SCALES, Cut, quantize_tokens, silu_mul, to_fp8
from engine.kernels.launch import launch_dependents, wait_for_previous


@triton.jit
def block_scale(scales, at, SCALES: tl.constexpr):
    """That of a block of the matrix; those of rows come last."""
    return tl.load(scales + at) if SCALES == 1 else 1.0


@triton.jit
def scaled_product(x, w, each, scale, FLIPPED: tl.constexpr):
    """x wᵀ, or FLIPPED w xᵀ, times the scales of the lines of x and that of the block of w."""
    factor = each * scale
    return tl.dot(w, tl.trans(x)) * factor[None, :] if FLIPPED else tl.dot(x, tl.trans(w)) * factor[:, None]


@triton.jit
def sum_products(
    lines, matrix, within_matrix, input_scales, input_stride, source, scale,
    N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, GATED: tl.constexpr, SCALES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """Products of choices with rows of a matrix, and with those of another where GATED, [ROWS, COLUMNS] or FLIPPED.
    The scales of a step are read one step ahead."""
    each = tl.load(input_scales + source)
    gate_scale = block_scale(scale, 0, SCALES)
    up_scale = block_scale(scale, TILES if GATED else 0, SCALES)
    gates = tl.zeros([COLUMNS, ROWS] if FLIPPED else [ROWS, COLUMNS], tl.float32)
    ups = tl.zeros_like(gates)
    for start in range(0, K, DEPTH):
        x, w = tl.load(lines + start), tl.load(matrix + start + within_matrix)
        if GATED:
            u = tl.load(matrix + (N * K + start) + within_matrix)
        ahead = tl.minimum(start + DEPTH, K - DEPTH)
        next_each = tl.load(input_scales + ahead // DEPTH * input_stride + source)
        next_gate_scale = block_scale(scale, ahead // BLOCK, SCALES)
        gates += scaled_product(x, w, each, gate_scale, FLIPPED)
        if GATED:
            next_up_scale = block_scale(scale, TILES + ahead // BLOCK, SCALES)
            ups += scaled_product(x, u, each, up_scale, FLIPPED)
            up_scale = next_up_scale
        each, gate_scale = next_each, next_gate_scale
    return gates, ups


@triton.jit
def load_task(choices, tasks, places, task, m, ORDERED: tl.constexpr):
    """Of lines `m` of a task: their places in the order, their choices, and how many lines there are."""
    begin, rows = task, 1
    if ORDERED:
        begin, rows = tl.load(tasks + places + task), tl.load(tasks + 2 * places + task)
    place = begin + tl.minimum(m, rows - 1)
    return place, tl.load(choices + place) if ORDERED else place, rows


@triton.jit(do_not_specialize=["places", "input_stride", "out_stride"])
def multiply_fp8_kernel(
    inputs, input_scales, weight, scales, out, out_scales, choices, tasks, count, places, input_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, QUANTIZES: tl.constexpr,
    ORDERED: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """A task's choices times COLUMNS rows of its expert's matrix, or two: as `multiply_kernel`, with scales of `inputs`
    [K / DEPTH, input_stride]. QUANTIZES: results are FP8 with `out_scales` [N / COLUMNS, out_stride]. Not ORDERED:
    `tasks` are the choices' experts [places], each of which is a task by itself."""
    FLIPPED: tl.constexpr = ROWS < 64  # lines of the matrix units are those of the matrix
    columns: tl.constexpr = N // COLUMNS
    tiles: tl.constexpr = N // BLOCK * (K // BLOCK)
    first_task = tl.program_id(0) // (TOGETHER * columns) * TOGETHER
    within = tl.program_id(0) % (TOGETHER * columns)
    wait_for_previous(DEPENDS)
    side = tl.minimum((tl.load(count) if ORDERED else places) - first_task, TOGETHER)
    expert = tl.full([], -1, tl.int64)
    if within < side * columns:
        expert = tl.load(tasks + first_task + within % side).to(tl.int64)
    if expert >= 0:
        task, column = first_task + within % side, within // side * COLUMNS
        m, n, k = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
        place, choice, rows = load_task(choices, tasks, places, task, m, ORDERED)
        source = choice // TOP_K if GATED else place
        lines = inputs + source[:, None].to(tl.int64) * K + k[None, :]
        matrix = weight + expert * (2 * N * K if GATED else N * K) + column * K
        within_matrix = tl.arange(0, COLUMNS)[:, None] * K + k[None, :]
        scale = scales
        if SCALES == 1:
            scale += expert * (2 * tiles if GATED else tiles) + column // BLOCK * (K // BLOCK)
        gates, ups = sum_products(
            lines, matrix, within_matrix, input_scales, input_stride, source, scale,
            N, K, tiles, GATED, SCALES, BLOCK, ROWS, COLUMNS, DEPTH, FLIPPED,
        )  # fmt: skip
        if FLIPPED:
            gates, ups = tl.trans(gates), tl.trans(ups)
        if SCALES == 2:
            line = scales + expert * (2 * N if GATED else N) + n
            gates *= tl.load(line)[None, :]
            if GATED:
                ups *= tl.load(line + N)[None, :]
        made = silu_mul(gates, ups) if GATED else gates
        if QUANTIZES:
            size = tl.maximum(tl.max(tl.abs(made), 1), 1e-12) / LARGEST
            made = to_fp8(made, size[:, None], LARGEST)
            tl.store(out_scales + column // COLUMNS * out_stride + place, size, mask=m < rows)
        target = ((place if GATED else choice).to(tl.int64) * N)[:, None] + n[None, :]
        tl.store(out + target, made.to(out.dtype.element_ty), mask=(m < rows)[:, None])


def multiply_fp8(
    inputs: Tensor, input_scales: Tensor, weight: Tensor, scale: Tensor, tasks: Order | Tensor, cut: Cut, top_k: int,
    out: Tensor, out_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """As `multiply` of products.py, of E4M3 `inputs` and `weight`, whose sizes are multiples of 128.

    `input_scales` [lines, K / cut.depth] are of cut.depth numbers each, `out_scales` of E4M3 `out` of cut.columns; both
    lie as `quantize_tokens` makes them. `tasks` may be the experts [T, k], each choice a task by itself: for so few
    tokens that they hardly share experts.
    """
    rows, size = weight.shape[1:]
    rows = rows // 2 if top_k else rows
    assert not (rows % BLOCK or size % BLOCK or BLOCK % cut.columns or BLOCK % cut.depth), f"{cut} crosses blocks"
    assert input_scales.shape[1] * cut.depth == size, f"{cut} wants scales of as many numbers as it is deep"
    assert out_scales is None or out_scales.shape[1] * cut.columns == rows, f"{cut} makes scales of its columns"
    if isinstance(tasks, Order):
        assert cut.rows == tasks.rows, f"{cut} is for other tasks than those of {tasks.rows} rows"
        lists, places = (tasks.choices, tasks.tasks, tasks.count), tasks.places
    else:
        lists, places = (tasks, tasks, tasks), tasks.numel()
    multiply_fp8_kernel[(places * (rows // cut.columns),)](
        inputs, input_scales, weight, scale, out, input_scales if out_scales is None else out_scales, *lists, places,
        input_scales.stride(1), 0 if out_scales is None else out_scales.stride(1), N=rows, K=size,
        TOP_K=max(top_k, 1), GATED=top_k > 0, QUANTIZES=out_scales is not None, ORDERED=isinstance(tasks, Order),
        SCALES=ROW_SCALES if scale.dim() < weight.dim() else BLOCK_SCALES, BLOCK=BLOCK, LARGEST=LARGEST,
        ROWS=cut.rows, COLUMNS=cut.columns, DEPTH=cut.depth, TOGETHER=cut.together, num_warps=cut.warps,
        num_stages=cut.stages, **launch_dependents(inputs),
    )  # fmt: skip


def multiply_pair(
    hidden: Tensor, tasks: Order | Tensor, weights: ExpertWeights, top_k: int, up: Cut, down: Cut
) -> Tensor:
    """What each choice's expert makes of its token, [T * k, H] of hidden's type, in the order of the choices."""
    assert weights.gate_up_scale is not None and weights.down_scale is not None
    size, inner = weights.down.shape[1:]
    choices = len(hidden) * top_k
    numbers, scales = quantize_tokens(hidden, each=up.depth)
    made = torch.empty(choices, inner, dtype=E4M3, device=hidden.device)
    made_scales = torch.empty(inner // up.columns, choices, dtype=torch.float32, device=hidden.device).t()
    multiply_fp8(numbers, scales, weights.gate_up, weights.gate_up_scale, tasks, up, top_k, made, made_scales)
    lines = torch.empty(choices, size, dtype=hidden.dtype, device=hidden.device)
    multiply_fp8(made, made_scales, weights.down, weights.down_scale, tasks, down, 0, lines)
    return lines
