"""Attention over a paged KV cache in Triton: one kernel for rows of one token, one for longer rows.

Both compute what engine.plugin.testing's reference does: query i of a row at position p = start + i sees the cached
positions max(0, p + 1 - window) .. p, all heads of a group share a key head, scores are in float32 and softmax is
taken online (arXiv:1805.02867). Keys and values are read where they lie: position n of a slot is at page
page_table[slot, n // page_size]. The query heads of one key head are rows of one matrix, so that keys are read once.

**Decode** cuts each row's context into pieces, and a fixed number of programs takes the pieces of all rows in turn:

    row 0: |-----|-----|---|   row 1: |--|   row 2: |-----|-|     pieces 0..5, each for every key head
    program p: pieces x heads p, p + programs, p + 2 * programs, ...

The cut is made on the device, from the positions there, so a CUDA graph captures the kernel once. A row's pieces depend
on its own length and the number of rows in the step, never on other rows, so neither do its numbers. Who finishes the
last piece of a row sums them all up, in their order; there is no second kernel.

**Extend** has a program for each key head and block of queries, listed on the host; longest contexts come first.

Left out: soft caps, sinks, tree masks, a cut of the context of short extensions, latent attention.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

MOST_PIECES = 64  # of one row; the sum over pieces reads its weights at once
SHORTEST, LONGEST = 128, 2048  # positions in a piece, where there are several, and where there can be more


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
class Scratch:
    """What pieces of rows give, between the programs of the decode kernel. A unit is a piece of a row."""

    partial: Tensor  # [units, kv_heads, group, head_dim] float32
    maxima: Tensor  # [2, units, kv_heads, group] float32: largest score, sum of exponentials
    arrived: Tensor  # [rows, kv_heads] int32: pieces done; zeros between launches

    @classmethod
    def of(cls, units: int, rows: int, shape: PagedShape, device: torch.device) -> "Scratch":
        heads = (shape.kv_heads, shape.group)
        return cls(
            partial=torch.empty(units, *heads, shape.head_dim, device=device),
            maxima=torch.empty(2, units, *heads, device=device),
            arrived=torch.zeros(rows, shape.kv_heads, dtype=torch.int32, device=device),
        )

    @property
    def units(self) -> int:
        return len(self.partial)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """D rows of one token."""

    slots: Tensor  # [D] int64: their lines of the page table
    positions: Tensor  # [D] int64: of their token; -1 where there is no row
    tokens: Tensor  # [D] int64: where it is among the T of the step
    scratch: Scratch
    pieces: int  # of each row that is long enough
    most: int  # of a row so long that its pieces would be over LONGEST
    programs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendRows:
    """Rows of several tokens in B blocks of queries."""

    blocks: Tensor  # [2, B] int32 or int64: the row, and which of its blocks; block 0 of an empty row is nothing
    slots: Tensor  # [R] int64
    starts: Tensor  # [R] int64
    offsets: Tensor  # [R + 1] int64


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when this module was imported: kernels run on the CPU, slowly."""
    return isinstance(decode_kernel, InterpretedFunction)


