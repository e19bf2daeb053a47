"""Drawing tokens in one pass over the logits, in Triton: argmax of logit / temperature + Gumbel noise.

The noise is that of `gumbel` in reference.py, made where it is used: entry i of a row is a hash of i under a
key of the row's seed and position. The kernel's time goes into it, so logarithms are the processor's own, to 22 bits. A
row is cut into chunks, so that one row fills a GPU too; a second kernel takes the best of them, the lowest id of
equals. What filters leave of a row is said by a cut (filters.py). Arguments that are rows of a tensor come with any
alignment: for each kind, a kernel would be compiled in the middle of a step. Masks of grammars are looked at here, and
written nowhere; where they or cuts leave nothing of a chunk, as of nearly all at most places in JSON, no noise is made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.logits.bitmask import lets_through
from engine.kernels.logits.reference import mask_words

CHUNK = 4096  # logits that one program looks at


@triton.jit
def _mix(x):
    """SplitMix64's finalizer, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _hash(ids, key):
    """Of 32 bits: lowbias32 (C. Wellons, hash-prospector) of a Weyl sequence, under a key of 64."""
    x = ids.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _log(x, FAST: tl.constexpr):
    if FAST:
        return 0.6931471805599453 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log(x)


@triton.jit
def with_noise(scores, ids, temperature, seed, position, FAST: tl.constexpr):
    """Scores of tokens `ids` over the temperature, with Gumbel noise; `seed` and `position` are int64."""
    golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    key = _mix(_mix(seed.to(tl.uint64, bitcast=True)) + position.to(tl.uint64, bitcast=True) * golden)
    u = tl.minimum((_hash(ids, key).to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    # -log1p(-u), where 1 - u would lose what matters by its series
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    exponential = tl.where(u < 1 / 16, series, -_log(1.0 - u, FAST))
    # A temperature whose inverse is too large for a float draws the largest score, as one that is near it does.
    return scores * tl.minimum(1.0 / temperature, 1e30) - _log(exponential, FAST)


@triton.jit(do_not_specialize_on_alignment=["slots", "lasts", "lines"])
def _draw_kernel(
    logits, slots, lasts, temperatures, seeds, floors, cut_ids, masks, lines, best, where, size, chunks, stride,
    mask_stride, CUTS: tl.constexpr, MASKS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = ids < size
    scores = tl.load(logits + row * stride + ids, mask=mask, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + slot)
    if CUTS:
        floor = tl.load(floors + row)
        kept = (scores > floor) | ((scores == floor) & (ids <= tl.load(cut_ids + row)))
        scores = tl.where(kept, scores, float("-inf"))
    if MASKS:
        kept = lets_through(masks, tl.load(lines + row), mask_stride, ids, mask)
        scores = tl.where(kept, scores, float("-inf"))
    noisy = temperature > 0
    if CUTS or MASKS:
        noisy = noisy & (tl.max(scores, 0) > float("-inf"))
    if noisy:
        scores = with_noise(scores, ids, temperature, tl.load(seeds + slot), tl.load(lasts + row) + 1, FAST)
        scores = tl.where(mask, scores, float("-inf"))
    top = tl.max(scores, 0)
    tl.store(best + row * chunks + chunk, top)
    tl.store(where + row * chunks + chunk, tl.min(tl.where(scores == top, ids, size - 1), 0))


@triton.jit(do_not_specialize_on_alignment=["slots", "lasts"])
def _choose_kernel(best, where, slots, lasts, tokens, lengths, out, chunks, tokens_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < chunks
    scores = tl.load(best + row * chunks + at, mask=mask, other=float("-inf"))
    ids = tl.load(where + row * chunks + at, mask=mask, other=2147483647)
    chosen = tl.min(tl.where(scores == tl.max(scores, 0), ids, 2147483647), 0)
    tl.store(out + row, chosen.to(tl.int64))
    slot, place = tl.load(slots + row), tl.load(lasts + row) + 1
    tl.store(tokens + slot * tokens_stride + place, chosen)
    tl.store(lengths + slot, place + 1)


def draw(
    logits: Tensor,
    slots: Tensor,
    lasts: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    cuts: tuple[Tensor, Tensor] | None = None,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `LogitOps.draw`; `cuts` are what filters.cuts says is left of each row."""
    rows, size = logits.shape
    assert masks is None or (cuts is None and masks[0].dtype == torch.int32 and masks[0].shape[1] == mask_words(size))
    chunks = triton.cdiv(size, CHUNK)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    where = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    floors, cut_ids = (best, where) if cuts is None else cuts
    bits, lines = (where, slots) if masks is None else masks
    _draw_kernel[(rows, chunks)](
        logits, slots, lasts, temperatures, seeds, floors, cut_ids, bits, lines, best, where, size, chunks,
        logits.stride(0), bits.stride(0),
        CUTS=cuts is not None, MASKS=masks is not None, BLOCK=CHUNK, FAST=logits.is_cuda, num_warps=8,
    )  # fmt: skip
    block = triton.next_power_of_2(chunks)
    _choose_kernel[(rows,)](
        best, where, slots, lasts, tokens, lengths, out, chunks, tokens.stride(0), BLOCK=block, num_warps=1
    )
    return out
