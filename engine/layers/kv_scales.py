"""Scales of an FP8 KV cache: what is written is divided by them, and attention gives the same as without.

    query·k_scale   key/k_scale   value/v_scale ──> pages, attention ──> output·v_scale

So backends know nothing of them. A scale is rounded up to a power of two: then neither products nor quotients are
rounded, in any type, and what is lost is lost to FP8 alone; as its numbers are floating point, it is as precise as with
the checkpoint's own scale. For the same reason one scale does for all heads: the largest. Where heads are normed, the
key's goes into the weights of the norms.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.dense.reference import HeadNorms, Heads

FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class KVScales:
    """What one layer multiplies with."""

    columns: Tensor | None  # [(query + 2 * kv) * dim], of qkv
    norms: HeadNorms | None  # in the place of the layer's own
    value: float

    @classmethod
    def of(cls, key: float, value: float, heads: Heads, norms: HeadNorms | None, like: Tensor) -> "KVScales | None":
        """From a checkpoint's scales; None where they change nothing. Columns are of the type and on the device of
        `like`."""
        key, value = power_of_two(key), power_of_two(value)
        if key == value == 1.0:
            return None
        query_factor, key_factor = (key, 1.0 / key) if norms is None else (1.0, 1.0)
        sizes = [heads.query * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim]
        factors = [query_factor, key_factor, 1.0 / value]
        columns = torch.cat([like.new_full((size,), factor) for size, factor in zip(sizes, factors, strict=True)])
        if norms is not None:
            norms = HeadNorms(norms.query * key, norms.key / key, norms.epsilon)
        return cls(columns if any(factor != 1.0 for factor in factors) else None, norms, value)

    def before(self, qkv: Tensor, norms: HeadNorms | None) -> tuple[Tensor, HeadNorms | None]:
        """`qkv`, which may be written over, and the norms of its heads, scaled."""
        return qkv if self.columns is None else qkv.mul_(self.columns), self.norms or norms

    def after(self, attended: Tensor) -> Tensor:
        return attended if self.value == 1.0 else attended.mul_(self.value)


def power_of_two(scale: float) -> float:
    """The least power of two that is not below `scale`."""
    return float(2.0 ** math.ceil(math.log2(scale)))
