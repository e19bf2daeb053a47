"""A sum over the ranks of one host, the residual and the RMS norm behind it, in one kernel over the peers' memory.

    rank 0   part ── own ─────────────┐                     stream, norm
             └────> inbox of rank 1   (+) in order of ranks ──(+)── norm ──> out
    rank 1   part ────> inbox of rank 0 ─┘

One program takes one row: it writes its rank's part into the inbox that each peer has for it, waits for the peers'
parts in its own inboxes, and adds all in the order of the ranks, so that all ranks get the same bits. There are two
ways to know that a part has come:

- words: each word of 64 bits carries 32 bits of the part and the number of the exchange. Whoever reads the number has
  the rest, so nothing is fenced or flagged, and a row takes one trip over the link; the link carries twice the bytes.
- rows: the part as it is, then a flag with the number of the exchange, released and acquired. For large messages.

An inbox has two halves that take turns. That suffices: a rank that is in exchange n + 1 of a row has ended n, so every
peer has begun n and has ended n - 1, and nobody still reads what n - 1 left. The number of the exchange is counted on
the device, row by row, so a CUDA graph may hold the kernel. Numbers wrap around: only equality is asked for.

A wait is bounded: after `control` looks (an int32 on the device) the program gives up, writes the awaited rank + 1 into
`failed`, which the host can read, and 0 into `control`, so that no later exchange waits. What it leaves is then wrong.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch_dependents, wait_for_previous

KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _low(words, KIND: tl.constexpr, EACH: tl.constexpr):
    """The first number of a word of 32 bits, as float32."""
    if EACH == 1:  # with `else`, because Triton 3.6 compiles what follows a return
        return words.to(tl.float32, bitcast=True)
    else:
        return words.to(tl.int16).to(KIND, bitcast=True).to(tl.float32)


@triton.jit
def _high(words, KIND: tl.constexpr, EACH: tl.constexpr):
    """The second number of a word, or 0 where a word is one number."""
    if EACH == 1:
        return tl.zeros_like(words).to(tl.float32)
    else:
        return (words >> 16).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)


@triton.jit
def _packed(low, high, KIND: tl.constexpr, EACH: tl.constexpr):
    """Words of numbers, which are rounded."""
    if EACH == 1:
        return low.to(tl.int32, bitcast=True)
    else:
        first = low.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        second = high.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return first | second


@triton.jit
def _rounded(x, KIND: tl.constexpr):
    return x.to(KIND).to(tl.float32)


@triton.jit
def line_of(half, row, box_rows, SOURCE: tl.constexpr, TARGET: tl.constexpr, RANKS: tl.constexpr):
    """The place of a row among the inboxes of a rank, which has none for itself."""
    slot: tl.constexpr = SOURCE if SOURCE < TARGET else SOURCE - 1
    return (half * (RANKS - 1) + slot) * box_rows + row


@triton.jit
def send_row(own, box, flag, line, box_words, at, mask, epoch, WORDS: tl.constexpr):
    """Writes a row into an inbox of a peer."""
    place = box + line * box_words + at
    if WORDS:
        tl.store(place, (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF), mask=mask)
    else:
        tl.store(place, own, mask=mask)
        tl.debug_barrier()  # the flag, of one thread, is released behind what all have written
        tl.atomic_xchg(flag + line, epoch, sem="release", scope="sys")


@triton.jit
def _absent(got, epoch, mask):
    """How many words of a row have not come."""
    return tl.sum((mask & ((got >> 32).to(tl.int32) != epoch)).to(tl.int32), 0)


@triton.jit
def take_row(box, flag, line, box_words, at, mask, epoch, left, WORDS: tl.constexpr):
    """A row from an inbox of this rank, and how much of it has not come within `left` looks."""
    place = box + line * box_words + at
    if WORDS:
        got = tl.load(place, mask=mask, other=0, volatile=True)
        missing = _absent(got, epoch, mask)
        while (missing > 0) & (left > 0):
            got = tl.load(place, mask=mask, other=0, volatile=True)
            missing = _absent(got, epoch, mask)
            left -= 1
        row = got.to(tl.int32)
    else:
        missing = (tl.atomic_add(flag + line, 0, sem="acquire", scope="sys") != epoch).to(tl.int32)
        while (missing > 0) & (left > 0):
            missing = (tl.atomic_add(flag + line, 0, sem="acquire", scope="sys") != epoch).to(tl.int32)
            left -= 1
        row = tl.load(place, mask=mask, other=0, cache_modifier=".cg")
    return row, missing


@triton.jit
def _add_and_norm(low, high, old, w0, w1, place, mask, size, epsilon, KIND: tl.constexpr, EACH: tl.constexpr):
    """Adds the sum to the `old` row of the stream, which is at `place`: the norm of that."""
    low = _rounded(_rounded(low, KIND) + _low(old, KIND, EACH), KIND)
    high = _rounded(_rounded(high, KIND) + _high(old, KIND, EACH), KIND)
    tl.store(place, _packed(low, high, KIND, EACH), mask=mask)
    scale = 1.0 / tl.sqrt_rn(tl.sum(low * low + high * high, 0) / size + epsilon)
    return low * scale * w0, high * scale * w1


@triton.jit
def exchange_kernel(
    part, stream, weight, out, boxes, flags, epochs, control, failed, words, box_words, box_rows, epsilon,
    ME: tl.constexpr, RANKS: tl.constexpr, KIND: tl.constexpr, EACH: tl.constexpr, NORM: tl.constexpr,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, SENDS: tl.constexpr, TAKES: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < words
    if NORM:
        w0 = tl.load(weight + EACH * at, mask=mask, other=0.0).to(tl.float32)
        w1 = tl.load(weight + EACH * at + (EACH - 1), mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(DEPENDS)
    own = tl.load(part + row * words + at, mask=mask, other=0)
    if NORM:
        old = tl.load(stream + row * words + at, mask=mask, other=0)  # now: it is here when the parts are
    epoch = tl.load(epochs + row) + 1
    left = tl.load(control)
    half = (epoch & 1).to(tl.int64)
    if SENDS:
        for rank in tl.static_range(RANKS):
            if rank != ME:
                line = line_of(half, row, box_rows, ME, rank, RANKS)
                send_row(own, boxes[rank], flags[rank], line, box_words, at, mask, epoch, WORDS)
    if TAKES:
        low = tl.zeros([BLOCK], tl.float32)
        high = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(RANKS):
            if rank == ME:
                low += _low(own, KIND, EACH)
                high += _high(own, KIND, EACH)
            else:
                line = line_of(half, row, box_rows, rank, ME, RANKS)
                got, missing = take_row(boxes[ME], flags[ME], line, box_words, at, mask, epoch, left, WORDS)
                if (missing > 0) & (left > 0):  # the first that is missed is told
                    tl.store(failed, rank + 1)
                    tl.store(control, 0)
                low += _low(got, KIND, EACH)
                high += _high(got, KIND, EACH)
        tl.store(epochs + row, epoch)
        if NORM:
            place = stream + row * words + at
            low, high = _add_and_norm(low, high, old, w0, w1, place, mask, words * EACH, epsilon, KIND, EACH)
        tl.store(out + row * words + at, _packed(low, high, KIND, EACH), mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inboxes:
    """What the kernel knows of a group's memory, on the rank in place `place` of it. `boxes` and `flags` are those of
    each rank, by place, as this one reaches them: `boxes` [2, ranks - 1, rows, words] int64 or int32, `flags` alike
    without words, int32. The rest is this rank's own."""

    place: int
    boxes: tuple[Tensor, ...]
    flags: tuple[Tensor, ...]
    epochs: Tensor  # [rows] int32: exchanges of each row so far
    control: Tensor  # [1] int32: how often to look for what has not come
    failed: Tensor  # [1] int32, of the host: 0, or 1 more than the place of the rank that was awaited in vain

    @property
    def by_words(self) -> bool:
        return self.boxes[0].dtype == torch.int64

    def takes(self, part: Tensor) -> bool:
        """Whether `part` [T, size] can be exchanged through these."""
        rows, words = self.boxes[0].shape[2:]
        if part.dim() != 2 or part.dtype not in KINDS or not part.is_contiguous():
            return False
        row_bytes = part.shape[1] * part.element_size()
        return 0 < part.shape[0] <= rows and row_bytes <= 4 * words and row_bytes % 4 == 0

    def exchange(
        self,
        part: Tensor,
        stream: Tensor | None = None,
        weight: Tensor | None = None,
        epsilon: float = 0.0,
        *,
        sends: bool = True,
        takes: bool = True,
    ) -> Tensor:
        """The sum of all ranks' `part` [T, size], in its place. With `stream` [T, size], which is added to in place,
        the norm of that by `weight` [size]. `sends` and `takes` are the halves of it, for tests of one process."""
        size = part.shape[1] * part.element_size() // 4
        rows, words = self.boxes[0].shape[2:]
        whole, old = part.view(torch.int32), (part if stream is None else stream).view(torch.int32)
        block = triton.next_power_of_2(size)
        warps = max(4, min(16 if self.by_words else 8, block // 128))
        exchange_kernel[(part.shape[0],)](
            whole, old, part if weight is None else weight, whole, self.boxes, self.flags, self.epochs, self.control,
            self.failed, size, words, rows, epsilon,
            ME=self.place, RANKS=len(self.boxes), KIND=KINDS[part.dtype], EACH=4 // part.element_size(),
            NORM=stream is not None, WORDS=self.by_words, BLOCK=block, SENDS=sends, TAKES=takes,
            num_warps=warps, **launch_dependents(part),
        )  # fmt: skip
        return part
