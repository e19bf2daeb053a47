"""Gated activations, on the stacked output of a gate-up projection."""

from collections.abc import Callable

from torch import Tensor

from engine.errors import ConfigError
from engine.kernels import ops_for


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As `Ops.silu_and_mul`."""
    return ops_for(gate_up).silu_and_mul(gate_up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """As `Ops.gelu_and_mul`."""
    return ops_for(gate_up).gelu_and_mul(gate_up)


def gated_activation(name: str) -> Callable[[Tensor], Tensor]:
    """By its name in config.json. Raises ConfigError for one that is not known."""
    known = {"silu": silu_and_mul, "swish": silu_and_mul, "gelu_pytorch_tanh": gelu_and_mul}
    if name not in known:
        raise ConfigError(f"the activation {name!r} is not supported; known are {', '.join(known)}")
    return known[name]
