"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the scalings that stretch it.

Angles are computed once a step, in float32, from positions: no table, so no length limit. Left out:
partial rotation, yarn, longrope, multi-axis positions.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.layers.build import Build


class Rotary(nn.Module):
    """Turns positions into the cosines and sines that `rotate` applies to queries and keys.

    Reads `rope_theta` and `rope_scaling` of config.json, or `rope_parameters` which holds both (the
    form of transformers 5). Raises ConfigError for a rope type it does not know.
    """

    def __init__(self, build: Build, config: Mapping[str, Any], head_dim: int) -> None:
        super().__init__()
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = scaling.get("rope_theta", config.get("rope_theta")) or 10000.0
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        known = {"default": lambda frequencies, _: frequencies, "linear": _linear, "llama3": _llama3}
        if kind not in known:
            raise ConfigError(f"rope type {kind!r} is not supported; this model class knows {', '.join(known)}")
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = known[kind](1.0 / theta**exponents, scaling)
        self.frequencies = frequencies.to(build.device)  # [head_dim / 2]
        self.dtype = build.dtype

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions` [T] to (cosines, sines), each [T, 1, head_dim / 2]."""
        angles = positions[:, None, None].to(torch.float32) * self.frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates `heads` [T, heads, head_dim], where dimension i pairs with i + head_dim / 2 (as Hugging Face)."""
    cosines, sines = rotation
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def _linear(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Position interpolation (arXiv:2306.15595)."""
    return frequencies / scaling["factor"]


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the trained length
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / factor
