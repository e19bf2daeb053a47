"""What stands around latent attention in Triton: `Ops.latent_into_pages` and `Ops.multiply_heads` say what is computed.

Before: the latents of a step normed, rotated and put into their pages, and every query head rotated, all in place; one
program takes the latent of one token, others some of its query heads. Before and after: the product of each head with a
matrix of its own, for steps of a few tokens, whose matrices are read before the kernel's turn comes. Left out: fusion
with the projections.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dense.reference import LatentNorm, Rotation
from engine.kernels.launch import launch_dependents, wait_for_previous

MANY_PROGRAMS = 4096  # with so many, each takes more heads
FEW_TOKENS = 64  # of a step whose products are ours; beyond, cuBLAS is as good


@triton.jit
def _latent_kernel(
    query, latents, weight, cosines, sines, cache, places,
    heads, pairs, size, query_row, query_head, latent_row, width, page_size, page_stride, rope_begin, epsilon,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, SIZE: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    there = pair < pairs
    wait_for_previous(DEPENDS)
    cosine = tl.load(cosines + token * pairs + pair, mask=there, other=0.0).to(tl.float32)
    sine = tl.load(sines + token * pairs + pair, mask=there, other=0.0).to(tl.float32)
    if INTERLEAVED:
        first_at, second_at = 2 * pair, 2 * pair + 1
    else:
        first_at, second_at = pair, pair + pairs
    if part == 0:
        line = latents + token * latent_row
        at = tl.arange(0, SIZE)
        mask = at < size
        raw = tl.load(line + at, mask=mask, other=0.0)
        x = raw.to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / size + epsilon)
        # Rounded to the activations' type before the cache's: who reads either gets numbers that belong together.
        normed = (x * scale * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)).to(raw.dtype)
        rope = line + size
        turned, other = turn(rope + first_at, rope + second_at, there, cosine, sine)
        tl.store(line + at, normed, mask=mask)
        tl.store(rope + first_at, turned, mask=there)
        tl.store(rope + second_at, other, mask=there)
        at_place = tl.load(places + token)
        place = cache + at_place // page_size * page_stride + at_place % page_size * width
        stored = cache.dtype.element_ty
        tl.store(place + at, normed.to(tl.float32).to(stored), mask=mask)
        tl.store(place + size + first_at, turned.to(tl.float32).to(stored), mask=there)
        tl.store(place + size + second_at, other.to(tl.float32).to(stored), mask=there)
    else:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        lines = query + token * query_row + head[:, None] * query_head + rope_begin
        both = (head < heads)[:, None] & there[None, :]
        firsts, seconds = lines + first_at[None, :], lines + second_at[None, :]
        turned_heads, other_heads = turn(firsts, seconds, both, cosine[None, :], sine[None, :])
        tl.store(firsts, turned_heads, mask=both)
        tl.store(seconds, other_heads, mask=both)


@triton.jit
def turn(firsts, seconds, mask, cosine, sine):
    """The numbers at two sets of addresses, rotated, in their type."""
    raw = tl.load(firsts, mask=mask, other=0.0)
    first = raw.to(tl.float32)
    second = tl.load(seconds, mask=mask, other=0.0).to(tl.float32)
    return (first * cosine - second * sine).to(raw.dtype), (second * cosine + first * sine).to(raw.dtype)


def latent_into_pages(
    query: Tensor, latents: Tensor, norm: LatentNorm, rotation: Rotation, interleaved: bool, cache: Tensor,
    places: Tensor,
) -> None:  # fmt: skip
    """As `Ops.latent_into_pages`."""
    tokens, heads, dim = query.shape
    cosines, sines = rotation
    size, pairs, width = len(norm.weight), cosines.shape[-1], latents.shape[1]
    assert latents.stride(1) == 1 and query.stride(2) == 1 and cache.stride(1) == width
    if not tokens:
        return
    together = min(triton.next_power_of_2(heads), 16 if tokens * heads > MANY_PROGRAMS else 4)
    _latent_kernel[(tokens, 1 + triton.cdiv(heads, together))](
        query, latents, norm.weight, cosines, sines, cache, places,
        heads, pairs, size, query.stride(0), query.stride(1), latents.stride(0), width,
        cache.shape[1], cache.stride(0), dim - 2 * pairs, norm.epsilon,
        INTERLEAVED=interleaved, HEADS=together, PAIRS=triton.next_power_of_2(pairs), SIZE=triton.next_power_of_2(size),
        num_warps=2, **launch_dependents(query),
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _multiply_kernel(
    inputs, weight, out, tokens, input_row, input_head, weight_head, weight_line, out_row, out_head,
    K: tl.constexpr, TURNED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one head. A line of its matrix is a row of [K, N], or if TURNED of [N, K]."""
    head, n = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    t, k = tl.arange(0, TOKENS), tl.arange(0, DEPTH)
    there = (t < tokens)[:, None]
    if TURNED:
        at = weight + head * weight_head + n[:, None] * weight_line + k[None, :]
    else:
        at = weight + head * weight_head + k[:, None] * weight_line + n[None, :]
    matrix = tl.load(at)
    wait_for_previous(DEPENDS)
    lines = inputs + t[:, None] * input_row + head * input_head + k[None, :]
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for begin in tl.static_range(0, K, DEPTH):
        x = tl.load(lines + begin, mask=there, other=0.0)
        if TURNED:
            total = tl.dot(x, tl.trans(matrix), total, input_precision=PRECISION)
        else:
            total = tl.dot(x, matrix, total, input_precision=PRECISION)
        if begin + DEPTH < K:
            matrix = tl.load(at + (begin + DEPTH) * (1 if TURNED else weight_line))
    tl.store(out + t[:, None] * out_row + head * out_head + n[None, :], total.to(out.dtype.element_ty), mask=there)


def multiply_heads(inputs: Tensor, weight: Tensor) -> Tensor | None:
    """As `Ops.multiply_heads`; None where this is not the way to do it."""
    tokens, heads, size = inputs.shape
    columns = weight.shape[2]
    turned = weight.stride(1) == 1
    if not 0 < tokens <= FEW_TOKENS or any(dim < 16 or dim & (dim - 1) for dim in (size, columns)):
        return None
    assert inputs.stride(2) == 1 and 1 in weight.stride()[1:], f"strides {inputs.stride()}, {weight.stride()}"
    out = torch.empty(tokens, heads, columns, dtype=inputs.dtype, device=inputs.device)
    width = min(columns, 32 if turned else 64)
    _multiply_kernel[(heads, columns // width)](
        inputs, weight, out, tokens, inputs.stride(0), inputs.stride(1), weight.stride(0),
        weight.stride(2) if turned else weight.stride(1), out.stride(0), out.stride(1),
        K=size, TURNED=turned, TOKENS=max(16, triton.next_power_of_2(tokens)), COLUMNS=width, DEPTH=min(size, 128),
        PRECISION="ieee" if inputs.dtype == torch.float32 else None, num_warps=4, **launch_dependents(inputs),
    )  # fmt: skip
    return out
