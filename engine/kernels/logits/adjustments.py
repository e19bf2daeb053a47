"""Penalties and edits in Triton: work for the tokens that a row has, not for its vocabulary.

Penalties take two launches over the tokens: one counts them in a scratch of the vocabulary's size, the other takes each
count out again, and whoever gets it penalises that token. So each is penalised once, and the scratch is clean.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.logits.reference import AskingRows, SlotTables

BLOCK = 1024  # tokens of one program
EDITS_BLOCK = 256


@triton.jit
def _penalty(columns, number, count, slot):
    """A float32 column; the numbers are those of reference.py."""
    return tl.load(columns + number * count + slot).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["slots", "ends"])
def _count_kernel(slots, ends, columns, tokens, scratch, slot_count, size, tokens_stride, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + i)
    end, prompt = tl.load(ends + i).to(tl.int32), tl.load(columns + slot)
    begin = tl.program_id(1) * BLOCK
    if begin < end:
        at = begin + tl.arange(0, BLOCK)
        said = tl.load(tokens + slot * tokens_stride + at, mask=at < end, other=0)
        counted = scratch + i * size + said
        tl.atomic_add(counted, tl.full([BLOCK], 2, tl.int32), mask=(at < end) & (at >= prompt), sem="relaxed")
        if _penalty(columns, 3, slot_count, slot) != 1.0:
            tl.atomic_or(counted, tl.full([BLOCK], 1, tl.int32), mask=(at < end) & (at < prompt), sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["rows", "slots", "ends"])
def _penalize_kernel(
    logits, rows, slots, ends, columns, tokens, scratch, slot_count, size, stride, tokens_stride, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + i)
    end = tl.load(ends + i).to(tl.int32)
    begin = tl.program_id(1) * BLOCK
    if begin < end:
        at = begin + tl.arange(0, BLOCK)
        said = tl.load(tokens + slot * tokens_stride + at, mask=at < end, other=0)
        found = tl.atomic_xchg(scratch + i * size + said, tl.zeros([BLOCK], tl.int32), mask=at < end, sem="relaxed")
        mine = (at < end) & (found != 0)
        target = logits + tl.load(rows + i) * stride + said
        x = tl.load(target, mask=mine, other=0.0)
        repetition = _penalty(columns, 3, slot_count, slot)
        x = tl.where(x > 0.0, x / repetition, x * repetition)
        times = (found >> 1).to(tl.float32)
        x -= _penalty(columns, 4, slot_count, slot) * times
        x -= tl.where(times > 0.0, _penalty(columns, 5, slot_count, slot), 0.0)
        tl.store(target, x, mask=mine)


def penalize(logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor, scratch: Tensor) -> None:
    """As `LogitOps.penalize`."""
    size = logits.shape[1]
    for begin in range(0, len(asking.rows), len(scratch)):
        rows, slots, ends = (each[begin : begin + len(scratch)] for each in (asking.rows, asking.slots, asking.ends))
        grid = (len(rows), triton.cdiv(asking.longest, BLOCK))
        slot_count = tables.columns.shape[1]
        _count_kernel[grid](
            slots, ends, tables.columns, tokens, scratch, slot_count, size, tokens.stride(0), BLOCK=BLOCK
        )
        _penalize_kernel[grid](
            logits, rows, slots, ends, tables.columns, tokens, scratch, slot_count, size, logits.stride(0),
            tokens.stride(0), BLOCK=BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["rows", "slots", "ends"])
def _edit_kernel(
    logits, rows, slots, ends, columns, edits, prefixes, tokens, slot_count, width, stride, tokens_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + i)
    end, prompt = tl.load(ends + i).to(tl.int32), tl.load(columns + slot)
    count, base = tl.load(columns + slot_count + slot), tl.load(columns + 2 * slot_count + slot)
    begin = tl.program_id(1) * BLOCK
    if begin < count:
        e = begin + tl.arange(0, BLOCK)
        there = e < count
        line = slot_count * width
        first = edits + slot * width + e
        until = tl.load(first + 2 * line, mask=there, other=0)
        start = base + tl.load(first + 3 * line, mask=there, other=0)
        length = tl.load(first + 4 * line, mask=there, other=0)
        acts = there & (end - prompt < until) & (length <= end)
        for place in range(tl.max(length, 0)):
            inside = acts & (place < length)
            said = tl.load(tokens + slot * tokens_stride + end - length + place, mask=inside, other=0)
            wanted = tl.load(prefixes + start + place, mask=inside, other=0)
            acts = acts & (said == wanted)
        value = tl.load(first + line, mask=acts, other=0).to(tl.float32, bitcast=True)
        target = logits + tl.load(rows + i) * stride + tl.load(first, mask=acts, other=0)
        tl.atomic_add(target, value, mask=acts, sem="relaxed")


def edit(logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor, most: int) -> None:
    """As `LogitOps.edit`."""
    _, slot_count, width = tables.edits.shape
    _edit_kernel[(len(asking.rows), triton.cdiv(most, EDITS_BLOCK))](
        logits, asking.rows, asking.slots, asking.ends, tables.columns, tables.edits, tables.prefixes, tokens,
        slot_count, width, logits.stride(0), tokens.stride(0), BLOCK=EDITS_BLOCK,
    )  # fmt: skip
