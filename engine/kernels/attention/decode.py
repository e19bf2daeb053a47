"""Attention of rows of one token over a paged KV cache, in Triton, its work divided evenly whatever the lengths are.

Contexts are cut into blocks of positions. Laid end to end, the blocks of all rows are divided into as many ranges of
equal length as there are teams; a team is one program for each key head, so the programs of a team read the same pages:

    blocks    | row 0                   | row 1 | row 2         |
    teams     |     0     |     1     |     2     |     3       |
                                ^ pieces of a row that several teams have a part in

A block is as many positions as a program looks at together. Where all contexts are SHORT, a block is as long as that:
cut in two they would cost more than they compute.

Who finishes the last piece of a row sums up all of them; there is no second kernel. The division is made on the device,
from the positions there, so that a CUDA graph captures the kernel once. A row's bits depend on what it is divided with:
sums are taken in another order beside other rows.

**Shared prefixes**: where many rows begin with the same pages, `prefix_kernel` reads these once for all of them, as
one matrix of queries, and leaves pieces to be summed with those of the rows' own contexts (cascade inference, as in
FlashInfer, arXiv:2501.01005). Which rows share what is listed on the host.

Left out: soft caps, sinks, prefixes within prefixes, windows over shared prefixes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.attention.paged import (
    Blocks,
    PagedShape,
    add_block,
    constants,
    load_block,
    scaled_query,
    score_block,
)
from engine.kernels.attention.pieces import Scratch, begin_piece, end_piece, nothing_seen
from engine.kernels.launch import launch_dependents, wait_for_previous
from engine.kernels.types import Prefix

PREFIX_PIECES = 4  # at most, of a shared prefix
PREFIX_ROUND = 128  # positions; what is shared is a multiple of it, hence of any cut's block
SHORT: tl.constexpr = tl.constexpr(256)  # positions
FEW_ROWS = 64  # up to which few large blocks are better than many small ones


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRows:
    """Which of D rows share a prefix, in tiles of rows whose queries are one matrix. Numbers that a graph reads."""

    counts: Tensor  # [2] int64: tiles, and pieces that each prefix is cut into
    tiles: Tensor  # [3, D] int64: first member, past the last, positions shared (a multiple of PREFIX_ROUND)
    members: Tensor  # [D] int64: rows, those of a tile next to each other
    firsts: Tensor  # [D] int64: by row, positions that the prefix kernel attends to; 0 where nothing is shared
    partial: Tensor  # [PREFIX_PIECES, D, kv_heads, group, head_dim] float32, or more
    maxima: Tensor  # [2, PREFIX_PIECES, D, kv_heads, group] float32, or more

    @classmethod
    def of(cls, numbers: Tensor, rows: int, shape: PagedShape, other: "SharedRows | None" = None) -> "SharedRows":
        """Over `numbers` [size(rows)] int64, as a Mirror holds them. What pieces give may lie where it lies for as many
        rows or more, of an `other` step."""
        counts, tiles, members, firsts = numbers.split([2, 3 * rows, rows, rows])
        if other is not None and len(other.firsts) >= rows:
            return dataclasses.replace(other, counts=counts, tiles=tiles.view(3, rows), members=members, firsts=firsts)
        pieces = (PREFIX_PIECES, rows, shape.kv_heads, shape.group)
        return cls(
            counts=counts,
            tiles=tiles.view(3, rows),
            members=members,
            firsts=firsts,
            partial=torch.empty(*pieces, shape.head_dim, device=numbers.device),
            maxima=torch.empty(2, *pieces, device=numbers.device),
        )

    @staticmethod
    def size(rows: int) -> int:
        return 5 * rows + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """D rows of one token."""

    slots: Tensor  # [D] int64: their lines of the page table
    positions: Tensor  # [D] int64: of their token; -1 where there is no row
    tokens: Tensor  # [D] int64: where it is among the T of the step
    scratch: Scratch
    teams: int
    shared: SharedRows | None = None


def decode_blocks(shape: PagedShape, dtype: torch.dtype, rows: int) -> Blocks:
    """The cut of the decode kernel: the best of those that bench/kernels/attention.py tries."""
    width = triton.next_power_of_2(shape.head_dim) * max(dtype.itemsize, 2)
    queries = max(16, triton.next_power_of_2(shape.group))
    if rows <= FEW_ROWS:
        positions = max(16, min(128, 32768 // width))
        return Blocks(queries=queries, positions=positions, warps=4, stages=2)
    return Blocks(queries=queries, positions=max(16, min(64, 16384 // width)), warps=4, stages=3)


def programs_each(rows: int) -> int:
    """Programs of the decode kernel that a processor runs at once."""
    return 2 if rows <= FEW_ROWS else 3


def decode_teams(shape: PagedShape, device: torch.device, rows: int) -> int:
    """Teams whose programs the device runs at once."""
    if device.type == "cpu":
        return 3
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, programs_each(rows) * processors // shape.kv_heads)


def plan_decode(
    slots: Tensor, positions: Tensor, tokens: Tensor, shape: PagedShape, teams: int, scratch: Scratch | None = None,
    shared: SharedRows | None = None,
) -> DecodeRows:  # fmt: skip
    """The plan for rows whose numbers are in these tensors ([D] int64) when the kernel runs. `scratch` is used if it is
    large enough; plans may share it, as their kernels run one after the other."""
    rows = len(slots)
    if scratch is None or len(scratch.partial) < 2 * teams or len(scratch.arrived) < rows:
        each = (shape.kv_heads, shape.group, shape.head_dim)
        scratch = Scratch.of(2 * teams, rows, each, slots.device)  # a team ends one row, and begins one, in the midst
    return DecodeRows(slots=slots, positions=positions, tokens=tokens, scratch=scratch, teams=teams, shared=shared)


def list_shared(
    prefixes: Sequence[Prefix], rows: int, shape: PagedShape, teams: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The numbers of SharedRows, each as long as there are tiles or members, `tiles` and `firsts` whole.

    What a tile shares is rounded down to whole blocks of positions; a prefix of more rows than a tile takes has
    several."""
    together = prefix_queries(shape) // shape.group
    tiles, firsts = np.zeros((3, rows), np.int64), np.zeros(rows, np.int64)
    members: list[np.ndarray] = []
    count = at = 0
    for prefix in prefixes:
        shared = prefix.positions // PREFIX_ROUND * PREFIX_ROUND
        firsts[prefix.rows] = shared
        for begin in range(0, len(prefix.rows), together):
            part = prefix.rows[begin : begin + together]
            members.append(part)
            tiles[:, count] = at, at + len(part), shared
            count, at = count + 1, at + len(part)
    cut = min(max(teams // programs_each(rows) // max(count, 1), 1), PREFIX_PIECES)  # one program a processor
    listed = np.concatenate(members) if members else np.zeros(0, np.int64)
    return np.array([count, cut]), tiles.ravel(), listed, firsts


def attend_decode(
    query: Tensor, cache: Tensor, page_table: Tensor, out: Tensor, rows: DecodeRows, shape: PagedShape,
    blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """Attends with the tokens of `rows`. `query`, `out` [T, query_heads, head_dim], the last dimension dense, `out`
    in query's dtype; `cache` [pages, 2, page_size, kv_heads, head_dim] of that dtype or float8_e4m3fn, each page dense
    and the next any stride away; `page_table` [slots, P] int32."""
    blocks = blocks or decode_blocks(shape, query.dtype, len(rows.slots))
    count, group, scratch, shared = len(rows.slots), triton.next_power_of_2(shape.group), rows.scratch, rows.shared
    fixed = constants(shape, query, cache)
    common = (query, cache, page_table)
    strides = (query.stride(0), page_table.stride(0))
    if shared is not None:
        tile = prefix_blocks(shape, query.dtype)
        prefix_kernel[(rows.teams * shape.kv_heads,)](
            *common, rows.slots, rows.tokens, shared.counts, shared.tiles, shared.members,
            shared.partial, shared.maxima, count, *strides,
            **fixed, QUERIES=tile.queries, POSITIONS=tile.positions, PIECES=PREFIX_PIECES,
            num_warps=tile.warps, num_stages=tile.stages, **launch_dependents(query),
        )  # fmt: skip
    decode_kernel[(rows.teams * shape.kv_heads,)](
        *common, out, rows.slots, rows.positions, rows.tokens, scratch.partial, scratch.maxima, scratch.arrived,
        *((shared.firsts, shared.counts, shared.partial, shared.maxima) if shared is not None else (query,) * 4),
        count, rows.teams, out.stride(0), *strides,
        **fixed,
        ROWS=16 if count <= 16 else max(256, triton.next_power_of_2(count)),
        QUERIES=blocks.queries, POSITIONS=blocks.positions, SHARED=shared is not None,
        PREFIX_PIECES=PREFIX_PIECES,
        GROUP_BLOCK=group, SOME=max(1, 4096 // (group * triton.next_power_of_2(shape.head_dim))),
        num_warps=blocks.warps, num_stages=blocks.stages,
        **most_registers(query, count, blocks), **launch_dependents(query),
    )  # fmt: skip


def most_registers(query: Tensor, rows: int, blocks: Blocks) -> dict[str, int]:
    """Registers of a thread with which all programs fit on a processor, which has 65,536; a thread has at most 255."""
    most = 65536 // (programs_each(rows) * 32 * blocks.warps) // 8 * 8
    return {"maxnreg": most} if query.is_cuda and most < 255 else {}


def prefix_queries(shape: PagedShape) -> int:
    """Query heads of a key head, times rows, in a tile of the prefix kernel."""
    return max(64 if shape.head_dim > 128 else 128, triton.next_power_of_2(shape.group))


def prefix_blocks(shape: PagedShape, dtype: torch.dtype) -> Blocks:
    """The cut of the prefix kernel."""
    if dtype.itemsize == 4:
        return Blocks(queries=prefix_queries(shape), positions=32, warps=4, stages=1)
    return Blocks(queries=prefix_queries(shape), positions=64 if shape.head_dim <= 128 else 32, warps=8, stages=2)


@triton.jit(
    do_not_specialize=["count", "teams"],
    do_not_specialize_on_alignment=["slots", "positions", "tokens", "arrived", "firsts", "counts"],
)
def decode_kernel(
    query, cache, page_table, out, slots, positions, tokens, partial, maxima, arrived,
    firsts, counts, prefix_partial, prefix_maxima,
    count, teams, out_stride, query_stride, table_stride,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, POSITIONS: tl.constexpr, SHARED: tl.constexpr,
    PREFIX_PIECES: tl.constexpr, GROUP_BLOCK: tl.constexpr, SOME: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """The pieces of one team for one key head, one after the other."""
    team, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    step, blocks = divide(positions, firsts, count, WINDOW, SHARED, ROWS, POSITIONS)
    until = tl.cumsum(blocks)
    total_blocks = tl.sum(blocks)
    range_length = tl.maximum(tl.cdiv(total_blocks, teams), 1)
    g, d, n = tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK), tl.arange(0, POSITIONS)
    inside = (g < GROUP)[:, None] & (d < DIM)[None, :]
    at = team * range_length
    finish = tl.minimum(at + range_length, total_blocks)
    wait_for_previous(DEPENDS)
    while at < finish:
        row = tl.sum((until <= at).to(tl.int32))
        earlier = tl.sum(tl.where(until <= at, blocks, 0))  # blocks of the rows before
        end, token, line, own = load_row(
            row, positions, tokens, slots, firsts, page_table, table_stride, WINDOW, SHARED
        )
        row_end = earlier + tl.cdiv(end - own, step)
        stop = tl.minimum(finish, row_end)
        first = own + (at - earlier) * step
        last = tl.minimum(own + (stop - earlier) * step, end) - 1
        heads = head * GROUP * DIM + g[:, None] * DIM + d[None, :]
        q, size = scaled_query(tl.load(query + token * query_stride + heads, mask=inside, other=0.0), FP8)
        largest, total, summed = begin_piece(
            prefix_partial, prefix_maxima, counts, count, row, head, own, at, earlier, g, d,
            SHARED, KV_HEADS, GROUP, DIM, PREFIX_PIECES,
        )  # fmt: skip
        largest, total, summed = attend_piece(
            q, size, cache, line, first, last, head, d, n, largest, total, summed,
            SCALE, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE, PAGE_STRIDE, PRECISION, FP8, POSITIONS,
        )  # fmt: skip
        target = out + token * out_stride + head * GROUP * DIM
        end_piece(
            partial, maxima, arrived, target, largest, total, summed, g, d, team, teams, row, head, at, stop, earlier,
            row_end, range_length, KV_HEADS, GROUP, DIM, GROUP_BLOCK, DIM_BLOCK, SOME,
        )  # fmt: skip
        at = stop


@triton.jit
def divide(
    positions, firsts, count,
    WINDOW: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """How many positions a block is, and how many blocks each row has, [ROWS]."""
    row_ids = tl.arange(0, ROWS)
    spans = tl.load(positions + row_ids, mask=row_ids < count, other=-1).to(tl.int32) + 1
    if WINDOW > 0:
        spans = tl.minimum(spans, WINDOW)
    if SHARED:
        spans -= tl.load(firsts + row_ids, mask=row_ids < count, other=0).to(tl.int32)
    step = tl.where(tl.max(spans) <= SHORT, max(SHORT, POSITIONS), POSITIONS)
    return step, tl.cdiv(spans, step)


@triton.jit
def load_row(
    row, positions, tokens, slots, firsts, page_table, table_stride, WINDOW: tl.constexpr, SHARED: tl.constexpr
):
    """The end of a row's context, its token, its line of the page table, and the first position that is its own to
    read: neither passed by the window, nor read by the prefix kernel."""
    end = tl.load(positions + row).to(tl.int32) + 1
    token = tl.load(tokens + row)
    line = page_table + tl.load(slots + row) * table_stride
    own = 0
    if WINDOW > 0:
        own = tl.maximum(end - WINDOW, 0)
    if SHARED:
        own = tl.load(firsts + row).to(tl.int32)
    return end, token, line, own


@triton.jit
def attend_piece(
    q, size, cache, line, first, last, head, d, n, largest, total, summed,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """Adds positions `first` .. `last` of a row. The pages of a block are looked up while the one before computes."""
    page = tl.load(line + tl.minimum(first + n, last) // PAGE_SIZE)
    for begin in tl.range(first, last + 1, POSITIONS):
        here = tl.minimum(begin + n, last)
        key, value = load_block(cache + head * DIM, page, here, d, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE, PAGE_STRIDE)
        page = tl.load(line + tl.minimum(begin + POSITIONS + n, last) // PAGE_SIZE)
        scores = score_block(q, size, key, SCALE, PRECISION, FP8)
        scores = tl.where((begin + n <= last)[None, :], scores, float("-inf"))
        largest, total, summed = add_block(q, scores, value, largest, total, summed, PRECISION)
    return largest, total, summed


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["slots", "tokens", "counts", "tiles", "members"],
)
def prefix_kernel(
    query, cache, page_table, slots, tokens, counts, tiles, members, partial, maxima, count, query_stride, table_stride,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    FP8: tl.constexpr,
    QUERIES: tl.constexpr, POSITIONS: tl.constexpr, PIECES: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """Line i of the queries' matrix is member i // GROUP of the tile, query head i % GROUP of the group."""
    tile_count, cut = tl.load(counts).to(tl.int32), tl.load(counts + 1).to(tl.int32)
    i, d, n = tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK), tl.arange(0, POSITIONS)
    wait_for_previous(DEPENDS)
    for task in tl.range(tl.program_id(0), tile_count * cut * KV_HEADS, tl.num_programs(0), num_stages=1):
        head, piece, tile = task % KV_HEADS, task // KV_HEADS % cut, task // KV_HEADS // cut
        member = tl.load(tiles + tile).to(tl.int32) + i // GROUP
        is_row = member < tl.load(tiles + count + tile).to(tl.int32)
        blocks = tl.load(tiles + 2 * count + tile).to(tl.int32) // POSITIONS
        # Of fewer blocks than pieces the last ones are empty: never the first, with which a row's sums begin.
        first, past = tl.cdiv(piece * blocks, cut) * POSITIONS, tl.cdiv((piece + 1) * blocks, cut) * POSITIONS
        row = tl.load(members + member, mask=is_row, other=0)
        any_row = tl.load(members + tl.load(tiles + tile))
        line = page_table + tl.load(slots + any_row) * table_stride
        token = tl.load(tokens + row, mask=is_row, other=0)
        lines = token * query_stride + (head * GROUP + i % GROUP) * DIM
        inside = is_row[:, None] & (d < DIM)[None, :]
        q, size = scaled_query(tl.load(query + lines[:, None] + d[None, :], mask=inside, other=0.0), FP8)
        largest, total, summed = nothing_seen(i, d)
        page = tl.load(line + tl.maximum(tl.minimum(first + n, past - 1), 0) // PAGE_SIZE)
        for begin in tl.range(first, past, POSITIONS):
            key, value = load_block(
                cache + head * DIM, page, begin + n, d, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE, PAGE_STRIDE
            )
            page = tl.load(line + tl.minimum(begin + POSITIONS + n, past - 1) // PAGE_SIZE)
            scores = score_block(q, size, key, SCALE, PRECISION, FP8)
            largest, total, summed = add_block(q, scores, value, largest, total, summed, PRECISION)
        unit = ((piece * count + row) * KV_HEADS + head) * GROUP + i % GROUP
        tl.store(partial + unit[:, None] * DIM + d[None, :], summed, mask=inside)
        tl.store(maxima + unit, largest, mask=is_row)
        tl.store(maxima + PIECES * count * KV_HEADS * GROUP + unit, total, mask=is_row)
