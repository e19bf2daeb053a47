"""Pieces: what several programs compute of one context, and how they are put together.

    blocks of a row   | piece of team 4 | piece of team 5 | piece of team 6 |
    left behind         partial sums      partial sums      partial sums
    the last to leave                                       reads them all, stores the result

A piece is three numbers or vectors a query: the largest score, the sum of exponentials, the sum of values weighed by
them. A context of one piece leaves nothing behind. What the prefix kernel computed is a piece as well, with which a
row's first one begins. Left out: what a piece is made of (decode.py, extend.py).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """What pieces give, between the programs of a kernel. A piece has L queries of each key head."""

    partial: Tensor  # [pieces, kv_heads, L, head_dim] float32
    maxima: Tensor  # [2, pieces, kv_heads, L] float32: largest score, sum of exponentials
    arrived: Tensor  # [sums, kv_heads] int32: pieces done; zeros between launches

    @classmethod
    def of(cls, pieces: int, sums: int, each: tuple[int, int, int], device: torch.device) -> "Scratch":
        """For so many `pieces` of so many `sums`, `each` of (kv_heads, L, head_dim)."""
        return cls(
            partial=torch.empty(pieces, *each, device=device),
            maxima=torch.empty(2, pieces, *each[:2], device=device),
            arrived=torch.zeros(sums, each[0], dtype=torch.int32, device=device),
        )


@triton.jit
def nothing_seen(i, d):
    """Largest score, sum of exponentials, values [i, d], where queries `i` have seen nothing yet."""
    summed = tl.zeros([i.shape[0], d.shape[0]], tl.float32)
    return tl.full(i.shape, float("-inf"), tl.float32), tl.zeros(i.shape, tl.float32), summed


@triton.jit
def begin_piece(
    partial, maxima, counts, count, row, head, own, at, earlier, g, d,
    SHARED: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """What a piece begins with: nothing, or if SHARED and it is a row's first, what the prefix kernel left for the row
    and key head. Largest score, sum of exponentials, values [QUERIES, DIM_BLOCK]."""
    largest, total, summed = nothing_seen(g, d)
    if SHARED:
        largest, total, summed = add_prefix(
            partial, maxima, counts, count, row, head, own, at, earlier, g, d, largest, total, summed,
            KV_HEADS, GROUP, DIM, PIECES,
        )  # fmt: skip
    return largest, total, summed


@triton.jit
def add_prefix(
    partial, maxima, counts, count, row, head, own, at, earlier, g, d, largest, total, summed,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Adds what the prefix kernel left, where the piece is the row's first."""
    cut = tl.load(counts + 1).to(tl.int32)
    units = PIECES * count * KV_HEADS * GROUP
    for prefix in range(0, tl.where((own > 0) & (at == earlier), cut, 0)):
        unit = ((prefix * count + row) * KV_HEADS + head) * GROUP
        largest, total, summed = add_piece(partial, maxima, unit, units, g, d, GROUP, largest, total, summed, DIM)
    return largest, total, summed


