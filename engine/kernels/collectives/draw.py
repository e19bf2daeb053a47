"""Drawing tokens from logits that the ranks of a host divide by tokens, in Triton: two numbers a row are exchanged.

    this rank's logits ─ the best of each chunk ─ the best of all ─┬─ score, id ─> peers
                                                   peers ─ theirs ─┴─ the best of all ranks ─> token

What is best is as in logits/draw.py, under the same noise: that of an entry's id in the whole vocabulary, so a token
does not depend on how many ranks there are. Scores and ids travel as sums do, by words (exchange.py). Left out: cuts by
top-k, top-p and min-p, which need all logits of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.collectives.exchange import Inboxes, line_of, send_row, take_row
from engine.kernels.logits.bitmask import lets_through
from engine.kernels.logits.draw import CHUNK, with_noise


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["slots", "lasts", "lines", "masks"])
def _best_kernel(
    logits, slots, lasts, temperatures, seeds, masks, lines, best, where, first, size, chunks, stride, mask_stride,
    MASKS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    ids = first + at
    scores = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + slot)
    noisy = temperature > 0
    if MASKS:
        kept = lets_through(masks, tl.load(lines + row), mask_stride, at, inside)
        scores = tl.where(kept, scores, float("-inf"))
        noisy = noisy & (tl.max(scores, 0) > float("-inf"))
    if noisy:
        scores = with_noise(scores, ids, temperature, tl.load(seeds + slot), tl.load(lasts + row) + 1, FAST)
        scores = tl.where(inside, scores, float("-inf"))
    top = tl.max(scores, 0)
    tl.store(best + row * chunks + chunk, top)
    tl.store(where + row * chunks + chunk, tl.min(tl.where(scores == top, ids, 2147483647), 0))


@triton.jit(do_not_specialize_on_alignment=["slots", "lasts"])
def _choose_kernel(
    best, where, slots, lasts, tokens, lengths, out, boxes, epochs, control, failed,
    chunks, tokens_stride, box_words, box_rows,
    ME: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, SENDS: tl.constexpr, TAKES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, two = tl.arange(0, BLOCK), tl.arange(0, 2)
    there = at < chunks
    scores = tl.load(best + row * chunks + at, mask=there, other=float("-inf"))
    ids = tl.load(where + row * chunks + at, mask=there, other=2147483647)
    top = tl.max(scores, 0)
    token = tl.min(tl.where(scores == top, ids, 2147483647), 0)
    own = tl.where(two == 0, top.to(tl.int32, bitcast=True), token)
    epoch = tl.load(epochs + row) + 1
    left = tl.load(control)
    half = (epoch & 1).to(tl.int64)
    if SENDS:
        for rank in tl.static_range(RANKS):
            if rank != ME:
                line = line_of(half, row, box_rows, ME, rank, RANKS)
                send_row(own, boxes[rank], epochs, line, box_words, two, two < 2, epoch, True)
    if TAKES:
        for rank in tl.static_range(RANKS):
            if rank != ME:
                line = line_of(half, row, box_rows, rank, ME, RANKS)
                got, missing = take_row(boxes[ME], epochs, line, box_words, two, two < 2, epoch, left, True)
                if (missing > 0) & (left > 0):  # the first that is missed is told
                    tl.store(failed, rank + 1)
                    tl.store(control, 0)
                score = tl.sum(tl.where(two == 0, got, 0), 0).to(tl.float32, bitcast=True)
                other = tl.sum(tl.where(two == 1, got, 0), 0)
                better = (score > top) | ((score == top) & (other < token))
                top = tl.where(better, score, top)
                token = tl.where(better, other, token)
        slot, place = tl.load(slots + row), tl.load(lasts + row) + 1
        tl.store(epochs + row, epoch)
        tl.store(out + row, token.to(tl.int64))
        tl.store(tokens + slot * tokens_stride + place, token)
        tl.store(lengths + slot, place + 1)


def best_of_chunks(
    logits: Tensor,
    slots: Tensor,
    lasts: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    first: int,
    masks: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each row and chunk of `logits` [S, n], those of the tokens from `first` on: the best score [S, chunks]
    float32, and its token's id, int32. The rest is as in `LogitOps.draw`; `masks` are those of these tokens alone."""
    rows, size = logits.shape
    chunks = triton.cdiv(size, CHUNK)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    where = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    bits, lines = (where, slots) if masks is None else masks
    _best_kernel[(rows, chunks)](
        logits, slots, lasts, temperatures, seeds, bits, lines, best, where, first, size, chunks, logits.stride(0),
        bits.stride(0), MASKS=masks is not None, BLOCK=CHUNK, FAST=logits.is_cuda, num_warps=8,
    )  # fmt: skip
    return best, where


def choose_over_ranks(
    inboxes: Inboxes,
    found: tuple[Tensor, Tensor],
    slots: Tensor,
    lasts: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    sends: bool = True,
    takes: bool = True,
) -> Tensor:
    """The best of what `best_of_chunks` has found on all ranks, ids [S] int64; written as `LogitOps.draw` does. The
    `inboxes` are by words."""
    rows, chunks = found[0].shape
    out = torch.empty(rows, dtype=torch.int64, device=tokens.device)
    box_rows, box_words = inboxes.boxes[0].shape[2:]
    assert inboxes.by_words and rows <= box_rows
    _choose_kernel[(rows,)](
        *found, slots, lasts, tokens, lengths, out, inboxes.boxes, inboxes.epochs, inboxes.control, inboxes.failed,
        chunks, tokens.stride(0), box_words, box_rows,
        ME=inboxes.place, RANKS=len(inboxes.boxes), BLOCK=triton.next_power_of_2(chunks), SENDS=sends, TAKES=takes,
        num_warps=1,
    )  # fmt: skip
    return out
