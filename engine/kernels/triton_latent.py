"""What latent attention needs before it attends, as one Triton kernel: the latents of a step normed, rotated and put
into their pages, and every query head rotated, all in place. Definition: `Ops.latent_into_pages`.

One program takes the latent of one token, others some of its query heads. Left out: fusion with the projections.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch_dependents, wait_for_previous
from engine.kernels.ops import LatentNorm, Rotation

MANY_PROGRAMS = 4096  # with so many, each takes more heads


@triton.jit
def _latent_kernel(
    query, latents, weight, cosines, sines, cache, places,
    heads, pairs, size, query_row, query_head, latent_row, width, rope_begin, epsilon,
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
        place = cache + tl.load(places + token) * width
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
    assert latents.stride(1) == 1 and query.stride(2) == 1 and cache.is_contiguous()
    if not tokens:
        return
    together = min(triton.next_power_of_2(heads), 16 if tokens * heads > MANY_PROGRAMS else 4)
    _latent_kernel[(tokens, 1 + triton.cdiv(heads, together))](
        query, latents, norm.weight, cosines, sines, cache, places,
        heads, pairs, size, query.stride(0), query.stride(1), latents.stride(0), width, dim - 2 * pairs, norm.epsilon,
        INTERLEAVED=interleaved, HEADS=together, PAIRS=triton.next_power_of_2(pairs), SIZE=triton.next_power_of_2(size),
        num_warps=2, **launch_dependents(query),
    )  # fmt: skip
