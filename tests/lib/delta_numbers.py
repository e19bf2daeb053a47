"""Steps of the gated delta rule, and what they give by its definition, token by token in float64."""

from typing import NamedTuple

import numpy as np
import torch
from kernel_numbers import DEVICE
from torch import Tensor

from engine.kernels.delta.reference import DeltaGates, DeltaHeads, DeltaOps, StepRows

HEADS = DeltaHeads(2, 4, 10, 7)
CHANNELS = 2 * 2 * 10 + 4 * 7
WIDTH = 4
LINES = 8


class Kept(NamedTuple):
    """States of requests, which steps go on from."""

    window: Tensor
    memory: Tensor

    def copy(self, kind: torch.dtype) -> "Kept":
        return Kept(self.window.to(kind, copy=True), self.memory.to(kind, copy=True))


def kept() -> Kept:
    generator = torch.Generator().manual_seed(1)
    window = torch.randn(LINES, 3, WIDTH - 1, CHANNELS, generator=generator)
    memory = torch.randn(LINES, 3, HEADS.value, HEADS.key_dim, HEADS.value_dim, generator=generator)
    return Kept(window.to(DEVICE)[:, 1], memory.to(DEVICE)[:, 1])  # of a layer between two others


class Numbers:
    """The inputs of a step whose rows have these lengths, and the lines that they go on from."""

    def __init__(self, lengths: list[int], slots: list[int], seed: int = 0, alike: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        total = sum(lengths)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        wide = random(1 if alike else total, CHANNELS + 5).expand(total, -1).contiguous()
        self.inputs, self.weight = wide[:, :CHANNELS], random(CHANNELS, WIDTH)  # rows that lie apart
        gates = random(total, 2 * HEADS.value) + (5 if alike else 0)
        step = gates[:, HEADS.value :] - (12 if alike else 0)  # beta near 1, and nothing decays
        gates[:, HEADS.value :] = step
        self.gates = DeltaGates(*gates.chunk(2, 1), random(HEADS.value).abs(), random(HEADS.value))
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        self.rows = StepRows(
            torch.tensor(slots, device=DEVICE), torch.from_numpy(offsets).to(DEVICE), np.array(lengths, np.int64)
        )

    def by(self, ops: DeltaOps, states: Kept) -> Tensor:
        mixed = ops.convolve(self.inputs, self.weight, states.window, self.rows)
        return ops.delta_rule(mixed, self.gates, HEADS, states.memory, self.rows)

    def defined(self, states: Kept) -> Tensor:
        """By the definition, in float64; `states` are of that type."""
        out = torch.zeros(len(self.inputs), HEADS.value, HEADS.value_dim, dtype=torch.float64, device=DEVICE)
        inputs, weight = self.inputs.double(), self.weight.double()
        beta, step, rate, bias = (each.double() for each in self.gates)
        decay = torch.exp(-rate.exp() * torch.nn.functional.softplus(step + bias))
        offsets = self.rows.offsets.tolist()
        for row, slot in enumerate(self.rows.slots.tolist()):
            for token in range(offsets[row], offsets[row + 1]):
                seen = torch.cat((states.window[slot], inputs[token, None]))
                states.window[slot] = seen[1:]
                mixed = torch.nn.functional.silu((seen * weight.T).sum(0))
                query, key, value = mixed.split([20, 20, 28])
                query, key = (each.view(2, 10).repeat_interleave(2, 0) for each in (query, key))
                query, key = (each / (each.square().sum(1, keepdim=True) + 1e-6).sqrt() for each in (query, key))
                memory = states.memory[slot]
                memory *= decay[token, :, None, None]
                known = torch.einsum("hk,hkv->hv", key, memory)
                new = (value.view(4, 7) - known) * beta[token].sigmoid()[:, None]
                memory += torch.einsum("hk,hv->hkv", key, new)
                out[token] = torch.einsum("hk,hkv->hv", query, memory) / 10**0.5
        return out


def check(ops: DeltaOps, steps: list[Numbers], tolerance: float) -> None:
    """Outputs and states after each of `steps`, one after the other, are those of the definition, and lines of other
    requests stay as they are."""
    ours = kept()
    theirs, before = ours.copy(torch.float64), ours.copy(torch.float32)
    for numbers in steps:
        wanted = numbers.defined(theirs)
        torch.testing.assert_close(numbers.by(ops, ours).double(), wanted, atol=tolerance, rtol=tolerance)
        for got, state in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got.double(), state, atol=tolerance, rtol=tolerance)
        assert wanted.abs().max() > 0.1
    used = {slot for numbers in steps for slot in numbers.rows.slots.tolist()}
    for line in set(range(LINES)) - used:
        assert all(torch.equal(now[line], then[line]) for now, then in zip(ours, before, strict=True))
