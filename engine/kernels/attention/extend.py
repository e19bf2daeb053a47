"""What paged attention kernels in Triton have in common, and the one for rows of several tokens.

All compute what `attend` in reference.py does: query i of a row at position p = start + i sees the cached
positions max(0, p + 1 - window) .. p, all heads of a group share a key head, scores are in float32 and softmax is
taken online (arXiv:1805.02867). Keys and values are read where they lie: position n of a slot is at page
page_table[slot, n // page_size]. The query heads of one key head are rows of one matrix, so that keys are read once.

**Extend** has a program for each key head and block of queries, listed on the host; longest contexts come first.
Rows of one token are decode.py's.

Left out: soft caps, sinks, tree masks, a cut of the context of short extensions, latent attention.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from engine.kernels.launch import launch_dependents, wait_for_previous


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendRows:
    """Rows of several tokens in B blocks of queries."""

    blocks: Tensor  # [2, B] int32 or int64: the row, and which of its blocks; block 0 of an empty row is nothing
    slots: Tensor  # [R] int64
    starts: Tensor  # [R] int64
    offsets: Tensor  # [R + 1] int64


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when this module was imported: kernels run on the CPU, slowly."""
    return isinstance(extend_kernel, InterpretedFunction)


def extend_blocks(shape: PagedShape, dtype: torch.dtype) -> Blocks:
    """The cut of the extend kernel."""
    group = triton.next_power_of_2(shape.group)
    if dtype.itemsize == 4:  # exact products in float32 have no matrix units
        return Blocks(queries=max(16, group), positions=32, warps=4, stages=1)
    if shape.head_dim > 128:
        return Blocks(queries=max(128, group), positions=32, warps=8, stages=2)
    return Blocks(queries=max(128, group), positions=64, warps=8, stages=3)


def list_extend_blocks(starts: np.ndarray, lengths: np.ndarray, tokens: int) -> np.ndarray:
    """[2, B] int32: row and number of each block of `tokens` tokens of rows longer than 1; longest contexts first."""
    rows = np.flatnonzero(lengths > 1)
    counts = -(-lengths[rows] // tokens)
    row = np.repeat(rows, counts)
    block = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort(-(starts[row] + block * tokens), kind="stable")
    return np.ascontiguousarray(np.stack((row, block))[:, order], np.int32)


def attend_extend(
    query: Tensor, cache: Tensor, page_table: Tensor, out: Tensor, rows: ExtendRows, shape: PagedShape,
    blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """Attends with the tokens of `rows`. `query`, `out` [T, query_heads, head_dim], the last dimension dense, `out`
    in query's dtype; `cache` [pages, 2, page_size, kv_heads, head_dim] of that dtype or float8_e4m3fn, each page dense
    and the next any stride away; `page_table` [slots, P] int32."""
    blocks = blocks or extend_blocks(shape, query.dtype)
    extend_kernel[(shape.kv_heads, rows.blocks.shape[1])](
        query, cache, page_table, out,
        rows.blocks, rows.slots, rows.starts, rows.offsets, rows.blocks.shape[1],
        query.stride(0), out.stride(0), page_table.stride(0),
        **constants(shape, query, cache),
        QUERIES=blocks.queries, POSITIONS=blocks.positions,
        num_warps=blocks.warps, num_stages=blocks.stages, **launch_dependents(query),
    )  # fmt: skip


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


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["blocks", "slots", "starts", "offsets"])
def extend_kernel(
    query, cache, page_table, out, blocks, slots, starts, offsets, count, query_stride, out_stride, table_stride,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    FP8: tl.constexpr,
    QUERIES: tl.constexpr, POSITIONS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """Line i of the queries' matrix is token i // GROUP of the block, query head i % GROUP of the group."""
    TOKENS: tl.constexpr = QUERIES // GROUP
    head, task = tl.program_id(0), tl.program_id(1)
    row, block = tl.load(blocks + task).to(tl.int32), tl.load(blocks + count + task).to(tl.int32)
    start, offset = tl.load(starts + row).to(tl.int32), tl.load(offsets + row)
    length = (tl.load(offsets + row + 1) - offset).to(tl.int32)
    line = page_table + tl.load(slots + row) * table_stride
    i, d = tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK)
    within = block * TOKENS + i // GROUP
    inside = ((i < TOKENS * GROUP) & (within < length))[:, None] & (d < DIM)[None, :]
    token, heads = offset + within, (head * GROUP + i % GROUP) * DIM
    wait_for_previous(DEPENDS)
    q = tl.load(query + (token * query_stride + heads)[:, None] + d[None, :], mask=inside, other=0.0)
    q, size = scaled_query(q, FP8)
    first = start + block * TOKENS
    end = tl.minimum(first + TOKENS, start + length)
    seen_from = 0
    if WINDOW > 0:
        seen_from = tl.maximum(first + 1 - WINDOW, 0) // POSITIONS * POSITIONS
    clear = first // POSITIONS * POSITIONS if WINDOW == 0 else seen_from  # all queries see all before
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    keys = cache + head * DIM
    n = seen_from + tl.arange(0, POSITIONS)
    page = tl.load(line + tl.minimum(n, end - 1) // PAGE_SIZE)
    for _ in tl.range(seen_from, clear, POSITIONS):
        key, value = load_block(keys, page, n, d, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE, PAGE_STRIDE)
        n += POSITIONS
        page = tl.load(line + tl.minimum(n, end - 1) // PAGE_SIZE)
        scores = score_block(q, size, key, SCALE, PRECISION, FP8)
        largest, total, summed = add_block(q, scores, value, largest, total, summed, PRECISION)
    position = start + within
    for _ in tl.range(clear, end, POSITIONS):
        key, value = load_block(keys, page, tl.minimum(n, end - 1), d, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE, PAGE_STRIDE)
        scores = score_block(q, size, key, SCALE, PRECISION, FP8)
        seen = sees(position, n, WINDOW)
        n += POSITIONS
        page = tl.load(line + tl.minimum(n, end - 1) // PAGE_SIZE)
        scores = tl.where(seen, scores, float("-inf"))
        largest, total, summed = add_block(q, scores, value, largest, total, summed, PRECISION)
    target = out + (token * out_stride + heads)[:, None] + d[None, :]
    tl.store(target, summed / total[:, None], mask=inside)
