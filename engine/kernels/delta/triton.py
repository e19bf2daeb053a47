"""The operations of reference.py as Triton kernels, for GPUs.

    decode    a program (row, value head, some value numbers) takes one step: reads its part of the memory and writes it
    prompts   such a program goes through its row in chunks of 16 tokens, the memory in registers meanwhile

Which tokens a row has is read on the device, so no program asks the host. A chunk's triangular system is inverted by
substitution, row by row: as exact as the recurrence, also where keys are alike. Products take three steps of the matrix
units, which are nearly exact for float32. Left out: chunks of a row side by side, gates and norm in the same kernels,
and a cut that is tuned: nothing here has been timed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.delta.reference import SMALL, DeltaGates, DeltaHeads, DeltaOps, StepRows

CHANNELS = 256  # of a program of the convolution
VALUES = 32  # numbers of a value that a program has
TOKENS = 16  # of a chunk: the least that matrix units multiply
WARPS = 8  # of a program of chunks; with fewer, more of its registers spill


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _convolve_kernel(inputs, weight, window, slots, offsets, row_of, out, channels, input_stride, line,
                     WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program: a token, some channels. Inputs before the row's first are those of its window."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels
    row = tl.load(row_of + token)
    place = tl.zeros([BLOCK], tl.int32) + (token - tl.load(offsets + row)).to(tl.int32)
    held = window + tl.load(slots + row) * line
    total = tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(WIDTH):
        ago = WIDTH - 1 - tap
        new = place >= ago
        x = tl.load(inputs + (token - ago) * input_stride + at, mask=inside & new, other=0.0).to(tl.float32)
        old = tl.load(held + (place + tap) * channels + at, mask=inside & (place < ago), other=0.0).to(tl.float32)
        total += (x + old) * tl.load(weight + at * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * channels + at, _silu(total).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _window_kernel(inputs, window, slots, offsets, channels, input_stride, line,
                   WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program: a row, some channels. What it moves within the window it moves towards the window's begin."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels
    end = tl.load(offsets + row + 1)
    length = tl.zeros([BLOCK], tl.int32) + (end - tl.load(offsets + row)).to(tl.int32)
    held = window + tl.load(slots + row) * line
    for place in tl.static_range(WIDTH - 1):
        ago = WIDTH - 1 - place
        new = length >= ago
        x = tl.load(inputs + (end - ago) * input_stride + at, mask=inside & new, other=0.0).to(tl.float32)
        old = tl.load(held + (place + length) * channels + at, mask=inside & (length < ago), other=0.0)
        tl.store(held + place * channels + at, (x + old.to(tl.float32)).to(window.dtype.element_ty), mask=inside)


@triton.jit
def _gates(beta, step, rate, bias):
    """beta, and the logarithm of the decay."""
    x = step.to(tl.float32) + bias
    softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
    return 1.0 / (1.0 + tl.exp(-beta.to(tl.float32))), -tl.exp(rate) * softplus


@triton.jit
def _step_kernel(mixed, beta, step, rate, bias, memory, slots, out, mixed_stride, gate_stride, value_heads, scale, line,
                 SHARED: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KEYS: tl.constexpr,
                 VALUES: tl.constexpr, SMALL: tl.constexpr):  # fmt: skip
    """One token of a row. `SHARED` value heads have one key head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, KEYS)
    v = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    own = mixed + row * mixed_stride
    key_head, key_heads = head // SHARED, value_heads // SHARED
    q = tl.load(own + key_head * KEY + k, mask=k < KEY, other=0.0).to(tl.float32)
    key = tl.load(own + (key_heads + key_head) * KEY + k, mask=k < KEY, other=0.0).to(tl.float32)
    value = tl.load(own + 2 * key_heads * KEY + head * VALUE + v, mask=v < VALUE, other=0.0).to(tl.float32)
    q = q * (scale / tl.sqrt_rn(tl.sum(q * q, 0) + SMALL))
    key = key / tl.sqrt_rn(tl.sum(key * key, 0) + SMALL)
    taken, decay = _gates(tl.load(beta + row * gate_stride + head), tl.load(step + row * gate_stride + head),
                          tl.load(rate + head), tl.load(bias + head))  # fmt: skip
    held_at = memory + tl.load(slots + row) * line + head * KEY * VALUE
    places = held_at + k[:, None] * VALUE + v[None, :]
    there = (k < KEY)[:, None] & (v < VALUE)[None, :]
    held = tl.load(places, mask=there, other=0.0) * tl.exp(decay)
    new = (value - tl.sum(held * key[:, None], 0)) * taken
    held += key[:, None] * new[None, :]
    tl.store(places, held, mask=there)
    made = tl.sum(held * q[:, None], 0)
    tl.store(out + (row * value_heads + head) * VALUE + v, made.to(out.dtype.element_ty), mask=v < VALUE)


