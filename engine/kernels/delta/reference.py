"""The gated delta rule in plain torch: a memory of fixed size in the place of keys and values that grow (Gated
DeltaNet, Yang et al. 2024, arXiv:2412.06464), and the short convolution before it.

    memory = decay * memory            of a head, [key numbers, value numbers], float32
    memory += key ⊗ beta * (value - keyᵀ memory)
    output = queryᵀ memory

Rows of one token take that step. Those of more are computed in chunks: within a chunk all tokens are known, so what
each adds to the memory is the solution of a triangular system, and only from chunk to chunk there is an order. Chunks
of all rows are computed together. A row goes on from what its line of the memory holds, and leaves it there.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

CHUNK = 64  # tokens: the system of a chunk is of as many equations
SMALL = 1e-6  # added to the square of a key's length before it is divided by


class DeltaHeads(NamedTuple):
    """How [T, 2 * key * key_dim + value * value_dim] divides: query heads, as many key heads, value heads.

    Each query and key head serves value / key value heads that lie side by side."""

    key: int
    value: int
    key_dim: int
    value_dim: int


class DeltaGates(NamedTuple):
    """What a token's gates are made of: its own `beta` and `step` [T, value heads], and of each head, float32, the
    logarithm of a rate and a bias [value heads].

    The memory decays by exp(-exp(rate) * softplus(step + bias)), and takes up sigmoid(beta) of what is new."""

    beta: Tensor
    step: Tensor
    rate: Tensor
    bias: Tensor


class StepRows(NamedTuple):
    """The rows of a step: their lines in what is kept of requests, where their tokens begin, and how many these are on
    the host. Where as many tokens as rows come, each row has one, and the host's numbers are not read."""

    slots: Tensor  # [R] int64
    offsets: Tensor  # [R + 1] int64
    lengths: NDArray[np.int64]  # [R], or empty in a captured step


class _Inputs(NamedTuple):
    """Of T tokens, float32: query, key [T, value heads, key_dim], value [T, value heads, value_dim], the logarithm of
    the decay, and beta [T, value heads]."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor


class DeltaOps:
    """The operations in torch."""

    def convolve(self, inputs: Tensor, weight: Tensor, window: Tensor, rows: StepRows) -> Tensor:
        """silu of the sum over a channel's last W inputs, its own the last, times `weight` [C, W]: [T, C] to [T, C].

        `window` [lines, W - 1, C] holds the inputs before each row's first, and then those before what follows."""
        before, count, total = weight.shape[1] - 1, len(rows.slots), len(inputs)
        numbers = torch.arange(count, device=inputs.device)
        if total == count:
            seen = torch.cat((window[rows.slots], inputs[:, None].to(window.dtype)), dim=1)
            window[rows.slots] = seen[:, 1:]
            out = (seen.to(torch.float32) * weight.T.to(torch.float32)).sum(1)
            return functional.silu(out).to(inputs.dtype)
        # Each row's tokens stand behind what its window held.
        tokens = torch.arange(total, device=inputs.device)
        row = (torch.searchsorted(rows.offsets, tokens, right=True) - 1).clamp_(max=count - 1)
        places = tokens + (row + 1) * before
        lead = torch.arange(before, device=inputs.device)
        seen = window.new_empty(total + count * before, window.shape[2])
        seen[places] = inputs.to(window.dtype)
        seen[(rows.offsets[:-1] + numbers * before)[:, None] + lead] = window[rows.slots]
        window[rows.slots] = seen[(rows.offsets[1:] + numbers * before)[:, None] + lead]
        out = inputs.new_zeros(inputs.shape, dtype=torch.float32)
        for ago in range(before + 1):
            out += seen[places - ago] * weight[:, before - ago].to(torch.float32)
        return functional.silu(out).to(inputs.dtype)

    def delta_rule(self, mixed: Tensor, gates: DeltaGates, heads: DeltaHeads, memory: Tensor, rows: StepRows) -> Tensor:
        """The outputs [T, value heads, value_dim] of `mixed` [T, ...], which divides as `heads` says: queries and keys
        are divided by their lengths, queries by the root of key_dim as well. `memory` [lines, value heads, key_dim,
        value_dim] float32 goes on."""
        inputs = _inputs(mixed, gates, heads)
        if len(mixed) == len(rows.slots):
            return _one_token(inputs, memory, rows.slots).to(mixed.dtype)
        out = torch.empty_like(inputs.value)
        for single, which, tokens in _kinds(rows.lengths):
            slots = rows.slots[torch.from_numpy(which).to(mixed.device)]
            at = torch.from_numpy(tokens).to(mixed.device)
            own = _Inputs(*(each[at] for each in inputs))
            out[at] = _one_token(own, memory, slots) if single else _chunks(own, memory, slots, rows.lengths[which])
        return out.to(mixed.dtype)


