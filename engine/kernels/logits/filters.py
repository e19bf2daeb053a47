"""Top-k, top-p and min-p without sorting, in Triton: where each row's logits are cut.

A cut is a logit and an id: what is above the logit stays, and of what equals it the ids up to that one. The draw that
follows (draw.py) leaves the rest out, so nothing is written back. What the filters keep is defined by `filtered` in
reference.py. Sums are taken in a fixed order: a cut does not depend on other rows, nor on chance.

    logits ── scan ──> maximum and mass of each group of 32, of each chunk ── cut ──> floors, lasts
                                                           (reads the groups that can hold the cut)

The group maxima bound the cut from below: the k-th largest of them is at most the k-th largest logit, and what the
groups tell of the tail's mass does the same for top-p. So the second kernel, one program a row, looks at few groups of
a usual row, and at all of them where many tokens are about as likely. There it narrows a range of keys (floats as
integers of the same order) to one key, with several pivots a round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # logits that one program scans
GROUP = 32
HALVINGS = 14  # of the range in which the groups' bound is looked for
PIVOTS = 8
BLOCK = 2048  # logits that are compared with the pivots at a time


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """int32 in the order of the floats, without the SHIFT low bits, which are 0 in shorter types."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # one zero, not two
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def float_of(key, SHIFT: tl.constexpr):
    bits = key << SHIFT
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) & (-1 << SHIFT)).to(tl.float32, bitcast=True)


