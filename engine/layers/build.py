"""What a model is built with: where, in which type, on which rank, with which attention and quantization.

Layers ask it for their share of a dimension, so models never see a rank.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import ConfigError
from engine.kernels import KernelSet, choose
from engine.layers.attention import AttentionBackend, AttentionShape, Backend
from engine.layers.latent import LatentBackend, LatentShape
from engine.layers.pieces import Ranges
from engine.layers.quantization import QuantizedExperts, QuantizedLinear, Shard
from engine.parallel.collectives import Group
from engine.parallel.groups import Groups
from engine.parallel.mesh import ALONE, Axis, Mesh
from engine.parallel.ways import Ways
from engine.plugin.specs import LazyTensor


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
    mesh: Mesh = ALONE
    groups: Groups | None = None  # where the ranks of `mesh` have joined; a model can be built and loaded without
    kv_dtype: torch.dtype | None = None  # of the KV cache; by default `dtype`
    quantization: "Scheme | None" = None  # how matrices are stored; by default in `dtype`
    redundant_experts: int = 0  # copies of experts that each mixture has beside them, over all ranks
    ways: Ways | None = None  # by which tokens reach experts of other ranks; None where these are given all tokens
    deferred: bool = False  # weights take no memory, on the device `meta`, until `Model.load` or `Model.allocate`
    kernels: KernelSet = None  # type: ignore[assignment]  # by default the fastest for `dtype` on `device`

    def __post_init__(self) -> None:
        if self.kernels is None:
            object.__setattr__(self, "kernels", choose(self.device, self.dtype))

    def group(self, axis: Axis = "tp") -> Group:
        """The ranks that share a dimension which is divided along `axis`."""
        return (self.groups or Groups.apart(self.mesh)).along(axis)

    def share(self, size: int, axis: Axis = "tp", what: str = "numbers") -> slice:
        """This rank's part of a dimension that is divided evenly. Raises ConfigError where it does not divide; `what`
        names the dimension in it."""
        return self.mesh.share(size, axis, what)

    def local(self, size: int, axis: Axis = "tp", what: str = "numbers") -> int:
        """How much of a divided dimension this rank holds. Raises ConfigError as `share`."""
        share = self.share(size, axis, what)
        return share.stop - share.start

    def query_heads(self, heads: int) -> slice:
        """Those of the model's query heads that this rank computes."""
        return self.share(heads, "attention_tp", "query heads")

    def kv_heads(self, heads: int) -> slice:
        """Those of the model's key-value heads that this rank's query heads attend to: where there are fewer than
        ranks, several have the same one."""
        return self.mesh.repeated_share(heads, "attention_tp", "key-value heads")

    def stage(self, layers: int) -> range:
        """Those of the model's layers that this rank holds. Raises ConfigError where there are more stages."""
        return self.mesh.stage(layers)

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
            query_heads=_count(self.query_heads(query_heads)),
            kv_heads=_count(self.kv_heads(kv_heads)),
            head_dim=head_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            window=window if window is not None and window < self.max_model_len else None,
            kv_dtype=self.kv_dtype,
        )
        backend = self.attention_backend(shape, self.page_size, self.device, self.dtype, self.kernels)
        assert isinstance(backend, AttentionBackend), f"{backend} is not for attention of heads"
        return backend

    def latent_attention(self, shape: LatentShape) -> LatentBackend:
        """The backend that serves the latent attention of `shape`, whose heads are the whole model's."""
        heads = _count(self.query_heads(shape.query_heads))
        shape = dataclasses.replace(shape, query_heads=heads, kv_dtype=self.kv_dtype)
        backend = self.attention_backend(shape, self.page_size, self.device, self.dtype, self.kernels)
        assert isinstance(backend, LatentBackend), f"{backend} is not for latent attention"
        return backend


def _count(share: slice) -> int:
    return int(share.stop - share.start)


class Scheme(ABC):
    """A quantization as a plugin provides it: constructed once, then asked by every layer that has matrices."""

    def __init__(self, terms: Mapping[str, Any] | None) -> None:  # noqa: B027
        """`terms` are config.json's `quantization_config`; None where it has none, and weights are to be quantized.

        Raises ConfigError for what would run and be wrong."""

    @abstractmethod
    def takes(self, path: str) -> bool:
        """Whether the module at `path` in the checkpoint is quantized."""

    @abstractmethod
    def linear(self, build: Build, parts: Mapping[str, int], inputs: int, shard: Shard) -> QuantizedLinear:
        """The storage of `shard` of a layer with so many rows in each of its parts, in the whole model.

        Raises ConfigError for one that cannot be stored so: a block that has one scale may lie on two ranks."""

    @abstractmethod
    def experts(self, build: Build, count: int, size: int, inner: int, share: slice) -> QuantizedExperts:
        """The storage of `count` gated MLPs between `size` and `inner`, of the latter's numbers `share` alone: rows of
        gate and up, columns of down. Raises ConfigError as `linear`."""

    def divided(self, name: str, tensor: LazyTensor, parts: Mapping[str, Ranges]) -> Iterator[tuple[str, LazyTensor]]:
        """`tensor`, called `name` in the checkpoint, as those of the modules `parts` beside its own, which are these
        rows of the matrix that it belongs to: scales, or numbers that are packed. What is called `weight` or `bias`
        divides by its own rows, and does not come here.

        Raises ConfigError for one that cannot be divided so, and by default for all."""
        raise ConfigError(
            f"{name} belongs to a matrix that stacks {', '.join(parts)}, and the quantization {type(self).__name__} "
            "does not divide such; take a checkpoint that leaves this module as it is"
        )