@triton.jit
def add_piece(partial, maxima, unit, units, i, d, lines, largest, total, summed, DIM: tl.constexpr):
    """Adds the piece at `unit` to a sum of pieces, for the queries `i` below `lines`; others see nothing in it. Reads
    past the first-level cache, which may hold what was there before another program wrote."""
    there = i < lines
    inside = there[:, None] & (d < DIM)[None, :]
    part = tl.load(partial + (unit + i[:, None]) * DIM + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    top = tl.load(maxima + unit + i, mask=there, other=float("-inf"), cache_modifier=".cg")
    part_total = tl.load(maxima + units + unit + i, mask=there, other=0.0, cache_modifier=".cg")
    new = tl.maximum(largest, top)
    anchor = tl.where(new == float("-inf"), 0.0, new)
    weight, rescale = tl.exp2(top - anchor), tl.exp2(largest - anchor)
    return new, total * rescale + part_total * weight, summed * rescale[:, None] + part * weight[:, None]


@triton.jit
def end_piece(
    partial, maxima, arrived, target, largest, total, summed, g, d, team, teams, row, head, at, stop, earlier, row_end,
    range_length,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Stores a row's result at `target` if the piece from block `at` to `stop` is all of the row; else leaves it, and
    who leaves the last one stores the result."""
    if (at == earlier) & (stop == row_end):
        inside = (g < GROUP)[:, None] & (d < DIM)[None, :]
        tl.store(target + g[:, None] * DIM + d[None, :], summed / total[:, None], mask=inside)
    else:
        units = 2 * teams * KV_HEADS * GROUP
        unit = ((2 * team + (at == earlier).to(tl.int32)) * KV_HEADS + head) * GROUP
        publish(partial, maxima, unit, units, g, d, GROUP, largest, total, summed, DIM)
        opener = earlier // range_length  # the team that begins the row
        pieces = (row_end - 1) // range_length - opener + 1
        done = tl.atomic_add(arrived + row * KV_HEADS + head, 1, sem="acq_rel")
        if done == pieces - 1:
            tl.store(arrived + row * KV_HEADS + head, 0)
            sum_up(
                partial, maxima, units, opener, pieces, head, target, d,
                KV_HEADS, GROUP, DIM, GROUP_BLOCK, DIM_BLOCK, SOME,
            )  # fmt: skip


@triton.jit
def publish(partial, maxima, unit, units, i, d, lines, largest, total, summed, DIM: tl.constexpr):
    """Leaves a piece, the queries `i` below `lines`, for whoever sums up. All stores of this program come before the
    count that follows, which publishes them."""
    inside = (i < lines)[:, None] & (d < DIM)[None, :]
    tl.store(partial + (unit + i[:, None]) * DIM + d[None, :], summed, mask=inside)
    tl.store(maxima + unit + i, largest, mask=i < lines)
    tl.store(maxima + units + unit + i, total, mask=i < lines)
    tl.debug_barrier()


@triton.jit
def sum_up(
    partial, maxima, units, opener, pieces, head, target, d,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Stores at `target` what all `pieces` of a row give, of which the team `opener` left the first."""
    some = tl.arange(0, SOME)
    top = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    summed = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    for begin in range(0, pieces, SOME):
        piece = begin + some
        place = tl.where(piece == 0, 2 * opener + 1, 2 * (opener + piece))
        top, total, summed = add_pieces(
            partial, maxima, units, place * KV_HEADS + head, piece < pieces, top, total, summed,
            GROUP, DIM, GROUP_BLOCK, DIM_BLOCK,
        )  # fmt: skip
    few = tl.arange(0, GROUP_BLOCK)
    tl.store(
        target + few[:, None] * DIM + d[None, :], summed / total[:, None],
        mask=(few < GROUP)[:, None] & (d < DIM)[None, :],
    )  # fmt: skip


@triton.jit
def add_pieces(
    partial, maxima, units, places, real, top, total, summed,
    GROUP: tl.constexpr, DIM: tl.constexpr, GROUP_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds pieces to a sum of pieces: largest score, sum of exponentials, values [GROUP_BLOCK, DIM_BLOCK]. A piece and
    key head is at `places`, if `real`."""
    g, d = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    there = real[:, None] & (g < GROUP)[None, :]
    at = places.to(tl.int64)[:, None] * GROUP + g[None, :]
    largest = tl.load(maxima + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(maxima + units + at, mask=there, other=0.0, cache_modifier=".cg")
    part = tl.load(
        partial + at[:, :, None] * DIM + d[None, None, :],
        mask=there[:, :, None] & (d < DIM)[None, None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    new = tl.maximum(top, tl.max(largest, 0))
    anchor = tl.where(new == float("-inf"), 0.0, new)
    weights, rescale = tl.exp2(largest - anchor[None, :]), tl.exp2(top - anchor)
    summed = summed * rescale[:, None] + tl.sum(part * weights[:, :, None], 0)
    return new, total * rescale + tl.sum(totals * weights, 0), summed
