"""Log-probabilities in one pass over the logits, in Triton: a token's own, its rank, and the likeliest ones.

`LogitOps.score` in reference.py is the definition. The likeliest K are in the K groups with the
largest maxima, so a second kernel, one program a row, looks at K groups and no more. Equals come in the order of their
ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.logits.filters import CHUNK, GROUP, float_of, key_of, load_groups


@triton.jit(do_not_specialize_on_alignment=["rows", "tokens"])
def _scan_kernel(
    logits, rows, tokens, maxima, chunk_maxima, chunk_sums, above, size, chunks, stride,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = logits + (tl.load(rows + i) if ROWS else i) * stride
    own = tl.load(line + tl.load(tokens + i)).to(tl.float32)
    x, _ = load_groups(line, chunk, size, GROUP, BLOCK)
    largest = tl.max(x, 1)
    top = tl.max(largest, 0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    groups: tl.constexpr = BLOCK // GROUP
    tl.store(maxima + (i * chunks + chunk) * groups + tl.arange(0, groups), largest)
    tl.store(chunk_maxima + i * chunks + chunk, top)
    tl.store(chunk_sums + i * chunks + chunk, tl.sum(tl.sum(tl.exp(x - anchor), 1), 0))
    tl.store(above + i * chunks + chunk, tl.sum(tl.sum((x > own).to(tl.int32), 1), 0))


@triton.jit
def _ordered(x, number):
    """int64 in the order of `x`, and of equals in that of falling numbers."""
    return (key_of(x, 0).to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)


@triton.jit(do_not_specialize_on_alignment=["rows", "tokens"])
def _score_kernel(
    logits, rows, tokens, maxima, chunk_maxima, chunk_sums, above, logprobs, ranks, top_ids, top_logprobs,
    size, chunks, groups, stride,
    ROWS: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
    COUNT: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    line = logits + (tl.load(rows + i) if ROWS else i) * stride
    c, g, k = tl.arange(0, CHUNKS), tl.arange(0, GROUPS), tl.arange(0, COUNTS)
    there = c < chunks
    chunk_top = tl.load(chunk_maxima + i * chunks + c, mask=there, other=float("-inf"))
    mass = tl.load(chunk_sums + i * chunks + c, mask=there, other=0.0)
    top = tl.max(chunk_top, 0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    total = tl.log(tl.sum(mass * tl.exp(chunk_top - anchor), 0)) + anchor
    tl.store(logprobs + i, tl.load(line + tl.load(tokens + i)).to(tl.float32) - total)
    tl.store(ranks + i, tl.sum(tl.load(above + i * chunks + c, mask=there, other=0), 0) + 1)
    nothing = tl.full((), -0x8000000000000000, tl.int64)
    largest = tl.load(maxima + i * groups + g, mask=g < groups, other=float("-inf"))
    left = tl.where(g < groups, _ordered(largest, g), nothing)
    chosen = tl.zeros([COUNTS], tl.int32)
    for n in range(COUNT):
        best = tl.max(left, 0)
        left = tl.where(left == best, nothing, left)
        chosen = tl.where(k == n, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), chosen)
    ids = chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (k < COUNT)[:, None] & (ids < size)
    x = tl.load(line + ids, mask=inside, other=float("-inf")).to(tl.float32)
    rest = tl.where(inside, _ordered(x, ids), nothing)
    found = tl.zeros([COUNTS], tl.int64)
    for n in range(COUNT):
        best = tl.max(tl.max(rest, 1), 0)
        rest = tl.where(rest == best, nothing, rest)
        found = tl.where(k == n, best, found)
    tl.store(top_ids + i * COUNT + k, 0x7FFFFFFF - (found & 0x7FFFFFFF).to(tl.int32), mask=k < COUNT)
    tl.store(top_logprobs + i * COUNT + k, float_of((found >> 32).to(tl.int32), 0) - total, mask=k < COUNT)


def score(logits: Tensor, tokens: Tensor, rows: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `LogitOps.score`; equals come in the order of their ids."""
    size, count_rows, device = logits.shape[1], len(tokens), logits.device
    chunks = triton.cdiv(size, CHUNK)
    groups = chunks * (CHUNK // GROUP)
    maxima = torch.empty(count_rows, groups, dtype=torch.float32, device=device)
    chunk_maxima, chunk_sums = torch.empty(2, count_rows, chunks, dtype=torch.float32, device=device)
    above = torch.empty(count_rows, chunks, dtype=torch.int32, device=device)
    logprobs = torch.empty(count_rows, dtype=torch.float32, device=device)
    ranks = torch.empty(count_rows, dtype=torch.int32, device=device)
    top_ids = torch.empty(count_rows, count, dtype=torch.int32, device=device)
    top_logprobs = torch.empty(count_rows, count, dtype=torch.float32, device=device)
    if count_rows:
        read = (logits, tokens if rows is None else rows, tokens)
        scanned = (maxima, chunk_maxima, chunk_sums, above)
        _scan_kernel[(count_rows, chunks)](
            *read, *scanned, size, chunks, logits.stride(0),
            ROWS=rows is not None, GROUP=GROUP, BLOCK=CHUNK, num_warps=8,
        )  # fmt: skip
        _score_kernel[(count_rows,)](
            *read, *scanned, logprobs, ranks, top_ids, top_logprobs, size, chunks, groups, logits.stride(0),
            ROWS=rows is not None, GROUP=GROUP, CHUNKS=triton.next_power_of_2(chunks),
            GROUPS=triton.next_power_of_2(groups), COUNT=count, COUNTS=triton.next_power_of_2(count), num_warps=8,
        )  # fmt: skip
    return logprobs, ranks, top_ids, top_logprobs
