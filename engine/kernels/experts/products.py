"""The matrix products of a mixture of experts in Triton, and what comes between and after them.

    few tokens   each choice is a vector times its expert's matrices: `vector_up`, then `vector_down`, which also sums
    more         tasks, choices of one expert (routing.py): `multiply` by gate and up, then by down; `combine`

A task's product reads its expert's weights once, and an expert that no token chose is not read at all. Weights are of
the activations' type, or FP8 with a scale for each block of 128 x 128 or for each row, and become what the
activations are. Where both are FP8, products_fp8.py multiplies.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.experts.routing import Order
from engine.kernels.fp8.reference import BLOCK
from engine.kernels.fp8.triton import (
    BLOCK_SCALES,
    NO_SCALES,
    ROW_SCALES,
    Cut,
    add_product,
    load_step,
    scaled_line,
    silu_mul,
)
from engine.kernels.launch import launch_dependents, wait_for_previous


def scale_kind(weight: Tensor, scale: Tensor | None) -> int:
    """Which of the kinds of scales a stack of matrices has."""
    if scale is None:
        return NO_SCALES
    return ROW_SCALES if scale.dim() < weight.dim() else BLOCK_SCALES


# ── few tokens ───────────────────────────────────────────────────────────────────────────────


@triton.jit
def vector_up_kernel(
    hidden, weight, scales, experts, out,
    INNER: tl.constexpr, SIZE: tl.constexpr, TOP_K: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of ROWS rows for one choice; zeros for padding, which reads nothing."""
    choice = tl.program_id(1)
    wait_for_previous(DEPENDS)
    first = tl.program_id(0) * ROWS
    n, k = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = n < INNER
    expert = tl.load(experts + choice)
    end = tl.where(expert >= 0, SIZE, 0)
    expert = tl.maximum(expert, 0)
    line = weight + expert * (2 * INNER * SIZE) + tl.minimum(n, INNER - 1)[:, None].to(tl.int64) * SIZE
    half: tl.constexpr = (INNER + BLOCK - 1) // BLOCK * ((SIZE + BLOCK - 1) // BLOCK) if SCALES == 1 else INNER
    scale = scales + expert * (2 * half)
    token = hidden + choice // TOP_K * SIZE
    gates = tl.zeros([ROWS, COLUMNS], tl.float32)
    ups = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.static_range(0, SIZE, COLUMNS):  # unrolled, so that several blocks are on their way
        at = begin + k
        there = (at < end)[None, :]
        gate = tl.load(line + at[None, :], mask=there, other=0.0)
        up = tl.load(line + INNER * SIZE + at[None, :], mask=there, other=0.0)
        gates += gate.to(tl.float32) * scaled_line(token, scale, first, at, SIZE, SCALES, BLOCK)[None, :]
        ups += up.to(tl.float32) * scaled_line(token, scale + half, first, at, SIZE, SCALES, BLOCK)[None, :]
    gate, up = tl.sum(gates, 1), tl.sum(ups, 1)
    if SCALES == 2:
        gate *= tl.load(scale + n, mask=inside, other=0.0)
        up *= tl.load(scale + INNER + n, mask=inside, other=0.0)
    tl.store(out + choice * INNER + n, silu_mul(gate, up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def vector_down_kernel(
    made, weight, scales, experts, weights, base, out,
    SIZE: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, BASED: tl.constexpr, SCALES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one token's result: the weighed sum over its experts, of which padding has none."""
    token = tl.program_id(1)
    wait_for_previous(DEPENDS)
    first = tl.program_id(0) * ROWS
    n, k = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = n < SIZE
    line = weight + tl.minimum(n, SIZE - 1)[:, None].to(tl.int64) * INNER
    per: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK * ((INNER + BLOCK - 1) // BLOCK) if SCALES == 1 else SIZE
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for slot in tl.static_range(TOP_K):
        choice = token * TOP_K + slot
        expert, share = tl.load(experts + choice), tl.load(weights + choice)
        end = tl.where(expert >= 0, INNER, 0)
        expert = tl.maximum(expert, 0)
        scale = scales + expert * per
        shares = share * tl.load(scale + n, mask=inside, other=0.0)[:, None] if SCALES == 2 else share
        for begin in tl.static_range(0, INNER, COLUMNS):
            at = begin + k
            w = tl.load(line + expert * (SIZE * INNER) + at[None, :], mask=(at < end)[None, :], other=0.0)
            x = scaled_line(made + choice * INNER, scale, first, at, INNER, SCALES, BLOCK)
            total += w.to(tl.float32) * (x[None, :] * shares)
    y = tl.sum(total, 1)
    if BASED:
        y += tl.load(base + token * SIZE + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * SIZE + n, y.to(out.dtype.element_ty), mask=inside)


# ── tasks ────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def sum_products(
    lines, matrix, scale, k, N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, GATED: tl.constexpr,
    SCALES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of choices with rows of a matrix, and with those of another where GATED, [ROWS, COLUMNS]."""
    EVEN: tl.constexpr = K % DEPTH == 0
    gates = tl.zeros([ROWS, COLUMNS], tl.float32)
    ups = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, K, DEPTH):
        for step in tl.static_range(DEPTH // STEP):
            start = first + step * STEP
            block = (start if EVEN else tl.minimum(start, K - 1)) // BLOCK
            there = (start + k < K)[None, :]
            x, w = load_step(lines + start, there, EVEN), load_step(matrix + start, there, EVEN)
            gates = add_product(gates, x, w, x, scale + block, False, SCALES, PRECISION)
            if GATED:
                u = load_step(matrix + N * K + start, there, EVEN)
                ups = add_product(ups, x, u, x, scale + TILES + block, False, SCALES, PRECISION)
    return gates, ups


@triton.jit(do_not_specialize=["places"])
def multiply_kernel(
    inputs, weight, scales, out, choices, tasks, count, places,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, SCALES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """A task's choices times COLUMNS rows of its expert's matrix [N, K].

    GATED: `inputs` are tokens', the matrix is two, gate and up, and silu(gate) * up goes to the choices' places in the
    order. Otherwise `inputs` are by place, and results go to the choices' own rows.
    """
    STEP: tl.constexpr = BLOCK if DEPTH > BLOCK and SCALES == 1 else DEPTH
    blocks: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK * ((K + BLOCK - 1) // BLOCK)
    first_task = tl.program_id(0) // (TOGETHER * blocks) * TOGETHER
    within = tl.program_id(0) % (TOGETHER * blocks)
    wait_for_previous(DEPENDS)
    side = tl.minimum(tl.load(count) - first_task, TOGETHER)
    if within < side * blocks:
        task, column = first_task + within % side, within // side * COLUMNS
        expert = tl.load(tasks + task).to(tl.int64)
        begin, rows = tl.load(tasks + places + task), tl.load(tasks + 2 * places + task)
        m, n, k = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), tl.arange(0, STEP)
        place = begin + tl.minimum(m, rows - 1)
        choice = tl.load(choices + place)
        source = (choice // TOP_K if GATED else place).to(tl.int64)
        lines = inputs + source[:, None] * K + k[None, :]
        matrix = weight + expert * (2 * N * K if GATED else N * K)
        matrix += tl.minimum(n, N - 1)[:, None] * K + k[None, :]
        scale = scales
        if SCALES == 1:
            scale += expert * (2 * tiles if GATED else tiles) + column // BLOCK * ((K + BLOCK - 1) // BLOCK)
        gates, ups = sum_products(
            lines, matrix, scale, k, N, K, tiles, GATED, SCALES, BLOCK, ROWS, COLUMNS, DEPTH, STEP, PRECISION
        )
        if SCALES == 2:
            line = scales + expert * (2 * N if GATED else N) + n
            gates *= tl.load(line, mask=n < N, other=0.0)[None, :]
            if GATED:
                ups *= tl.load(line + N, mask=n < N, other=0.0)[None, :]
        made = silu_mul(gates, ups) if GATED else gates
        target = ((place if GATED else choice).to(tl.int64) * N)[:, None] + n[None, :]
        inside = (m < rows)[:, None] & (n < N)[None, :]
        tl.store(out + target, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    made, weights, places, base, out, SIZE: tl.constexpr, TOP_K: tl.constexpr, PLACED: tl.constexpr,
    BASED: tl.constexpr, COLUMNS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """The weighed sum of what was made of one token. PLACED: choice c is line places[c] of `made`. A choice of no
    weight may be padding's, whose line nobody wrote."""
    wait_for_previous(DEPENDS)
    token, n = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < SIZE
    total = tl.zeros([COLUMNS], tl.float32)
    if BASED:
        total += tl.load(base + token.to(tl.int64) * SIZE + n, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(TOP_K):
        choice = token * TOP_K + slot
        weight = tl.load(weights + choice)
        line = (tl.load(places + choice) if PLACED else choice).to(tl.int64)
        one = tl.load(made + line * SIZE + n, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(weight != 0, one * weight, 0.0)
    tl.store(out + token.to(tl.int64) * SIZE + n, total.to(out.dtype.element_ty), mask=inside)


# ── launches ─────────────────────────────────────────────────────────────────────────────────


def vector_up(
    hidden: Tensor, weight: Tensor, scale: Tensor | None, experts: Tensor, rows: int | None = None, columns: int = 0
) -> Tensor:
    """silu(gate) * up of each choice, [T * k, I]: of `hidden` [T, H] by the matrices [experts, 2 * I, H] that `experts`
    [T, k] choose. A program takes `rows` rows of gate and of up, `columns` at a time: by default 16 bytes a thread."""
    rows, columns = rows or (4 if weight.itemsize > 1 else 2), columns or 2048 // weight.itemsize
    (tokens, top_k), size, inner = experts.shape, hidden.shape[1], weight.shape[1] // 2
    out = torch.empty(tokens * top_k, inner, dtype=hidden.dtype, device=hidden.device)
    vector_up_kernel[(triton.cdiv(inner, rows), tokens * top_k)](
        hidden.contiguous(), weight, weight if scale is None else scale, experts, out,
        INNER=inner, SIZE=size, TOP_K=top_k, SCALES=scale_kind(weight, scale), BLOCK=BLOCK,
        ROWS=rows, COLUMNS=min(columns, triton.next_power_of_2(size)), num_warps=4, **launch_dependents(hidden),
    )  # fmt: skip
    return out


def vector_down(
    made: Tensor, weight: Tensor, scale: Tensor | None, experts: Tensor, weights: Tensor, base: Tensor | None,
    rows: int = 2, columns: int = 2048,
) -> Tensor:  # fmt: skip
    """What `vector_up` made, by the matrices [experts, H, I], weighed by `weights` [T, k] and summed with `base`:
    [T, H]."""
    (tokens, top_k), (_, size, inner) = experts.shape, weight.shape
    out = torch.empty(tokens, size, dtype=made.dtype, device=made.device)
    vector_down_kernel[(triton.cdiv(size, rows), tokens)](
        made, weight, weight if scale is None else scale, experts, weights, made if base is None else base, out,
        SIZE=size, INNER=inner, TOP_K=top_k, BASED=base is not None, SCALES=scale_kind(weight, scale), BLOCK=BLOCK,
        ROWS=rows, COLUMNS=min(columns, triton.next_power_of_2(inner)), num_warps=4, **launch_dependents(made),
    )  # fmt: skip
    return out


def multiply(
    inputs: Tensor, weight: Tensor, scale: Tensor | None, order: Order, cut: Cut, top_k: int, out: Tensor
) -> None:
    """The products of all of `order`'s tasks, into `out`.

    With `top_k`, `inputs` are by token and `weight` is gate and up; `out` [T * k, I] are their gated products, in the
    order of the choices. With 0, `inputs` are in that order, and `out` [T * k, H] is in that of the tokens.
    """
    if inputs.dtype == torch.float32:
        cut = replace(cut, depth=max(16, cut.depth // 4), stages=2)
    rows, size = weight.shape[1:]
    rows = rows // 2 if top_k else rows
    kind = scale_kind(weight, scale)
    if kind == BLOCK_SCALES:
        whole = cut.depth % BLOCK == 0 or BLOCK % cut.depth == 0
        assert whole and BLOCK % cut.columns == 0, f"{cut} crosses blocks of scales"
    assert cut.rows == order.rows
    multiply_kernel[(order.places * triton.cdiv(rows, cut.columns),)](
        inputs, weight, weight if scale is None else scale, out, order.choices, order.tasks, order.count, order.places,
        N=rows, K=size, TOP_K=max(top_k, 1), GATED=top_k > 0, SCALES=kind, BLOCK=BLOCK, ROWS=cut.rows,
        COLUMNS=cut.columns, DEPTH=cut.depth, TOGETHER=cut.together,
        PRECISION="ieee" if inputs.dtype == torch.float32 else "tf32", num_warps=cut.warps, num_stages=cut.stages,
        **launch_dependents(inputs),
    )  # fmt: skip


def combine(made: Tensor, weights: Tensor, places: Tensor | None, base: Tensor | None) -> Tensor:
    """[T, H]: the sum of `made` [T * k, H], weighed by `weights` [T, k], and of `base`. Choice c is line c of `made`,
    or line places[c]."""
    (tokens, top_k), size = weights.shape, made.shape[1]
    out = torch.empty(tokens, size, dtype=made.dtype, device=made.device)
    columns = min(1024, triton.next_power_of_2(size))
    combine_kernel[(tokens, triton.cdiv(size, columns))](
        made, weights, weights if places is None else places, made if base is None else base, out,
        SIZE=size, TOP_K=top_k, PLACED=places is not None, BASED=base is not None, COLUMNS=columns, num_warps=4,
        **launch_dependents(made),
    )  # fmt: skip
    return out
