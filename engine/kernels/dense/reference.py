"""What stands between a model's matrices and its attention, in plain torch: the definition of every such operation.

The implementations are C on a CPU (engine/kernels/cpu/calls.py) and Triton on a GPU (triton.py). Each of them overrides
what it does better, and is tested against this one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.types import Packed, PackedMatrix


class Heads(NamedTuple):
    """How a projection [T, (query + 2 * kv) * dim] divides: query heads, then as many of keys as of values."""

    query: int
    kv: int
    dim: int


class HeadNorms(NamedTuple):
    """RMSNorm weights [dim] that each query and each key head passes before it is rotated."""

    query: Tensor
    key: Tensor
    epsilon: float


class LatentNorm(NamedTuple):
    """RMSNorm weight [latent_dim] that the first numbers of a latent pass."""

    weight: Tensor
    epsilon: float


Rotation = tuple[Tensor, Tensor]  # cosines and sines [T, 1, pairs]: dimension i turns with i + pairs


class Ops:
    """The operations in torch. All take and return tensors of one device; sums are taken in float32.

    `packed_kinds` are GGUF's names of the block types that `matrices` takes: none, in torch."""

    packed_kinds: frozenset[str] = frozenset()

    def matrices(self, parts: Sequence[Packed]) -> tuple[PackedMatrix, ...]:
        """`parts`, one below the other, as weights that are multiplied by as they are packed in their file: neighbours
        of one kind, one of `packed_kinds`, are one matrix."""
        raise NotImplementedError(f"no products with blocks of {parts[0][0]}")

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y = x Wᵀ + b: `inputs` [T, K], `weight` [N, K], `bias` [N] to [T, N]."""
        return functional.linear(inputs, weight, bias)

    def rms_norm(self, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMSNorm (arXiv:1910.07467) of `hidden` [..., size] over its last dimension, in its type."""
        normed = functional.rms_norm(hidden.to(weight.dtype), weight.shape, weight, epsilon)
        return normed.to(hidden.dtype)

    def add_rms_norm(self, hidden: Tensor, stream: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """(rms_norm of the sum, the sum `hidden` + `stream`), each [T, size]. May write over both arguments."""
        stream = stream + hidden
        return self.rms_norm(stream, weight, epsilon), stream

    def linear_silu(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`silu_and_mul` of `linear`: `weight` [2 * I, K] is gate and up, one above the other; returns [T, I]."""
        return self.silu_and_mul(self.linear(inputs, weight, bias))

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """SwiGLU (arXiv:2002.05202): silu(gate) * up. `gate_up` [T, 2 * I] holds both halves; returns [T, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        """GeGLU, with the approximation of gelu by tanh. Shapes as `silu_and_mul`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh").mul_(up)

    def rotation(self, positions: Tensor, frequencies: Tensor, magnitude: float) -> Rotation:
        """Cosines and sines of `positions` [T] int64 times `frequencies` [pairs], times `magnitude`; float32."""
        angles = positions[:, None, None].to(torch.float32) * frequencies
        cosines, sines = angles.cos(), angles.sin()
        return (cosines, sines) if magnitude == 1.0 else (cosines * magnitude, sines * magnitude)

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Rotates `heads` [T, heads, dim] (RoFormer, arXiv:2104.09864); dimensions past 2 * pairs stay. May work in
        place."""
        cosines, sines = rotation
        half = cosines.shape[-1]
        first, second = heads[..., :half], heads[..., half : 2 * half]
        parts = [first * cosines - second * sines, second * cosines + first * sines]
        if 2 * half < heads.shape[-1]:
            parts.append(heads[..., 2 * half :])
        return torch.cat(parts, dim=-1)

    def rotate_heads(
        self, qkv: Tensor, heads: Heads, norms: HeadNorms | None, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Divides `qkv` [T, (query + 2 * kv) * dim] into query [T, query, dim] and key, value [T, kv, dim]; norms, then
        rotates query and key. May write over `qkv` and return views of it."""
        parts = qkv.view(qkv.shape[0], -1, heads.dim).split([heads.query, heads.kv, heads.kv], dim=1)
        query, key, value = parts
        if norms is not None:
            query = self.rms_norm(query, norms.query, norms.epsilon)
            key = self.rms_norm(key, norms.key, norms.epsilon)
        if rotation is not None:
            query, key = self.rotate(query, rotation), self.rotate(key, rotation)
        return query, key, value

    def rotate_into_pages(
        self,
        qkv: Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        cache: Tensor,
        places: Tensor,
    ) -> Tensor:
        """`rotate_heads`, then `write_pages` of key and value; returns the query [T, query, dim]."""
        query, key, value = self.rotate_heads(qkv, heads, norms, rotation)
        self.write_pages(key, value, cache, places)
        return query

    def write_pages(self, key: Tensor, value: Tensor, cache: Tensor, places: Tensor) -> None:
        """Puts `key` and `value` [T, kv, dim] at `places` [T] int64 (page * page_size + offset) of `cache`
        [pages, 2, page_size, kv, dim], rounded to its type; FP8 takes what is out of its range as its largest."""
        page_size = cache.shape[2]
        pages, offsets = places // page_size, places % page_size
        if cache.dtype.itemsize == 1:  # where torch makes NaN of what is out of range
            most = torch.finfo(cache.dtype).max
            key, value = key.clamp(-most, most), value.clamp(-most, most)
        cache[pages, 0, offsets] = key.to(cache.dtype)
        cache[pages, 1, offsets] = value.to(cache.dtype)

    def latent_into_pages(
        self,
        query: Tensor,
        latents: Tensor,
        norm: LatentNorm,
        rotation: Rotation,
        interleaved: bool,
        cache: Tensor,
        places: Tensor,
    ) -> None:
        """What latent attention needs before it attends, in place: norms the first numbers of `latents` [T, width],
        rotates the others and the last ones of each head of `query` [T, heads, dim], and puts the latents at `places`
        [T] int64 of `cache` [pages, page_size, width], rounded to its type.

        If `interleaved`, dimensions 2i and 2i + 1 turn together, else i and i + pairs."""
        size, pairs = len(norm.weight), rotation[0].shape[-1]
        latents[:, :size] = self.rms_norm(latents[:, :size], norm.weight, norm.epsilon)
        for part in (latents[:, None, size:], query[..., -2 * pairs :]):
            halves = part.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if interleaved else part
            turned = self.rotate(halves, rotation)
            part.copy_(turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if interleaved else turned)
        write_latents(latents, cache, places)

    def multiply_heads(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Each head by a matrix of its own: `inputs` [T, heads, K], `weight` [heads, K, N] to [T, heads, N]."""
        out = inputs.new_empty(*inputs.shape[:2], weight.shape[2])
        torch.bmm(inputs.transpose(0, 1), weight, out=out.transpose(0, 1))
        return out


def write_latents(latents: Tensor, cache: Tensor, places: Tensor) -> None:
    """Puts `latents` [T, width] at `places` [T] of `cache` [pages, page_size, width], rounded to its type."""
    pages, offsets = places // cache.shape[1], places % cache.shape[1]
    if cache.dtype == torch.float8_e4m3fn:
        most = torch.finfo(cache.dtype).max
        cache.view(torch.uint8)[pages, offsets] = latents.clamp(-most, most).to(cache.dtype).view(torch.uint8)
    else:
        cache[pages, offsets] = latents.to(cache.dtype)
