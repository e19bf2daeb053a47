"""Gated activations, on the stacked output of a gate-up projection."""

import torch
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU (arXiv:2002.05202): silu(gate) * up. `gate_up` [T, 2 * I] holds both halves; returns [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
