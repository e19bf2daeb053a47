"""Root-mean-square normalisation, and the older one that subtracts the mean."""

import torch
from torch import Tensor
from torch.nn import functional

from engine.layers.build import Build
from engine.layers.model import Layer, empty_weight
from engine.parallel.collectives import sum_add_norm
from engine.plugin.specs import LazyTensor


class RMSNorm(Layer):
    """RMSNorm (arXiv:1910.07467) over the last dimension; `epsilon` is added to the mean square.

    `offset` is added to the weight as it is loaded, which is then kept in float32: some models store weight - 1. One
    that `sums` is told a part of a sum by `add`, on each of the ranks that share attention.
    """

    def __init__(self, build: Build, size: int, epsilon: float, offset: float = 0.0, *, sums: bool = False) -> None:
        super().__init__()
        self.kernels = build.kernels
        self.weight = empty_weight(build, size, dtype=torch.float32 if offset else None)
        self.epsilon = epsilon
        self.offset = offset
        self.group = build.group("attention_tp")
        self.sums = sums and self.group.size > 1

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., size] in and out; the mean square is taken in float32."""
        return self.kernels.dense.rms_norm(hidden, self.weight, self.epsilon)

    def add(self, hidden: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of `hidden` + `stream`, and that sum: the stream as it goes on. Neither may be used afterwards.

        If this one `sums`, `hidden` is first summed over the ranks, unless there is no stream yet."""
        if stream is None:
            return self(hidden), hidden
        if self.sums:
            ops = self.kernels.dense
            return sum_add_norm(hidden, stream, self.weight, self.epsilon, group=self.group, ops=ops)
        return self.kernels.dense.add_rms_norm(hidden, stream, self.weight, self.epsilon)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        super().load(name, parameter, part, tensor)
        if self.offset:
            self.weight.add_(self.offset)


class LayerNorm(Layer):
    """Layer normalisation (arXiv:1607.06450) of [..., size]."""

    def __init__(self, build: Build, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = empty_weight(build, size)
        self.bias = empty_weight(build, size)
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.epsilon)

    def add(self, hidden: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """As RMSNorm.add: the norm of `hidden` + `stream`, and that sum."""
        stream = hidden if stream is None else stream.add_(hidden)
        return self(stream), stream