def decode_blocks(shape: PagedShape, cache_dtype: torch.dtype, dtype: torch.dtype) -> Blocks:
    """The cut of the decode kernel: about 64 KB of keys and values a stage, the best that bench/kernels_attention.py
    found."""
    width = triton.next_power_of_2(shape.head_dim) * max(dtype.itemsize, 2)
    positions = max(16, min(128, 32768 // width))
    queries = max(16, triton.next_power_of_2(shape.group))
    return Blocks(queries=queries, positions=positions if dtype.itemsize < 4 else positions // 2, warps=4, stages=2)


def extend_blocks(shape: PagedShape, dtype: torch.dtype) -> Blocks:
    """The cut of the extend kernel."""
    group = triton.next_power_of_2(shape.group)
    if dtype.itemsize == 4:  # exact products in float32 have no matrix units
        return Blocks(queries=max(16, group), positions=32, warps=4, stages=1)
    if shape.head_dim > 128:
        return Blocks(queries=max(128, group), positions=32, warps=8, stages=2)
    return Blocks(queries=max(128, group), positions=64, warps=8, stages=3)


def decode_pieces(rows: int, kv_heads: int, programs: int) -> tuple[int, int]:
    """(pieces of each row, pieces of a very long one) for a step of so many rows.

    The first fills the device's programs with the fewest rounds of equal work; the second bounds what the step waits
    for where one row is much longer than the others."""
    pairs = rows * kv_heads
    pieces = min(range(1, MOST_PIECES + 1), key=lambda n: -(-pairs * n // programs) / n * (1 + n / 50))
    return pieces, min(max(2048 // rows, pieces), MOST_PIECES)


def decode_programs(device: torch.device) -> int:
    """As many programs as the device runs at once."""
    if device.type == "cpu":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def plan_decode(
    slots: Tensor, positions: Tensor, tokens: Tensor, shape: PagedShape, programs: int, scratch: Scratch | None = None
) -> DecodeRows:
    """The plan for rows whose numbers are in these tensors ([D] int64) when the kernel runs. `scratch` is used if it is
    large enough; plans may share it, as their kernels run one after the other."""
    rows = len(slots)
    pieces, most = decode_pieces(rows, shape.kv_heads, programs)
    if scratch is None or scratch.units < rows * most or len(scratch.arrived) < rows:
        scratch = Scratch.of(rows * most, rows, shape, slots.device)
    return DecodeRows(
        slots=slots,
        positions=positions,
        tokens=tokens,
        scratch=scratch,
        pieces=pieces,
        most=most,
        programs=min(programs, rows * most * shape.kv_heads),
    )


def list_extend_blocks(starts: np.ndarray, lengths: np.ndarray, tokens: int) -> np.ndarray:
    """[2, B] int32: row and number of each block of `tokens` tokens of rows longer than 1; longest contexts first."""
    rows = np.flatnonzero(lengths > 1)
    counts = -(-lengths[rows] // tokens)
    row = np.repeat(rows, counts)
    block = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort(-(starts[row] + block * tokens), kind="stable")
    return np.ascontiguousarray(np.stack((row, block))[:, order], np.int32)


def attend_decode(
    query: Tensor, cache: Tensor, page_table: Tensor, out: Tensor, rows: DecodeRows, shape: PagedShape,
    blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """Attends with the tokens of `rows`. `query`, `out` [T, query_heads, head_dim], the last dimension dense, `out`
    in query's dtype; `cache` [pages, 2, page_size, kv_heads, head_dim] of that dtype or float8_e4m3fn; `page_table`
    [slots, P] int32."""
    blocks = blocks or decode_blocks(shape, cache.dtype, query.dtype)
    count, group = len(rows.slots), triton.next_power_of_2(shape.group)
    decode_kernel[(rows.programs,)](
        query, cache, page_table, out,
        rows.slots, rows.positions, rows.tokens, rows.scratch.partial, rows.scratch.maxima, rows.scratch.arrived,
        count, rows.pieces, rows.most, rows.scratch.maxima.stride(0),
        query.stride(0), out.stride(0), page_table.stride(0),
        **_constants(shape, query),
        ROWS=16 if count <= 16 else max(256, triton.next_power_of_2(count)),
        QUERIES=blocks.queries, POSITIONS=blocks.positions, PIECES=MOST_PIECES, SHORTEST=SHORTEST, LONGEST=LONGEST,
        GROUP_BLOCK=group, SOME=max(1, 8192 // (group * triton.next_power_of_2(shape.head_dim))),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def attend_extend(
    query: Tensor, cache: Tensor, page_table: Tensor, out: Tensor, rows: ExtendRows, shape: PagedShape,
    blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """As `attend_decode`, for rows of several tokens."""
    blocks = blocks or extend_blocks(shape, query.dtype)
    extend_kernel[(shape.kv_heads, rows.blocks.shape[1])](
        query, cache, page_table, out,
        rows.blocks, rows.slots, rows.starts, rows.offsets, rows.blocks.shape[1],
        query.stride(0), out.stride(0), page_table.stride(0),
        **_constants(shape, query),
        QUERIES=blocks.queries, POSITIONS=blocks.positions,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def _constants(shape: PagedShape, query: Tensor) -> dict[str, object]:
    assert query.stride(1) == shape.head_dim and query.stride(2) == 1, f"a query of strides {query.stride()}"
    return {
        "SCALE": shape.scale * 1.4426950408889634,  # exponentials are of base 2
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "DIM": shape.head_dim,
        "DIM_BLOCK": triton.next_power_of_2(shape.head_dim),
        "PAGE_SIZE": shape.page_size,
        "WINDOW": shape.window or 0,
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
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
def load_block(
    keys, page, n, d, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr
):
    """Keys and values [positions, DIM_BLOCK] at positions `n` of a slot, which are in pages `page`."""
    place = page.to(tl.int64) * (2 * PAGE_SIZE * KV_HEADS * DIM) + (n % PAGE_SIZE) * (KV_HEADS * DIM)
    pointers = keys + place[:, None] + d[None, :]
    values = pointers + PAGE_SIZE * KV_HEADS * DIM
    if DIM == DIM_BLOCK:
        key, value = tl.load(pointers), tl.load(values)
    else:
        inside = (d < DIM)[None, :]
        key, value = tl.load(pointers, mask=inside, other=0.0), tl.load(values, mask=inside, other=0.0)
    return key, value


@triton.jit(
    do_not_specialize=["count", "few", "most", "units"],
    do_not_specialize_on_alignment=["slots", "positions", "tokens", "arrived"],
)
def decode_kernel(
    query, cache, page_table, out, slots, positions, tokens, partial, maxima, arrived,
    count, few, most, units, query_stride, out_stride, table_stride,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, POSITIONS: tl.constexpr, PIECES: tl.constexpr,
    SHORTEST: tl.constexpr, LONGEST: tl.constexpr, GROUP_BLOCK: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Every program takes each pieces-times-heads-th task; see the module. `units`: of `partial`, times heads."""
    row_ids = tl.arange(0, ROWS)
    ends = tl.load(positions + row_ids, mask=row_ids < count, other=-1).to(tl.int32) + 1
    spans = tl.minimum(ends, WINDOW) if WINDOW > 0 else ends
    lengths = piece_length(spans, few, most, SHORTEST, LONGEST, POSITIONS)
    pieces = tl.cdiv(spans, lengths)
    until = tl.cumsum(pieces)
    g, d, n = tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK), tl.arange(0, POSITIONS)
    inside = (g < GROUP)[:, None] & (d < DIM)[None, :]
    for task in tl.range(tl.program_id(0), tl.sum(pieces) * KV_HEADS, tl.num_programs(0), num_stages=1):
        unit, head = task // KV_HEADS, task % KV_HEADS
        row = tl.sum((until <= unit).to(tl.int32))
        earlier = tl.sum(tl.where(until <= unit, pieces, 0)).to(tl.int64)  # pieces of the rows before
        piece = (unit - earlier).to(tl.int32)
        end = tl.load(positions + row).to(tl.int32) + 1
        token = tl.load(tokens + row)
        line = page_table + tl.load(slots + row) * table_stride
        span = tl.minimum(end, WINDOW) if WINDOW > 0 else end
        length = piece_length(span, few, most, SHORTEST, LONGEST, POSITIONS)
        first = end - span + piece * length
        last = tl.minimum(first + length, end) - 1
        heads = head * GROUP * DIM + g[:, None] * DIM + d[None, :]
        q = tl.load(query + token * query_stride + heads, mask=inside, other=0.0)
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        summed = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
        page = tl.load(line + tl.minimum(first + n, last) // PAGE_SIZE)
        for begin in tl.range(first, last + 1, POSITIONS):
            here = tl.minimum(begin + n, last)
            key, value = load_block(cache + head * DIM, page, here, d, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE)
            page = tl.load(line + tl.minimum(begin + POSITIONS + n, last) // PAGE_SIZE)
            scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision=PRECISION) * SCALE
            scores = tl.where((begin + n <= last)[None, :], scores, float("-inf"))
            weights, rescale, largest, total = online_softmax(scores, largest, total)
            summed = summed * rescale[:, None]
            summed = tl.dot(weights.to(q.dtype), value.to(q.dtype), summed, input_precision=PRECISION)
        target = out + token * out_stride + head * GROUP * DIM
        row_pieces = tl.cdiv(span, length)
        if row_pieces == 1:
            tl.store(target + g[:, None] * DIM + d[None, :], summed / total[:, None], mask=inside)
        else:
            group = ((earlier + piece) * KV_HEADS + head) * GROUP
            tl.store(partial + (group + g[:, None]) * DIM + d[None, :], summed, mask=inside)
            tl.store(maxima + group + g, largest, mask=g < GROUP)
            tl.store(maxima + units + group + g, total, mask=g < GROUP)
            tl.debug_barrier()  # all of this program's stores come before the count, which publishes them
            done = tl.atomic_add(arrived + row * KV_HEADS + head, 1, sem="acq_rel")
            if done == row_pieces - 1:
                tl.store(arrived + row * KV_HEADS + head, 0)
                group = (earlier * KV_HEADS + head) * GROUP
                sum_pieces(
                    partial + group * DIM, maxima + group, units, row_pieces, target, KV_HEADS, GROUP, DIM, DIM_BLOCK,
                    PIECES, GROUP_BLOCK, SOME,
                )  # fmt: skip


@triton.jit
def piece_length(span, few, most, SHORTEST: tl.constexpr, LONGEST: tl.constexpr, POSITIONS: tl.constexpr):
    """Positions in each piece but the last, of a row that sees `span`: whole blocks, and pieces of about one length."""
    pieces = tl.maximum(tl.minimum(few, span // SHORTEST), tl.minimum(most, tl.cdiv(span, LONGEST)))
    return tl.maximum(tl.cdiv(tl.cdiv(span, tl.maximum(pieces, 1)), POSITIONS), 1) * POSITIONS


@triton.jit
def sum_pieces(
    partial, maxima, units, count, target,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, PIECES: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """The attention of one row and key head from that of its `count` pieces, SOME of them at a time. Reads past the
    first-level cache, which may hold what was there before another program wrote."""
    p, g, d = tl.arange(0, PIECES), tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    some, step = tl.arange(0, SOME), KV_HEADS * GROUP
    there = (p < count)[:, None] & (g < GROUP)[None, :]
    at = maxima + p[:, None] * step + g[None, :]
    largest = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(at + units, mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(largest, 0)
    top = tl.where(g < GROUP, top, 0.0)
    total = tl.sum(totals * tl.exp2(largest - top[None, :]), 0)
    summed = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    for begin in range(0, count, SOME):
        mine = begin + some
        real = (mine < count)[:, None] & (g < GROUP)[None, :]
        place = mine[:, None] * step + g[None, :]
        weight = tl.load(maxima + place, mask=real, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partial + place[:, :, None] * DIM + d[None, None, :],
            mask=real[:, :, None] & (d < DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        summed += tl.sum(part * tl.exp2(weight - top[None, :])[:, :, None], 0)
    inside = (g < GROUP)[:, None] & (d < DIM)[None, :]
    tl.store(target + g[:, None] * DIM + d[None, :], summed / total[:, None], mask=inside)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["blocks", "slots", "starts", "offsets"])
def extend_kernel(
    query, cache, page_table, out, blocks, slots, starts, offsets, count, query_stride, out_stride, table_stride,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, POSITIONS: tl.constexpr,
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
    q = tl.load(query + (token * query_stride + heads)[:, None] + d[None, :], mask=inside, other=0.0)
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
        key, value = load_block(keys, page, n, d, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE)
        n += POSITIONS
        page = tl.load(line + tl.minimum(n, end - 1) // PAGE_SIZE)
        scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision=PRECISION) * SCALE
        weights, rescale, largest, total = online_softmax(scores, largest, total)
        summed = summed * rescale[:, None]
        summed = tl.dot(weights.to(q.dtype), value.to(q.dtype), summed, input_precision=PRECISION)
    position = start + within
    for _ in tl.range(clear, end, POSITIONS):
        key, value = load_block(keys, page, tl.minimum(n, end - 1), d, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE)
        scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision=PRECISION) * SCALE
        seen = n[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (n[None, :] > position[:, None] - WINDOW)
        n += POSITIONS
        page = tl.load(line + tl.minimum(n, end - 1) // PAGE_SIZE)
        scores = tl.where(seen, scores, float("-inf"))
        weights, rescale, largest, total = online_softmax(scores, largest, total)
        summed = summed * rescale[:, None]
        summed = tl.dot(weights.to(q.dtype), value.to(q.dtype), summed, input_precision=PRECISION)
    target = out + (token * out_stride + heads)[:, None] + d[None, :]
    tl.store(target, summed / total[:, None], mask=inside)
