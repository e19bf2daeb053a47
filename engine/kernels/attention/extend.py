"""Attention of rows of several tokens over a paged KV cache, in Triton.

A program has a key head and a task. A task is a block of a row's tokens with all that they see, or with a piece of it:

    a row              | 8,192 cached                       | 144 new   |
    blocks of tokens                                        |0|1|2|3|4|
    tasks of block 4   | piece 0   | piece 1   | piece 2          |

A block has some dozens of tokens, so the few new tokens behind a long context make few blocks, whose programs would
read all of it while most of the device has nothing to do. Such contexts are cut into pieces (as in Flash-Decoding,
Dao et al. 2023), of about one length in a step. Who finishes the last piece of a block sums up all of them; there is no
second kernel. A block's bits depend on the step, since the length does.

How many pieces there are is what the host says, and the last of them ends where the block does: rows of drafts may
begin later than the host knows, and a count made anew on the device would wait for a piece that nobody computes.

The host lists the tasks, those with most to read first. A CUDA graph reads the list, so one graph serves steps of any
rows. Left out: rows of one token, which are decode.py's.
"""

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
    sees,
)
from engine.kernels.attention.pieces import Scratch, add_piece, nothing_seen, publish
from engine.kernels.launch import launch_dependents, wait_for_previous

LEAST_PIECE = 512  # positions: shorter ones cost more to sum up than they save


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendRows:
    """Rows of several tokens, as N tasks."""

    tasks: Tensor  # [6, N] int32 or int64, as list_extend_tasks gives them; zeros for an empty row are nothing to do
    slots: Tensor  # [R] int64
    starts: Tensor  # [R] int64
    offsets: Tensor  # [R + 1] int64
    scratch: Scratch


def extend_blocks(shape: PagedShape, dtype: torch.dtype) -> Blocks:
    """The cut of the extend kernel."""
    group = triton.next_power_of_2(shape.group)
    if dtype.itemsize == 4:  # exact products in float32 have no matrix units
        return Blocks(queries=max(16, group), positions=32, warps=4, stages=1)
    if shape.head_dim > 128:
        return Blocks(queries=max(128, group), positions=32, warps=8, stages=2)
    return Blocks(queries=max(128, group), positions=64, warps=8, stages=3)


def extend_teams(shape: PagedShape, device: torch.device) -> int:
    """Tasks whose programs the device runs at once: a processor has room for one program."""
    if device.type == "cpu":
        return 8
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // shape.kv_heads)


def extend_scratch(shape: PagedShape, dtype: torch.dtype, teams: int, device: torch.device) -> Scratch:
    """For the pieces of any step that list_extend_tasks cuts for `teams`."""
    lines = extend_blocks(shape, dtype).queries
    return Scratch.of(2 * teams, 2 * teams, (shape.kv_heads, lines, shape.head_dim), device)


