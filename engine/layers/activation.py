"""Gated activations, on the stacked output of a gate-up projection."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import gelu, silu

from engine.errors import ConfigError
from engine.kernels.cpu import kernels_for


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU (arXiv:2002.05202): silu(gate) * up. `gate_up` [T, 2 * I] holds both halves; returns [T, I]."""
    if kernels := kernels_for(gate_up):
        return kernels.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """GeGLU, with the approximation of gelu by tanh. Shapes as `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate, approximate="tanh").mul_(up)


def gated_activation(name: str) -> Callable[[Tensor], Tensor]:
    """By its name in config.json. Raises ConfigError for one that is not known."""
    known = {"silu": silu_and_mul, "swish": silu_and_mul, "gelu_pytorch_tanh": gelu_and_mul}
    if name not in known:
        raise ConfigError(f"the activation {name!r} is not supported; known are {', '.join(known)}")
    return known[name]
