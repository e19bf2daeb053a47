"""What a model is built with: where, in which type, on which rank, with which attention and quantization.

Layers ask it for their share of a dimension, so models never see a rank. Left out until tensor
parallelism comes: process groups; `world` is 1.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.kernels import KernelSet, choose
from engine.layers.attention import AttentionBackend, AttentionShape, Backend
from engine.layers.latent import LatentBackend, LatentShape
from engine.layers.quantization import QuantizedExperts, QuantizedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """The context that every layer's constructor takes first.

    `max_model_len` is the longest sequence that will be asked of the model, in tokens.
    """

    dtype: torch.dtype
    device: torch.device
    page_size: int
    max_model_len: int
    attention_backend: Callable[..., Backend]  # a backend class, or what chooses one for a shape
    rank: int = 0
    world: int = 1
    kv_dtype: torch.dtype | None = None  # of the KV cache; by default `dtype`
    quantization: "Scheme | None" = None  # how matrices are stored; by default in `dtype`
    deferred: bool = False  # weights take no memory, on the device `meta`, until `Model.load` or `Model.allocate`
    kernels: KernelSet = None  # type: ignore[assignment]  # by default the fastest for `dtype` on `device`

    def __post_init__(self) -> None:
        if self.kernels is None:
            object.__setattr__(self, "kernels", choose(self.device, self.dtype))

    def share(self, size: int) -> slice:
        """This rank's part of a dimension that is divided evenly over the ranks."""
        assert size % self.world == 0, f"{size} does not divide over {self.world} ranks"
        part = size // self.world
        return slice(self.rank * part, (self.rank + 1) * part)

    def local(self, size: int) -> int:
        """How much of a divided dimension this rank holds."""
        share = self.share(size)
        return share.stop - share.start

    def attention(
        self,
        layers: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float | None = None,
        window: int | None = None,
    ) -> AttentionBackend:
        """The backend that serves `layers` attention layers of this shape (head counts of the whole model).

        `scale` multiplies the scores; by default head_dim ** -0.5. A `window` that holds the longest sequence is none.
        """
        shape = AttentionShape(
            layers=layers,
            query_heads=self.local(query_heads),
            kv_heads=self.local(kv_heads),
            head_dim=head_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            window=window if window is not None and window < self.max_model_len else None,
            kv_dtype=self.kv_dtype,
        )
        backend = self.attention_backend(shape, self.page_size, self.device, self.dtype)
        assert isinstance(backend, AttentionBackend), f"{backend} is not for attention of heads"
        backend.kernels = self.kernels
        return backend

    def latent_attention(self, shape: LatentShape) -> LatentBackend:
        """The backend that serves the latent attention of `shape`, whose heads are the whole model's."""
        shape = dataclasses.replace(shape, query_heads=self.local(shape.query_heads), kv_dtype=self.kv_dtype)
        backend = self.attention_backend(shape, self.page_size, self.device, self.dtype)
        assert isinstance(backend, LatentBackend), f"{backend} is not for latent attention"
        backend.kernels = self.kernels
        return backend


class Scheme(ABC):
    """A quantization as a plugin provides it: constructed once, then asked by every layer that has matrices."""

    def __init__(self, terms: Mapping[str, Any] | None) -> None:  # noqa: B027
        """`terms` are config.json's `quantization_config`; None where it has none, and weights are to be quantized.

        Raises ConfigError for what would run and be wrong."""

    @abstractmethod
    def takes(self, path: str) -> bool:
        """Whether the module at `path` in the checkpoint is quantized."""

    @abstractmethod
    def linear(self, build: Build, parts: Mapping[str, int], inputs: int) -> QuantizedLinear:
        """The storage of a layer with so many rows in each of its parts."""

    @abstractmethod
    def experts(self, build: Build, count: int, size: int, inner: int) -> QuantizedExperts:
        """The storage of `count` gated MLPs between `size` and `inner`."""
