"""Root-mean-square normalisation."""

import torch
from torch import Tensor

from engine.layers.build import Build
from engine.layers.model import Layer, empty_weight
from engine.plugin.specs import LazyTensor


class RMSNorm(Layer):
    """RMSNorm (arXiv:1910.07467) over the last dimension; `epsilon` is added to the mean square.

    `offset` is added to the weight as it is loaded, which is then kept in float32: some models store weight - 1.
    """

    def __init__(self, build: Build, size: int, epsilon: float, offset: float = 0.0) -> None:
        super().__init__()
        self.kernels = build.kernels
        self.weight = empty_weight(build, size, dtype=torch.float32 if offset else None)
        self.epsilon = epsilon
        self.offset = offset

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., size] in and out; the mean square is taken in float32."""
        return self.kernels.dense.rms_norm(hidden, self.weight, self.epsilon)

    def add(self, hidden: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of `hidden` + `stream`, and that sum: the stream as it goes on. Neither may be used afterwards."""
        if stream is None:
            return self(hidden), hidden
        return self.kernels.dense.add_rms_norm(hidden, stream, self.weight, self.epsilon)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        super().load(name, parameter, part, tensor)
        if self.offset:
            self.weight.add_(self.offset)
