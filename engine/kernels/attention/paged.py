"""What paged attention kernels in Triton have in common: shapes, what is compiled in, and a block of positions.

All compute what `attend` in reference.py does: query i of a row at position p = start + i sees the cached
positions max(0, p + 1 - window) .. p, all heads of a group share a key head, scores are in float32 and softmax is
taken online (arXiv:1805.02867). Keys and values are read where they lie: position n of a slot is at page
page_table[slot, n // page_size]. The query heads of one key head are rows of one matrix, so that keys are read once.

Left out: soft caps, sinks, tree masks, latent attention.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedShape:
    """What is compiled into a kernel. `scale` multiplies the scores."""

    query_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    scale: float
    window: int | None

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How a kernel is cut: rows of queries and positions at a time, warps, copies in flight."""

    queries: int
    positions: int
    warps: int
    stages: int


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when this module was imported: kernels run on the CPU, slowly."""
    return isinstance(online_softmax, InterpretedFunction)


def constants(shape: PagedShape, query: Tensor, cache: Tensor) -> dict[str, object]:
    """What both kinds of kernels are compiled for."""
    assert query.stride(1) == shape.head_dim and query.stride(2) == 1, f"a query of strides {query.stride()}"
    return {
        "SCALE": shape.scale * 1.4426950408889634,  # exponentials are of base 2
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "DIM": shape.head_dim,
        "DIM_BLOCK": triton.next_power_of_2(shape.head_dim),
        "PAGE_SIZE": shape.page_size,
        "PAGE_STRIDE": cache.stride(0),
        "WINDOW": shape.window or 0,
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
        "FP8": cache.dtype == torch.float8_e4m3fn,
    }


@triton.jit
def online_softmax(scores, largest, total):
    """One block more: (exponentials, what earlier sums are multiplied with, new maximum, new sum), per query."""
    new = tl.maximum(largest, tl.max(scores, 1))
    anchor = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen nothing yet
    exponentials = tl.exp2(scores - anchor[:, None])
    rescale = tl.exp2(largest - anchor)
    return exponentials, rescale, new, total * rescale + tl.sum(exponentials, 1)


@triton.jit
def scaled_query(q, FP8: tl.constexpr):
    """`q` [queries, dim] in the type that it meets keys in, and what its scores are then multiplied with. Beside an FP8
    cache that type is float16, to which the hardware converts; no query is too large for it once divided by its
    largest."""
    size = tl.full([q.shape[0]], 1.0, tl.float32)
    if FP8:
        size = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)
        q = (q.to(tl.float32) / size[:, None]).to(tl.float16)
    return q, size


@triton.jit
def score_block(q, size, key, SCALE: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr):
    """Scores [queries, positions], of exponentials to base 2."""
    scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision=PRECISION) * SCALE
    if FP8:
        scores = scores * size[:, None]
    return scores


@triton.jit
def add_block(q, scores, value, largest, total, summed, PRECISION: tl.constexpr):
    """One block of values more: largest score, sum of exponentials and of weighted values, per query."""
    weights, rescale, largest, total = online_softmax(scores, largest, total)
    summed = summed * rescale[:, None]
    summed = tl.dot(weights.to(q.dtype), value.to(q.dtype), summed, input_precision=PRECISION)
    return largest, total, summed


@triton.jit
def load_block(
    keys,
    page,
    n,
    d,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
):
    """Keys and values [positions, DIM_BLOCK] at positions `n` of a slot, which are in pages `page`."""
    place = page.to(tl.int64) * PAGE_STRIDE + (n % PAGE_SIZE) * (KV_HEADS * DIM)
    pointers = keys + place[:, None] + d[None, :]
    values = pointers + PAGE_SIZE * KV_HEADS * DIM
    if DIM == DIM_BLOCK:
        key, value = tl.load(pointers), tl.load(values)
    else:
        inside = (d < DIM)[None, :]
        key, value = tl.load(pointers, mask=inside, other=0.0), tl.load(values, mask=inside, other=0.0)
    return key, value


@triton.jit
def sees(position, n, WINDOW: tl.constexpr):
    """Whether queries at `position` see positions `n`: [queries, positions]."""
    seen = n[None, :] <= position[:, None]
    if WINDOW > 0:
        seen = seen & (n[None, :] > position[:, None] - WINDOW)
    return seen