@triton.jit
def _chunks_kernel(mixed, beta, step, rate, bias, memory, slots, offsets, out, mixed_stride, gate_stride, value_heads,
                   scale, line, SHARED: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KEYS: tl.constexpr,
                   VALUES: tl.constexpr, TOKENS: tl.constexpr, SMALL: tl.constexpr):  # fmt: skip
    """All tokens of a row, as reference.py's `_chunks` computes them."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, KEYS)
    v = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    t = tl.arange(0, TOKENS)
    key_head, key_heads = head // SHARED, value_heads // SHARED
    held_at = memory + tl.load(slots + row) * line + head * KEY * VALUE
    places = held_at + k[:, None] * VALUE + v[None, :]
    there = (k < KEY)[:, None] & (v < VALUE)[None, :]
    held = tl.load(places, mask=there, other=0.0)
    head_rate, head_bias = tl.load(rate + head), tl.load(bias + head)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    for first in range(begin, end, TOKENS):
        token = (first + t).to(tl.int64)
        real = token < end
        own = mixed + token[:, None] * mixed_stride
        keys, values = real[:, None] & (k < KEY)[None, :], real[:, None] & (v < VALUE)[None, :]
        q = tl.load(own + key_head * KEY + k[None, :], mask=keys, other=0.0).to(tl.float32)
        key = tl.load(own + (key_heads + key_head) * KEY + k[None, :], mask=keys, other=0.0).to(tl.float32)
        value = tl.load(own + 2 * key_heads * KEY + head * VALUE + v[None, :], mask=values, other=0.0).to(tl.float32)
        q = q * (scale / tl.sqrt_rn(tl.sum(q * q, 1) + SMALL))[:, None]
        key = key / tl.sqrt_rn(tl.sum(key * key, 1) + SMALL)[:, None]
        taken, decay = _gates(tl.load(beta + token * gate_stride + head, mask=real, other=0.0),
                              tl.load(step + token * gate_stride + head, mask=real, other=0.0),
                              head_rate, head_bias)  # fmt: skip
        taken, decay = tl.where(real, taken, 0.0), tl.where(real, decay, 0.0)  # padding changes nothing
        gone = tl.cumsum(decay, 0)
        seen = t[:, None] >= t[None, :]
        between = tl.exp(tl.where(seen, gone[:, None] - gone[None, :], float("-inf")))
        system = tl.dot(key * taken[:, None], tl.trans(key), input_precision="tf32x3") * between
        system = tl.where(t[:, None] > t[None, :], system, 0.0)
        inverse = tl.where(t[:, None] == t[None, :], 1.0, 0.0)
        for number in range(1, TOKENS):
            weights = tl.sum(tl.where(t[:, None] == number, system, 0.0), 0)
            known = tl.sum(weights[:, None] * inverse, 0)
            inverse = tl.where(t[:, None] == number, inverse - known[None, :], inverse)
        left = tl.exp(gone)
        known = tl.dot(key * left[:, None], held, input_precision="tf32x3")
        new = tl.dot(inverse, (value - known) * taken[:, None], input_precision="tf32x3")
        within = tl.dot(q, tl.trans(key), input_precision="tf32x3") * between
        made = tl.dot(q * left[:, None], held, input_precision="tf32x3") + tl.dot(within, new, input_precision="tf32x3")
        tl.store(out + (token[:, None] * value_heads + head) * VALUE + v[None, :], made.to(out.dtype.element_ty),
                 mask=values)  # fmt: skip
        all_gone = tl.sum(decay, 0)
        later = key * tl.exp(all_gone - gone)[:, None]
        held = held * tl.exp(all_gone) + tl.dot(tl.trans(later), new, input_precision="tf32x3")
    tl.store(places, held, mask=there)


class TritonDeltaOps(DeltaOps):
    """The operations on a GPU."""

    def convolve(self, inputs: Tensor, weight: Tensor, window: Tensor, rows: StepRows) -> Tensor:
        assert inputs.stride(1) == 1 and window.stride()[1:] == (window.shape[2], 1)
        total, channels = inputs.shape
        count = len(rows.slots)
        row_of = rows.offsets  # of one token a row they are the rows' numbers
        if total != count:
            tokens = torch.arange(total, device=inputs.device)
            row_of = (torch.searchsorted(rows.offsets, tokens, right=True) - 1).clamp_(max=count - 1)
        out = inputs.new_empty(total, channels)
        blocks = triton.cdiv(channels, CHANNELS)
        sizes = channels, inputs.stride(0), window.stride(0)
        constants = {"WIDTH": weight.shape[1], "BLOCK": CHANNELS}
        _convolve_kernel[total, blocks](
            inputs, weight, window, rows.slots, rows.offsets, row_of, out, *sizes, **constants
        )
        _window_kernel[count, blocks](inputs, window, rows.slots, rows.offsets, *sizes, **constants)
        return out

    def delta_rule(self, mixed: Tensor, gates: DeltaGates, heads: DeltaHeads, memory: Tensor, rows: StepRows) -> Tensor:
        assert mixed.stride(1) == 1 and gates.beta.stride() == gates.step.stride()
        assert memory[0].is_contiguous()  # lines are a stride apart: those of other layers lie between
        out = mixed.new_empty(len(mixed), heads.value, heads.value_dim)
        count = len(rows.slots)
        constants = {
            "SHARED": heads.value // heads.key,
            "KEY": heads.key_dim,
            "VALUE": heads.value_dim,
            "KEYS": max(16, triton.next_power_of_2(heads.key_dim)),
            "VALUES": VALUES,
            "SMALL": SMALL,
        }
        grid = count, heads.value, triton.cdiv(heads.value_dim, VALUES)
        sizes = mixed.stride(0), gates.beta.stride(0), heads.value, heads.key_dim**-0.5, memory.stride(0)
        if len(mixed) == count:
            _step_kernel[grid](mixed, *gates, memory, rows.slots, out, *sizes, **constants)
        else:
            constants["TOKENS"] = TOKENS
            _chunks_kernel[grid](
                mixed, *gates, memory, rows.slots, rows.offsets, out, *sizes, **constants, num_warps=WARPS
            )
        return out
