"""Attention of latent attention's expanded rows, in Triton: queries, keys and values lie row after row, without pages.

All heads of a key share its rotated part, which is read as it is instead of being copied to every head. Beside what is
attended, the kernel leaves the logarithm of the sum of exponentials, so that attention over parts of a context can be
added up (engine/layers/latent.py). For kernels of others, which want whole keys, `join_keys` makes them. Left out:
grouped heads, windows.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandedRows:
    """R rows in B blocks of queries."""

    blocks: Tensor  # [2, B] int64: the row, and which of its blocks
    queries: Tensor  # [R + 1] int64: where each row's queries begin, and end
    keys: Tensor  # [R + 1] int64
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandedCut:
    """Queries and keys at a time, warps, copies in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


def expanded_cut(dtype: torch.dtype) -> ExpandedCut:
    """The cut of the kernel for activations of `dtype`."""
    if dtype.itemsize == 4:
        return ExpandedCut(queries=16, keys=16, warps=4, stages=1)
    return ExpandedCut(queries=128, keys=64, warps=8, stages=2)


def list_expanded(queries: np.ndarray, keys: np.ndarray, causal: bool, size: int) -> np.ndarray:
    """[2, B] int64: row and number of each block of `size` queries; those with the most to see first."""
    counts = -(-queries // size)
    row = np.repeat(np.arange(len(queries)), counts)
    block = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    seen = keys[row] - queries[row] + (block + 1) * size if causal else keys[row]
    return np.stack((row, block))[:, np.argsort(-seen, kind="stable")]


def attend_expanded(
    query: Tensor, key: Tensor, rotated: Tensor, value: Tensor, out: Tensor, sums: Tensor, rows: ExpandedRows,
    scale: float, cut: ExpandedCut | None = None,
) -> None:  # fmt: skip
    """`query` [n, heads, key_dim + rope_dim], `key` [m, heads, key_dim], `rotated` [m, rope_dim], `value` [m, heads,
    value_dim], the last dimensions dense and powers of two; fills `out` [n, heads, value_dim] and `sums` [n, heads]."""
    cut = cut or expanded_cut(query.dtype)
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, rotated, value)) and out.is_contiguous()
    expanded_kernel[(rows.blocks.shape[1], query.shape[1])](
        query, key, rotated, value, out, sums, rows.blocks, rows.queries, rows.keys, rows.blocks.shape[1],
        *query.stride()[:2], *key.stride()[:2], rotated.stride(0), *value.stride()[:2], query.shape[1],
        SCALE=scale * 1.4426950408889634, CAUSAL=rows.causal,
        KEY=key.shape[2], ROPE=rotated.shape[1], VALUE=value.shape[2], QUERIES=cut.queries, KEYS=cut.keys,
        PRECISION="ieee" if query.dtype == torch.float32 else None, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["blocks", "queries", "keys"])
def expanded_kernel(
    query, key, rotated, value, out, sums, blocks, queries, keys, count,
    query_row, query_head, key_row, key_head, rotated_row, value_row, value_head, heads,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, KEY: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    task, head = tl.program_id(0), tl.program_id(1)
    row, block = tl.load(blocks + task), tl.load(blocks + count + task).to(tl.int32)
    first, offset = tl.load(queries + row), tl.load(keys + row)
    length = (tl.load(queries + row + 1) - first).to(tl.int32)
    context = (tl.load(keys + row + 1) - offset).to(tl.int32)
    i, n = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    d, e, v = tl.arange(0, KEY)[None, :], tl.arange(0, ROPE)[None, :], tl.arange(0, VALUE)[None, :]
    mine = (i < length)[:, None]
    line = query + (first + i)[:, None] * query_row + head * query_head
    q = tl.load(line + d, mask=mine, other=0.0)
    r = tl.load(line + KEY + e, mask=mine, other=0.0)
    seen_to = context - length + i if CAUSAL else i * 0 + context - 1  # the last key that a query sees
    end = tl.minimum(context, context - length + (block + 1) * QUERIES) if CAUSAL else context
    clear = (context - length + block * QUERIES + 1) // KEYS * KEYS if CAUSAL else context // KEYS * KEYS
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, VALUE], tl.float32)
    keys_of = key + head * key_head
    values_of = value + head * value_head
    for begin in tl.range(0, clear, KEYS):  # what all queries of the block see
        at = offset + begin + n
        k = tl.load(keys_of + at[:, None] * key_row + d)
        t = tl.load(rotated + at[:, None] * rotated_row + e)
        x = tl.load(values_of + at[:, None] * value_row + v)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.dot(r, tl.trans(t), scores, input_precision=PRECISION) * SCALE
        largest, total, summed = add_scores(q, scores, x, largest, total, summed, PRECISION)
    for begin in tl.range(clear, end, KEYS):
        there = (begin + n < end)[:, None]
        at = offset + begin + n
        k = tl.load(keys_of + at[:, None] * key_row + d, mask=there, other=0.0)
        t = tl.load(rotated + at[:, None] * rotated_row + e, mask=there, other=0.0)
        x = tl.load(values_of + at[:, None] * value_row + v, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.dot(r, tl.trans(t), scores, input_precision=PRECISION) * SCALE
        scores = tl.where((begin + n)[None, :] <= seen_to[:, None], scores, float("-inf"))
        largest, total, summed = add_scores(q, scores, x, largest, total, summed, PRECISION)
    line = (first + i) * heads + head
    tl.store(out + line[:, None] * VALUE + v, summed / total[:, None], mask=mine)
    tl.store(sums + line, (largest + tl.log2(total)) * 0.6931471805599453, mask=i < length)


@triton.jit
def add_scores(q, scores, value, largest, total, summed, PRECISION: tl.constexpr):
    """One block of keys more: new maximum, sum of exponentials, and sum of values, of each query."""
    new = tl.maximum(largest, tl.max(scores, 1))
    anchor = tl.where(new == float("-inf"), 0.0, new)
    exponentials = tl.exp2(scores - anchor[:, None])
    rescale = tl.exp2(largest - anchor)
    total = total * rescale + tl.sum(exponentials, 1)
    summed = tl.dot(exponentials.to(q.dtype), value, summed * rescale[:, None], input_precision=PRECISION)
    return new, total, summed


@triton.jit
def join_kernel(key, rotated, out, key_row, key_head, rotated_row, heads, KEY: tl.constexpr, ROPE: tl.constexpr,
                HEADS: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d, e = tl.arange(0, KEY)[None, :], tl.arange(0, ROPE)[None, :]
    there = (head < heads)[:, None]
    line = out + ((row * heads + head) * (KEY + ROPE))[:, None]
    tl.store(line + d, tl.load(key + row * key_row + head[:, None] * key_head + d, mask=there), mask=there)
    turned = tl.load(rotated + row * rotated_row + e)
    tl.store(line + KEY + e, tl.broadcast_to(turned, [HEADS, ROPE]), mask=there)


def join_keys(key: Tensor, rotated: Tensor) -> Tensor:
    """As `join_keys` in reference.py."""
    count, heads, dim = key.shape
    assert key.stride(2) == rotated.stride(1) == 1
    out = torch.empty(count, heads, dim + rotated.shape[1], dtype=key.dtype, device=key.device)
    together = min(8, triton.next_power_of_2(heads))
    join_kernel[(count, triton.cdiv(heads, together))](
        key, rotated, out, *key.stride()[:2], rotated.stride(0), heads,
        KEY=dim, ROPE=rotated.shape[1], HEADS=together, num_warps=2,
    )  # fmt: skip
    return out
