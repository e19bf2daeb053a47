"""The seam between layers with matrices and a quantization: how a plugin stores matrices, loads and multiplies them.

    Linear, Experts ── scheme.linear, .experts ──> tensors of their own, loaded under the checkpoint's names
                 └─ forward ─────────────────────> quantized.linear(inputs, bias), quantized.weights() for the kernels

A layer learns its name in the checkpoint after it is constructed, and only then is it known whether the scheme takes
it: until then its weight is on the device `meta`, which takes no memory. A stacked layer is quantized whole or not at
all. Of matrices that are divided over ranks, each rank stores its part. Left out: embeddings.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from engine.kernels.experts.reference import ExpertWeights
from engine.plugin.specs import LazyTensor


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank holds of matrices that lie one below the other: these `rows` of each, by its name, and `columns`."""

    rows: Mapping[str, slice]
    columns: slice

    @classmethod
    def whole(cls, sizes: Mapping[str, int], inputs: int) -> "Shard":
        """All of matrices of so many rows."""
        return cls({part: slice(0, size) for part, size in sizes.items()}, slice(0, inputs))

    def rows_of(self, part: str) -> int:
        """How many rows of that matrix."""
        rows = self.rows[part]
        return int(rows.stop - rows.start)

    @property
    def inputs(self) -> int:
        """How many columns."""
        return int(self.columns.stop - self.columns.start)


class Quantized(ABC):
    """The weights of one layer. `tensors` become parameters of the layer.

    What belongs to a weight may go by several names in checkpoints: `suffixes` has the ends of those names."""

    tensors: Mapping[str, nn.Parameter]
    suffixes: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    optional: frozenset[str] = frozenset()  # of `tensors`: those that a checkpoint need not have
    ignored: tuple[str, ...] = ()  # names of tensors that a checkpoint may have, and that are of no use

    @abstractmethod
    def loaded(self, path: str) -> bool:
        """Called once, when all tensors are loaded. True if the layer, which is at `path`, shall keep a dense weight
        instead: its device cannot multiply what is stored. Raises ConfigError when something is missing."""

    @abstractmethod
    def fill_at_random(self, generator: torch.Generator) -> None:
        """Weights of deviation 0.02."""


class QuantizedLinear(Quantized):
    """Matrices one below the other, of as many columns; `tensors` has `weight`. `suffixes` is by names in `tensors`.

    Of K columns and N rows those of this rank are meant."""

    @abstractmethod
    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        """Takes `tensor`, called `name` in the checkpoint, into that part of `tensors[parameter]`; a weight that is not
        quantized becomes so. Raises ConfigError for a shape that does not fit."""

    @abstractmethod
    def linear(self, inputs: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
        """[T, K] to [T, N]; with `gated`, of silu(gate) * up of inputs [T, 2 * K]."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] that it stands for."""


class QuantizedExperts(Quantized):
    """The matrices of all experts. `tensors` has `gate_up` and `down`, and what belongs to them, `gate_up_X` and
    `down_X`. `suffixes` is by X."""

    @abstractmethod
    def load(self, name: str, parameter: str, expert: int, half: int, tensor: LazyTensor) -> None:
        """As QuantizedLinear's; `half` is 0 for gate and down, 1 for up."""

    @abstractmethod
    def weights(self, dtype: torch.dtype | None = None) -> ExpertWeights:
        """As the kernels take them; or those that they stand for, in `dtype`."""