def _inputs(mixed: Tensor, gates: DeltaGates, heads: DeltaHeads) -> _Inputs:
    width = heads.key * heads.key_dim
    query, key, value = mixed.to(torch.float32).split([width, width, heads.value * heads.value_dim], dim=1)
    query, key = (each.unflatten(1, (heads.key, heads.key_dim)) for each in (query, key))
    query, key = (each * torch.rsqrt((each * each).sum(-1, keepdim=True) + SMALL) for each in (query, key))
    each = heads.value // heads.key
    query, key = query.repeat_interleave(each, dim=1) * heads.key_dim**-0.5, key.repeat_interleave(each, dim=1)
    decay = -gates.rate.exp() * functional.softplus(gates.step.to(torch.float32) + gates.bias)
    beta = gates.beta.to(torch.float32).sigmoid()
    return _Inputs(query, key, value.unflatten(1, (heads.value, heads.value_dim)), decay, beta)


def _kinds(lengths: NDArray[np.int64]) -> Iterator[tuple[bool, NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of one token, then those of more, where there are such: whether it is those, their numbers, and the numbers
    of their tokens."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    for single in (True, False):
        own = (lengths == 1) == single
        if own.any():
            yield single, np.flatnonzero(own), np.flatnonzero(own[row])


def _one_token(inputs: _Inputs, memory: Tensor, slots: Tensor) -> Tensor:
    """The outputs of rows of one token each."""
    held = memory[slots] * inputs.decay.exp()[..., None, None]
    known = torch.einsum("rhk,rhkv->rhv", inputs.key, held)
    new = (inputs.value - known) * inputs.beta[..., None]
    held += inputs.key[..., None] * new[..., None, :]
    memory[slots] = held
    return torch.einsum("rhk,rhkv->rhv", inputs.query, held)


def _chunks(inputs: _Inputs, memory: Tensor, slots: Tensor, lengths: NDArray[np.int64]) -> Tensor:
    """The outputs of rows of so many tokens each, end to end."""
    size = min(CHUNK, 1 << int(lengths.max() - 1).bit_length())
    counts = -(-lengths // size)
    firsts = np.cumsum(counts) - counts  # chunks of rows before
    begun = np.cumsum(lengths) - lengths
    places = torch.from_numpy(np.arange(lengths.sum()) + np.repeat(firsts * size - begun, lengths)).to(slots.device)

    def chunked(numbers: Tensor) -> Tensor:  # [T, heads, ...] to [chunks, heads, size, ...]: no token is all zeros
        whole = numbers.new_zeros(int(counts.sum()) * size, *numbers.shape[1:])
        whole[places] = numbers
        return whole.unflatten(0, (-1, size)).transpose(1, 2)

    query, key, value, decay, beta = map(chunked, inputs)
    # The logarithm of what is left, of what was there before the chunk, at each token. It adds up to hundreds, and its
    # differences count: in float32 these would err more than all else together.
    gone = decay.cumsum(-1, dtype=torch.float64)
    unseen = torch.ones(size, size, dtype=torch.bool, device=slots.device).triu(1)
    between = (gone[..., :, None] - gone[..., None, :]).to(torch.float32).masked_fill_(unseen, -torch.inf).exp_()
    left, ahead = gone.exp().to(torch.float32), (gone[..., -1:] - gone).exp().to(torch.float32)
    weighed = key * beta[..., None]
    system = (weighed @ key.mT) * between
    known = torch.cat((value * beta[..., None], weighed * left[..., None]), dim=-1)
    # What each token adds, if the memory were empty, and what that falls short by what the memory knows of its key.
    added, forgotten = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True).split(
        [value.shape[-1], key.shape[-1]], dim=-1
    )
    within = (query @ key.mT) * between
    query, key = query * left[..., None], key * ahead[..., None]
    left = left[..., -1:, None]

    order = np.argsort(-counts, kind="stable")
    lines = slots[torch.from_numpy(order).to(slots.device)]
    held, out = memory[lines], torch.empty_like(value)
    for number in range(int(counts.max())):
        rows = int((counts > number).sum())  # those that have such a chunk are the first ones
        at = torch.from_numpy(firsts[order[:rows]] + number).to(slots.device)
        new = added[at] - forgotten[at] @ held[:rows]
        out[at] = query[at] @ held[:rows] + within[at] @ new
        held[:rows] = held[:rows] * left[at] + key[at].mT @ new
    memory[lines] = held
    return out.transpose(1, 2).flatten(0, 1)[places]
