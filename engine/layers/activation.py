"""Gated activations, on the stacked output of a gate-up projection."""

from collections.abc import Callable

from torch import Tensor

from engine.errors import ConfigError
from engine.layers.build import Build


def gated_activation(build: Build, name: str) -> Callable[[Tensor], Tensor]:
    """By its name in config.json: `silu_and_mul` or `gelu_and_mul` of the build's kernels.

    Raises ConfigError for one that is not known."""
    dense = build.kernels.dense
    known = {"silu": dense.silu_and_mul, "swish": dense.silu_and_mul, "gelu_pytorch_tanh": dense.gelu_and_mul}
    if name not in known:
        raise ConfigError(f"the activation {name!r} is not supported; known are {', '.join(known)}")
    return known[name]
