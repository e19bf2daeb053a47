"""Absorbed latent attention over a paged cache in Triton: each latent is read once for many query heads.

A line is the query of one head of one token, [latent_dim + rope_dim]; all lines of a token see the same latents, which
are keys, and values without their rotated part. A program holds a block of lines and takes the context a block of
positions at a time, so what it reads serves as many heads as it has lines (the papers' point: arXiv:2405.04434).
Position n of a slot is at page page_table[slot, n // page_size]; scores are float32, softmax is taken online
(arXiv:1805.02867).

**Decode**, rows of one token. Laid end to end, the blocks of all rows' contexts are divided into ranges of equal
length, one a team; a team is one program for each block of lines:

    blocks    | row 0                   | row 1 | row 2         |
    teams     |     0     |     1     |     2     |     3       |

A row that several teams have a part in is summed up by a second kernel, spread over the device: a part is as large as
some dozens of latents. The division is made on the device, from the positions there, so that a CUDA graph captures
both kernels once.

**Extend**, rows of several tokens: a program for each block of lines, listed on the host; longest contexts come first.

Left out: shared prefixes, a cut of the context of short extensions.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch_dependents, wait_for_previous

LEAST_POSITIONS = 128  # of a team's range: a part of a row is worth its cost from here on


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaShape:
    """What is compiled into a kernel. `scale` multiplies the scores; the dimensions are powers of two."""

    heads: int
    latent_dim: int
    rope_dim: int
    page_size: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a kernel is cut: lines and positions at a time, warps, copies in flight."""

    lines: int
    positions: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaScratch:
    """Parts of rows, between the two kernels. A team leaves two at most: 2 * team of a row that it did not begin, and
    2 * team + 1 of one that it did not end."""

    partial: Tensor  # [2 * teams, heads, latent_dim] float32
    maxima: Tensor  # [2, 2 * teams, heads] float32: largest score, sum of exponentials

    @classmethod
    def of(cls, teams: int, shape: MlaShape, device: torch.device) -> "MlaScratch":
        parts = (2 * teams, shape.heads)
        return cls(
            partial=torch.empty(*parts, shape.latent_dim, device=device), maxima=torch.empty(2, *parts, device=device)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaDecodeRows:
    """D rows of one token."""

    slots: Tensor  # [D] int64: their lines of the page table
    positions: Tensor  # [D] int64: of their token; -1 where there is no row
    tokens: Tensor  # [D] int64: where it is among the T of the step
    scratch: MlaScratch
    teams: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaExtendRows:
    """Rows of several tokens in B blocks of lines."""

    blocks: Tensor  # [2, B] int64: the row, and which of its blocks; block 0 of an empty row is nothing
    slots: Tensor  # [R] int64
    starts: Tensor  # [R] int64
    offsets: Tensor  # [R + 1] int64


def decode_cut(shape: MlaShape, dtype: torch.dtype) -> Cut:
    """The cut of the decode kernel. Few heads are one block of lines, for the tensor cores' smallest tile; many are
    blocks of 64, the smallest that Hopper's own instructions take."""
    lines = min(64, max(16, triton.next_power_of_2(shape.heads)))
    if dtype.itemsize == 4:
        return Cut(lines=lines, positions=16, warps=4, stages=1)
    return Cut(lines=lines, positions=32, warps=4 if lines == 16 else 8, stages=3 if lines <= 32 else 2)


def mla_extend_cut(shape: MlaShape, dtype: torch.dtype) -> Cut:
    """The cut of the extend kernel: as many lines as the registers hold."""
    if dtype.itemsize == 4:
        return Cut(lines=16, positions=16, warps=4, stages=1)
    return Cut(lines=64, positions=32, warps=8, stages=2)


def mla_decode_teams(shape: MlaShape, dtype: torch.dtype, device: torch.device) -> int:
    """Teams whose programs the device runs at once: two a processor if they are small."""
    if device.type == "cpu":
        return 3
    cut = decode_cut(shape, dtype)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, (2 if cut.lines == 16 else 1) * processors // triton.cdiv(shape.heads, cut.lines))


def list_mla_blocks(starts: np.ndarray, lengths: np.ndarray, heads: int, lines: int) -> np.ndarray:
    """[2, B] int64: row and number of each block of `lines` lines of rows longer than 1; longest contexts first."""
    rows = np.flatnonzero(lengths > 1)
    counts = -(-lengths[rows] * heads // lines)
    row = np.repeat(rows, counts)
    block = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort(-(starts[row] + block * lines // heads), kind="stable")
    return np.ascontiguousarray(np.stack((row, block))[:, order], np.int64)


def attend_mla_decode(
    query: Tensor, rotated: Tensor, cache: Tensor, page_table: Tensor, out: Tensor, rows: MlaDecodeRows,
    shape: MlaShape, cut: Cut | None = None,
) -> None:  # fmt: skip
    """Attends with the tokens of `rows`. `query` [T, heads, latent_dim], `rotated` [T, heads, rope_dim], the last
    dimensions dense; `cache` [pages, page_size, latent_dim + rope_dim] of their dtype or float8_e4m3fn, each page dense
    and the next any stride away; `page_table` [slots, P] int32; `out` as query, contiguous."""
    cut = cut or decode_cut(shape, query.dtype)
    count, scratch = len(rows.slots), rows.scratch
    cutting = {
        "ROWS": 16 if count <= 16 else max(256, triton.next_power_of_2(count)),
        "POSITIONS": cut.positions,
        "LEAST": max(LEAST_POSITIONS // cut.positions, 1),
    }
    decode_kernel[(rows.teams * triton.cdiv(shape.heads, cut.lines),)](
        query, rotated, cache, page_table, out, rows.slots, rows.positions, rows.tokens,
        scratch.partial, scratch.maxima, count, rows.teams, 2 * rows.teams * shape.heads, *strides(query, rotated),
        page_table.stride(0), **constants(shape, query, cache), **cutting, LINES=cut.lines,
        num_warps=cut.warps, num_stages=cut.stages, **launch_dependents(query),
    )  # fmt: skip
    # Few rows have many parts, which one program would read for long; many rows have few.
    dim, some = (shape.latent_dim, 4) if count > 32 else (min(64, shape.latent_dim), 64)
    sum_kernel[(count, shape.heads, shape.latent_dim // dim)](
        out, rows.positions, rows.tokens, scratch.partial, scratch.maxima, count, rows.teams,
        2 * rows.teams * shape.heads, HEADS=shape.heads, LATENT=shape.latent_dim, **cutting, DIM=dim, SOME=some,
        num_warps=4, **launch_dependents(query),
    )  # fmt: skip


def attend_mla_extend(
    query: Tensor, rotated: Tensor, cache: Tensor, page_table: Tensor, out: Tensor, rows: MlaExtendRows,
    shape: MlaShape, cut: Cut | None = None,
) -> None:  # fmt: skip
    """As `attend_decode`, for rows of several tokens."""
    cut = cut or mla_extend_cut(shape, query.dtype)
    extend_kernel[(rows.blocks.shape[1],)](
        query, rotated, cache, page_table, out, rows.blocks, rows.slots, rows.starts, rows.offsets,
        rows.blocks.shape[1], *strides(query, rotated), page_table.stride(0), **constants(shape, query, cache),
        LINES=cut.lines, POSITIONS=cut.positions, num_warps=cut.warps, num_stages=cut.stages,
        **launch_dependents(query),
    )  # fmt: skip


def strides(query: Tensor, rotated: Tensor) -> tuple[int, int, int, int]:
    assert query.stride(2) == 1 and rotated.stride(2) == 1, f"strides {query.stride()}, {rotated.stride()}"
    return query.stride(0), query.stride(1), rotated.stride(0), rotated.stride(1)


def constants(shape: MlaShape, query: Tensor, cache: Tensor) -> dict[str, object]:
    return {
        "SCALE": shape.scale * 1.4426950408889634,  # exponentials are of base 2
        "HEADS": shape.heads,
        "LATENT": shape.latent_dim,
        "ROPE": shape.rope_dim,
        "PAGE_SIZE": shape.page_size,
        "PAGE_STRIDE": cache.stride(0),
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
    }


@triton.jit
def add_latents(q, r, cache, page, n, seen, largest, total, summed, LATENT: tl.constexpr, ROPE: tl.constexpr,
                PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, SCALE: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """One block of positions more: new maximum, sum of exponentials, and sum of latents, of each line. `n` [positions]
    are in pages `page`; `seen` says which of them each line sees."""
    place = cache + (page.to(tl.int64) * PAGE_STRIDE + n % PAGE_SIZE * (LATENT + ROPE))[:, None]
    latent = tl.load(place + tl.arange(0, LATENT)[None, :]).to(q.dtype)
    turned = tl.load(place + LATENT + tl.arange(0, ROPE)[None, :]).to(q.dtype)
    scores = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
    scores = tl.dot(r, tl.trans(turned), scores, input_precision=PRECISION) * SCALE
    scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    anchor = tl.where(new == float("-inf"), 0.0, new)  # a line that has seen nothing yet
    exponentials = tl.exp2(scores - anchor[:, None])
    rescale = tl.exp2(largest - anchor)
    total = total * rescale + tl.sum(exponentials, 1)
    summed = tl.dot(exponentials.to(q.dtype), latent, summed * rescale[:, None], input_precision=PRECISION)
    return new, total, summed


@triton.jit
def divide(positions, count, teams, ROWS: tl.constexpr, POSITIONS: tl.constexpr, LEAST: tl.constexpr):
    """(blocks of positions of each row, blocks up to its end, blocks of a team's range)."""
    row_ids = tl.arange(0, ROWS)
    ends = tl.load(positions + row_ids, mask=row_ids < count, other=-1).to(tl.int32) + 1
    blocks = tl.cdiv(ends, POSITIONS)
    return blocks, tl.cumsum(blocks), tl.maximum(tl.cdiv(tl.sum(blocks), teams), LEAST)


@triton.jit(do_not_specialize=["count", "teams", "units"],
            do_not_specialize_on_alignment=["slots", "positions", "tokens"])  # fmt: skip
def decode_kernel(
    query, rotated, cache, page_table, out, slots, positions, tokens, partial, maxima, count, teams, units,
    query_row, query_head, rotated_row, rotated_head, table_stride,
    SCALE: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, LEAST: tl.constexpr, LINES: tl.constexpr,
    DEPENDS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (HEADS + LINES - 1) // LINES
    wait_for_previous(DEPENDS)
    team, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    blocks, until, length = divide(positions, count, teams, ROWS, POSITIONS, LEAST)
    head, n = part * LINES + tl.arange(0, LINES), tl.arange(0, POSITIONS)
    d, e = tl.arange(0, LATENT)[None, :], tl.arange(0, ROPE)[None, :]
    mine = head < HEADS
    at = team * length
    finish = tl.minimum(at + length, tl.sum(blocks))
    while at < finish:
        row = tl.sum((until <= at).to(tl.int32))
        begin = tl.sum(tl.where(until <= at, blocks, 0))  # blocks of the rows before
        end = tl.load(positions + row).to(tl.int32) + 1
        row_finish = begin + tl.cdiv(end, POSITIONS)
        stop = tl.minimum(finish, row_finish)
        token = tl.load(tokens + row)
        line = page_table + tl.load(slots + row) * table_stride
        lines = query + token * query_row + head[:, None] * query_head
        q = tl.load(lines + d, mask=mine[:, None], other=0.0)
        lines = rotated + token * rotated_row + head[:, None] * rotated_head
        r = tl.load(lines + e, mask=mine[:, None], other=0.0)
        largest = tl.full([LINES], float("-inf"), tl.float32)
        total = tl.zeros([LINES], tl.float32)
        summed = tl.zeros([LINES, LATENT], tl.float32)
        first, last = (at - begin) * POSITIONS, tl.minimum((stop - begin) * POSITIONS, end) - 1
        page = tl.load(line + tl.minimum(first + n, last) // PAGE_SIZE)
        for block in tl.range(first, last + 1, POSITIONS):
            here = tl.minimum(block + n, last)
            following = tl.load(line + tl.minimum(block + POSITIONS + n, last) // PAGE_SIZE)
            largest, total, summed = add_latents(
                q, r, cache, page, here, (block + n <= last)[None, :], largest, total, summed,
                LATENT, ROPE, PAGE_SIZE, PAGE_STRIDE, SCALE, PRECISION,
            )  # fmt: skip
            page = following
        if stop - at == row_finish - begin:
            tl.store(out + (token * HEADS + head)[:, None] * LATENT + d, summed / total[:, None], mask=mine[:, None])
        else:
            unit = (2 * team + (at == begin).to(tl.int32)) * HEADS + head
            tl.store(partial + unit.to(tl.int64)[:, None] * LATENT + d, summed, mask=mine[:, None])
            tl.store(maxima + unit, largest, mask=mine)
            tl.store(maxima + units + unit, total, mask=mine)
        at = stop


@triton.jit(do_not_specialize=["count", "teams", "units"],
            do_not_specialize_on_alignment=["positions", "tokens"])  # fmt: skip
def sum_kernel(
    out, positions, tokens, partial, maxima, count, teams, units,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, LEAST: tl.constexpr,
    DIM: tl.constexpr, SOME: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """Sums up the parts of one row and head, DIM dimensions of them, SOME parts at a time."""
    wait_for_previous(DEPENDS)
    row, head, d = tl.program_id(0), tl.program_id(1), tl.program_id(2) * DIM + tl.arange(0, DIM)
    blocks, _, length = divide(positions, count, teams, ROWS, POSITIONS, LEAST)
    row_ids = tl.arange(0, ROWS)
    begin = tl.sum(tl.where(row_ids < row, blocks, 0))
    finish = begin + tl.sum(tl.where(row_ids == row, blocks, 0))
    first, last = begin // length, (finish - 1) // length  # teams
    if last > first and finish > begin:
        largest, total, summed = float("-inf"), 0.0, tl.zeros([DIM], tl.float32)
        for some in range(first, last + 1, SOME):
            team = some + tl.arange(0, SOME)
            there = team <= last
            unit = (2 * team + (team == first).to(tl.int32)) * HEADS + head
            most = tl.load(maxima + unit, mask=there, other=float("-inf"))
            sums = tl.load(maxima + units + unit, mask=there, other=0.0)
            parts = tl.load(partial + unit.to(tl.int64)[:, None] * LATENT + d[None, :], mask=there[:, None], other=0.0)
            new = tl.maximum(largest, tl.max(most, 0))
            weight, rescale = tl.exp2(most - new), tl.exp2(largest - new)
            total = total * rescale + tl.sum(sums * weight, 0)
            summed = summed * rescale + tl.sum(parts * weight[:, None], 0)
            largest = new
        token = tl.load(tokens + row)
        tl.store(out + (token * HEADS + head) * LATENT + d, summed / total)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["blocks", "slots", "starts", "offsets"])
def extend_kernel(
    query, rotated, cache, page_table, out, blocks, slots, starts, offsets, count,
    query_row, query_head, rotated_row, rotated_head, table_stride,
    SCALE: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, LINES: tl.constexpr, POSITIONS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """Line i of the row's matrix is token i // HEADS of the row, head i % HEADS."""
    wait_for_previous(DEPENDS)
    task = tl.program_id(0)
    row, block = tl.load(blocks + task), tl.load(blocks + count + task).to(tl.int32)
    start, offset = tl.load(starts + row).to(tl.int32), tl.load(offsets + row)
    length = (tl.load(offsets + row + 1) - offset).to(tl.int32)
    line = page_table + tl.load(slots + row) * table_stride
    i, n = block * LINES + tl.arange(0, LINES), tl.arange(0, POSITIONS)
    d, e = tl.arange(0, LATENT)[None, :], tl.arange(0, ROPE)[None, :]
    within, head = i // HEADS, i % HEADS
    mine = within < length
    token = offset + within
    q = tl.load(query + (token * query_row + head * query_head)[:, None] + d, mask=mine[:, None], other=0.0)
    r = tl.load(rotated + (token * rotated_row + head * rotated_head)[:, None] + e, mask=mine[:, None], other=0.0)
    position = start + within
    end = start + tl.minimum((block * LINES + LINES - 1) // HEADS + 1, length)
    largest = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    summed = tl.zeros([LINES, LATENT], tl.float32)
    if length > 0:
        page = tl.load(line + tl.minimum(n, end - 1) // PAGE_SIZE)
        for first in tl.range(0, end, POSITIONS):
            following = tl.load(line + tl.minimum(first + POSITIONS + n, end - 1) // PAGE_SIZE)
            here = first + n
            largest, total, summed = add_latents(
                q, r, cache, page, tl.minimum(here, end - 1), here[None, :] <= position[:, None],
                largest, total, summed, LATENT, ROPE, PAGE_SIZE, PAGE_STRIDE, SCALE, PRECISION,
            )  # fmt: skip
            page = following
    tl.store(out + (token * HEADS + head)[:, None] * LATENT + d, summed / total[:, None], mask=mine[:, None])