def most_extend_tasks(tokens: int, rows: int, block_tokens: int, teams: int) -> int:
    """Those of a step of `tokens` in `rows` at most."""
    return -(-tokens // block_tokens) + rows + teams


def list_extend_tasks(
    starts: np.ndarray, lengths: np.ndarray, shape: PagedShape, blocks: Blocks, teams: int
) -> np.ndarray:
    """Tasks of the rows longer than 1, [6, N] int32: the row; which of its blocks; which piece of what the block sees,
    and of how many; positions of a piece; where it is left, if it is not the only one. Pieces of a block are left next
    to each other, in the first 2 * teams places."""
    rows, tokens = np.flatnonzero(lengths > 1), blocks.queries // shape.group
    counts = -(-lengths[rows] // tokens)
    row = np.repeat(rows, counts)
    block = _numbered(counts)
    first = starts[row] + block * tokens
    ends = np.minimum(first + tokens, starts[row] + lengths[row])
    seen_from = 0 if shape.window is None else np.maximum(first + 1 - shape.window, 0)
    spans = ends - seen_from // blocks.positions * blocks.positions
    each = -(-spans // count_pieces(spans, teams))
    each = -(-each // blocks.positions) * blocks.positions
    pieces = -(-spans // each)
    order = np.argsort(-each, kind="stable")
    listed = np.repeat(order, pieces[order])
    cut, number = pieces[listed] > 1, _numbered(pieces[order])
    places = np.where(cut, np.cumsum(cut) - 1, 0)
    return np.stack((row[listed], block[listed], number, pieces[listed], each[listed], places)).astype(np.int32)


def _numbered(counts: np.ndarray) -> np.ndarray:
    """0 .. n - 1 for each n of `counts`, end to end."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def count_pieces(spans: np.ndarray, teams: int) -> np.ndarray:
    """Into how many pieces contexts of `spans` positions are cut. Those of fewer contexts than teams are as many and as
    even as the teams can take at once. Of more contexts, one that is much longer than a team's share is cut to that."""
    most = np.maximum(spans // LEAST_PIECE, 1)
    if len(spans) >= teams:
        share = -(-int(spans.sum()) // teams)
        return np.clip((2 * spans + share) // (2 * share), 1, most)
    longest = -(-spans.max(initial=1) // np.arange(1, teams - len(spans) + 2))
    tried = np.minimum(-(-spans // longest[:, None]), most)
    found: np.ndarray = tried[np.flatnonzero(tried.sum(1) <= teams)[-1]]
    return found


def attend_extend(
    query: Tensor, cache: Tensor, page_table: Tensor, out: Tensor, rows: ExtendRows, shape: PagedShape,
    blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """Attends with the tokens of `rows`. `query`, `out` [T, query_heads, head_dim], the last dimension dense, `out`
    in query's dtype; `cache` [pages, 2, page_size, kv_heads, head_dim] of that dtype or float8_e4m3fn, each page dense
    and the next any stride away; `page_table` [slots, P] int32."""
    blocks, scratch = blocks or extend_blocks(shape, query.dtype), rows.scratch
    extend_kernel[(shape.kv_heads, rows.tasks.shape[1])](
        query, cache, page_table, out,
        rows.tasks, rows.slots, rows.starts, rows.offsets, scratch.partial, scratch.maxima, scratch.arrived,
        rows.tasks.shape[1], len(scratch.partial), query.stride(0), out.stride(0), page_table.stride(0),
        **constants(shape, query, cache),
        QUERIES=blocks.queries, POSITIONS=blocks.positions,
        num_warps=blocks.warps, num_stages=blocks.stages, **launch_dependents(query),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["count", "most_pieces"],
    do_not_specialize_on_alignment=["tasks", "slots", "starts", "offsets", "arrived"],
)
def extend_kernel(
    query, cache, page_table, out, tasks, slots, starts, offsets, partial, maxima, arrived,
    count, most_pieces, query_stride, out_stride, table_stride,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    FP8: tl.constexpr,
    QUERIES: tl.constexpr, POSITIONS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """Line i of the queries' matrix is token i // GROUP of the block, query head i % GROUP of the group."""
    TOKENS: tl.constexpr = QUERIES // GROUP
    head, task = tl.program_id(0), tasks + tl.program_id(1)
    row, block = tl.load(task).to(tl.int32), tl.load(task + count).to(tl.int32)
    piece, pieces = tl.load(task + 2 * count).to(tl.int32), tl.load(task + 3 * count).to(tl.int32)
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
    each = tl.load(task + 4 * count).to(tl.int32)
    begin = seen_from + piece * each
    past = tl.where(piece == pieces - 1, end, tl.minimum(begin + each, end))
    clear = begin  # up to here all queries see all
    if WINDOW == 0:
        clear = tl.maximum(tl.minimum(first // POSITIONS * POSITIONS, past), begin)
    largest, total, summed = attend_task(
        q, size, cache + head * DIM, line, start + within, begin, clear, past, end, i, d,
        SCALE, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE, PAGE_STRIDE, WINDOW, PRECISION, FP8, POSITIONS,
    )  # fmt: skip
    target = out + (token * out_stride + heads)[:, None] + d[None, :]
    end_task(
        partial, maxima, arrived, target, inside, largest, total, summed, i, d, task + 5 * count, piece, pieces, head,
        tl.minimum(TOKENS, length - block * TOKENS) * GROUP, most_pieces, KV_HEADS, DIM, QUERIES,
    )  # fmt: skip


@triton.jit
def attend_task(
    q, size, keys, line, position, begin, clear, past, end, i, d,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    FP8: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """What queries at `position` see from `begin` to `past`, all of them all before `clear`; `end` ends the block. The
    pages of a block of positions are looked up while the one before computes."""
    largest, total, summed = nothing_seen(i, d)
    n = begin + tl.arange(0, POSITIONS)
    page = tl.load(line + tl.minimum(n, end - 1) // PAGE_SIZE)
    for _ in tl.range(begin, clear, POSITIONS):
        key, value = load_block(keys, page, n, d, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE, PAGE_STRIDE)
        n += POSITIONS
        page = tl.load(line + tl.minimum(n, end - 1) // PAGE_SIZE)
        scores = score_block(q, size, key, SCALE, PRECISION, FP8)
        largest, total, summed = add_block(q, scores, value, largest, total, summed, PRECISION)
    for _ in tl.range(clear, past, POSITIONS):
        key, value = load_block(keys, page, tl.minimum(n, end - 1), d, KV_HEADS, DIM, DIM_BLOCK, PAGE_SIZE, PAGE_STRIDE)
        scores = score_block(q, size, key, SCALE, PRECISION, FP8)
        seen = sees(position, n, WINDOW)
        n += POSITIONS
        page = tl.load(line + tl.minimum(n, end - 1) // PAGE_SIZE)
        scores = tl.where(seen, scores, float("-inf"))
        largest, total, summed = add_block(q, scores, value, largest, total, summed, PRECISION)
    return largest, total, summed


@triton.jit
def end_task(
    partial, maxima, arrived, target, inside, largest, total, summed, i, d, place, piece, pieces, head, lines,
    most_pieces, KV_HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Stores a block's result at `target` if the task is all of it; else leaves a piece of the queries `i` below
    `lines` at `place`, and who leaves the last one stores the result."""
    if pieces <= 1:
        tl.store(target, summed / total[:, None], mask=inside)
    else:
        units, unit = most_pieces * KV_HEADS * QUERIES, tl.load(place).to(tl.int32) * KV_HEADS + head
        opener = unit - piece * KV_HEADS  # the first piece of the block and key head
        publish(partial, maxima, unit * QUERIES, units, i, d, lines, largest, total, summed, DIM)
        if tl.atomic_add(arrived + opener, 1, sem="acq_rel") == pieces - 1:
            tl.store(arrived + opener, 0)
            largest, total, summed = nothing_seen(i, d)
            for other in range(0, pieces):
                unit = (opener + other * KV_HEADS) * QUERIES
                largest, total, summed = add_piece(
                    partial, maxima, unit, units, i, d, lines, largest, total, summed, DIM
                )  # fmt: skip
            tl.store(target, summed / total[:, None], mask=inside)