@triton.jit
def load_groups(logits, chunk, size, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk of one row as float32 [groups, GROUP], and its ids."""
    ids = chunk * BLOCK + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.load(logits + ids, mask=ids < size, other=float("-inf")).to(tl.float32), ids


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _scan_kernel(
    logits, slots, temperatures, top_ps, min_ps, top_ks, maxima, sums, chunk_maxima, chunk_sums, size, chunks, stride,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    temperature = tl.load(temperatures + slot)
    filters = (tl.load(top_ps + slot) < 1.0) | (tl.load(min_ps + slot) > 0.0) | (tl.load(top_ks + slot) > 0)
    if filters & (temperature > 0.0):
        x, _ = load_groups(logits + row * stride, chunk, size, GROUP, BLOCK)
        largest = tl.max(x, 1)
        top = tl.max(largest, 0)
        anchor = tl.where(top == float("-inf"), 0.0, top)
        mass = tl.sum(tl.exp((x - anchor) / temperature), 1)
        groups: tl.constexpr = BLOCK // GROUP
        at = (row * chunks + chunk) * groups + tl.arange(0, groups)
        tl.store(maxima + at, largest)
        tl.store(sums + at, mass)
        tl.store(chunk_maxima + row * chunks + chunk, top)
        tl.store(chunk_sums + row * chunks + chunk, tl.sum(mass, 0))


@triton.jit
def _top_k_bound(largest, top, top_k, HALVINGS: tl.constexpr):
    """A number that the k-th largest logit is not below, close to the k-th largest of the groups' maxima."""
    low = tl.min(tl.where(largest > float("-inf"), largest, top), 0)
    enough = tl.sum((largest >= low).to(tl.int32), 0) >= top_k
    high = top
    for _ in range(HALVINGS):
        middle = low + (high - low) * 0.5
        reached = tl.sum((largest >= middle).to(tl.int32), 0) >= top_k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return tl.where(enough, low, float("-inf"))


@triton.jit
def _tail(largest, masses, middle, top, temperature, GROUP: tl.constexpr):
    """The mass of all logits below `middle`, or more: of a group that reaches it, what lies below is not known."""
    below = tl.exp((middle - top) / temperature) * (GROUP - 1)
    return tl.sum(tl.where(largest < middle, masses, tl.minimum(masses, below)), 0)


@triton.jit
def _top_p_bound(largest, masses, top, temperature, allowed, GROUP: tl.constexpr, HALVINGS: tl.constexpr):
    """A number below which lies a mass of at most `allowed`."""
    low = tl.min(tl.where(largest > float("-inf"), largest, top), 0)
    enough = _tail(largest, masses, low, top, temperature, GROUP) <= allowed
    high = top
    for _ in range(HALVINGS):
        middle = low + (high - low) * 0.5
        fits = _tail(largest, masses, middle, top, temperature, GROUP) <= allowed
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    return tl.where(enough, low, float("-inf"))


@triton.jit
def _load_listed(logits, listed, begin, count, size, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK logits of the listed groups, from the `begin`-th on: they, their ids, and which are there."""
    at = begin + tl.arange(0, BLOCK)
    there = at < count
    ids = tl.load(listed + at // GROUP, mask=there, other=0) * GROUP + at % GROUP
    there = there & (ids < size)
    return tl.load(logits + ids, mask=there, other=float("-inf")).to(tl.float32), ids, there


@triton.jit
def _measure(
    logits, listed, count, size, pivots, top, temperature,
    MASS: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """Of the listed logits whose keys are not below each pivot: how many, or their mass."""
    kind: tl.constexpr = tl.float32 if MASS else tl.int32
    total = tl.zeros([BLOCK, PIVOTS], kind)
    for begin in range(0, count, BLOCK):
        x, _, there = _load_listed(logits, listed, begin, count, size, GROUP, BLOCK)
        weight = tl.exp((x - top) / temperature) if MASS else tl.full([BLOCK], 1, tl.int32)
        reaches = there[:, None] & (key_of(x, SHIFT)[:, None] >= pivots[None, :])
        total += tl.where(reaches, weight[:, None], tl.zeros([BLOCK, PIVOTS], kind))
    return tl.sum(total, 0)


@triton.jit
def _search(
    logits, listed, count, size, low, high, target, top, temperature,
    MASS: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The largest key from `low` to `high` - 1 that logits of `target` in all are not below, or `low`."""
    i = tl.arange(0, PIVOTS)
    while high - low > 1:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = low + step * (i + 1)
        total = _measure(
            logits, listed, count, size, pivots.to(tl.int32), top, temperature, MASS, SHIFT, GROUP, BLOCK, PIVOTS
        )
        low += step * tl.sum(((total >= target) & (pivots < high)).to(tl.int64), 0)
        high = tl.minimum(high, low + step)
    return low


@triton.jit
def _last_of_equals(
    logits, listed, count, size, key, wanted, SHIFT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """The id of the `wanted`-th listed logit with this key. Listed groups ascend."""
    before = tl.full((), 0, tl.int32)
    last = tl.full((), 0, tl.int32)
    for begin in range(0, count, BLOCK):
        x, ids, there = _load_listed(logits, listed, begin, count, size, GROUP, BLOCK)
        equal = (there & (key_of(x, SHIFT) == key)).to(tl.int32)
        rank = before + tl.cumsum(equal, 0)
        last += tl.sum(tl.where((equal > 0) & (rank == wanted), ids, 0), 0)
        before += tl.sum(equal, 0)
    return last


@triton.jit
def _bound(
    largest, sums, chunk_maxima, g, groups, whole, top, temperature, top_p, top_k,
    GROUP: tl.constexpr, CHUNK_GROUPS: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """A number that the cut of a row by top-k or else by top-p is not below, from what is known of its groups."""
    if top_k > 0:
        bound = _top_k_bound(largest, top, top_k, HALVINGS)
    else:
        masses = tl.load(sums + g, mask=g < groups, other=0.0)
        chunk_top = tl.load(chunk_maxima + g // CHUNK_GROUPS, mask=g < groups, other=float("-inf"))
        masses *= tl.exp((chunk_top - top) / temperature)
        allowed = whole * ((1.0 - top_p) * 0.99 - 2e-6)  # less than there is: sums are rounded
        bound = _top_p_bound(largest, masses, top, temperature, allowed, GROUP, HALVINGS)
    return bound


@triton.jit
def _nucleus(
    logits, listed, count, size, low, high, whole, measures, top, temperature, top_p,
    SHIFT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """Top-p's cut among listed logits whose keys are not below `low`: its key, and the last of the equals that stay.

    Their mass is `whole`, or is still to be measured."""
    i = tl.arange(0, PIVOTS)
    if measures:
        pivots = (low + tl.where(i < 0, 1, 0)).to(tl.int32)
        mass = _measure(logits, listed, count, size, pivots, top, temperature, True, SHIFT, GROUP, BLOCK, PIVOTS)
        whole = tl.max(mass, 0)
    target = whole * top_p
    low = _search(logits, listed, count, size, low, high, target, top, temperature, True, SHIFT, GROUP, BLOCK, PIVOTS)
    pivots = (low + tl.where(i == 0, 1, 0)).to(tl.int32)  # the first: what is above the cut
    number = _measure(logits, listed, count, size, pivots, top, temperature, False, SHIFT, GROUP, BLOCK, PIVOTS)
    mass = _measure(logits, listed, count, size, pivots, top, temperature, True, SHIFT, GROUP, BLOCK, PIVOTS)
    equals = tl.max(number, 0) - tl.min(number, 0)
    key = low.to(tl.int32)
    each = tl.exp((float_of(key, SHIFT) - top) / temperature)
    wanted = tl.maximum(tl.ceil((target - tl.min(mass, 0)) / each), 1.0)
    last = size
    if wanted < equals.to(tl.float32):
        last = _last_of_equals(logits, listed, count, size, key, wanted.to(tl.int32), SHIFT, GROUP, BLOCK)
    return low, last


@triton.jit
def _list_groups(
    maxima, sums, chunk_maxima, listed, groups, whole, top, temperature, top_p, top_k,
    SHIFT: tl.constexpr, GROUP: tl.constexpr, CHUNK_GROUPS: tl.constexpr, GROUPS: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """Lists the groups whose largest logit reaches the bound of a row's cut: (the first key at or above the bound, how
    many logits are in these groups)."""
    g = tl.arange(0, GROUPS)
    largest = tl.load(maxima + g, mask=g < groups, other=float("-inf"))
    bound = _bound(
        largest, sums, chunk_maxima, g, groups, whole, top, temperature, top_p, top_k, GROUP, CHUNK_GROUPS, HALVINGS
    )
    kept = (g < groups) & (largest >= bound)
    tl.store(listed + tl.cumsum(kept.to(tl.int32), 0) - 1, g, mask=kept)
    count = tl.sum(kept.to(tl.int32), 0) * GROUP
    tl.debug_barrier()  # the list is read by other threads than wrote it
    # Keys of negative numbers end in ones, of others in zeros.
    low = key_of(bound, 0).to(tl.int64)
    return tl.where(low < 0, low, low + ((1 << SHIFT) - 1)) >> SHIFT, count


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _cut_kernel(
    logits, slots, temperatures, top_ps, min_ps, top_ks, maxima, sums, chunk_maxima, chunk_sums, listed, floors, lasts,
    size, chunks, groups, stride,
    SHIFT: tl.constexpr, GROUP: tl.constexpr, CHUNK_GROUPS: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
    HALVINGS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    temperature, top_p = tl.load(temperatures + slot), tl.load(top_ps + slot)
    min_p, top_k = tl.load(min_ps + slot), tl.load(top_ks + slot)
    logits += row * stride
    maxima += row * groups
    listed += row * groups
    chunk_maxima += row * chunks
    tl.store(floors + row, float("-inf"))
    tl.store(lasts + row, size)
    top = float("-inf")
    whole = 0.0
    if (temperature > 0.0) & ((top_p < 1.0) | (min_p > 0.0) | (top_k > 0)):
        c = tl.arange(0, CHUNKS)
        chunk_top = tl.load(chunk_maxima + c, mask=c < chunks, other=float("-inf"))
        mass = tl.load(chunk_sums + row * chunks + c, mask=c < chunks, other=0.0)
        top = tl.max(chunk_top, 0)
        whole = tl.sum(mass * tl.exp((chunk_top - top) / temperature), 0)
    if top > float("-inf"):
        floor = tl.where(min_p > 0.0, top + temperature * tl.log(min_p), float("-inf"))
        tl.store(floors + row, floor)
        if (top_p < 1.0) | (top_k > 0):
            low, count = _list_groups(
                maxima, sums + row * groups, chunk_maxima, listed, groups, whole, top, temperature, top_p, top_k,
                SHIFT, GROUP, CHUNK_GROUPS, GROUPS, HALVINGS,
            )  # fmt: skip
            high = key_of(top, SHIFT).to(tl.int64) + 1
            if top_k > 0:
                low = _search(
                    logits, listed, count, size, low, high, top_k, top, temperature, False, SHIFT, GROUP, BLOCK, PIVOTS
                )
            last = size
            if top_p < 1.0:
                low, last = _nucleus(
                    logits, listed, count, size, low, high, whole, top_k > 0, top, temperature, top_p,
                    SHIFT, GROUP, BLOCK, PIVOTS,
                )  # fmt: skip
            cut = float_of(low.to(tl.int32), SHIFT)
            if cut >= floor:  # else min-p leaves less, and all that equals its own bound
                tl.store(floors + row, cut)
                tl.store(lasts + row, last)


def cuts(
    logits: Tensor, slots: Tensor, temperatures: Tensor, top_ps: Tensor, min_ps: Tensor, top_ks: Tensor
) -> tuple[Tensor, Tensor]:
    """Floors [S] float32 and lasts [S] int32: a row keeps what is above its floor, and equals of it up to id `last`.

    `logits` [S, V] of any float type, each row dense; `slots` [S] int64; the parameters are by slot: `temperatures`
    (0 is argmax, which nothing is cut for), `top_ps` (1 is off), `min_ps` (0 is off), float32; `top_ks` int32 (0 is
    off).
    """
    rows, size = logits.shape
    chunks, device = triton.cdiv(size, CHUNK), logits.device
    groups = chunks * (CHUNK // GROUP)
    maxima, sums = torch.empty(2, rows, groups, dtype=torch.float32, device=device)
    chunk_maxima, chunk_sums = torch.empty(2, rows, chunks, dtype=torch.float32, device=device)
    listed = torch.empty(rows, groups, dtype=torch.int32, device=device)
    floors = torch.empty(rows, dtype=torch.float32, device=device)
    lasts = torch.empty(rows, dtype=torch.int32, device=device)
    parameters = (slots, temperatures, top_ps, min_ps, top_ks)
    _scan_kernel[(rows, chunks)](
        logits, *parameters, maxima, sums, chunk_maxima, chunk_sums, size, chunks, logits.stride(0),
        GROUP=GROUP, BLOCK=CHUNK, num_warps=8,
    )  # fmt: skip
    _cut_kernel[(rows,)](
        logits, *parameters, maxima, sums, chunk_maxima, chunk_sums, listed, floors, lasts,
        size, chunks, groups, logits.stride(0),
        SHIFT={torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0), GROUP=GROUP, CHUNK_GROUPS=CHUNK // GROUP,
        CHUNKS=triton.next_power_of_2(chunks), GROUPS=triton.next_power_of_2(groups),
        HALVINGS=HALVINGS, BLOCK=BLOCK, PIVOTS=PIVOTS, num_warps=16,
    )  # fmt: skip
    return floors, lasts
