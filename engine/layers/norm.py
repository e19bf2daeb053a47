"""Root-mean-square normalisation."""

from torch import Tensor, nn

from engine.layers.build import Build
from engine.layers.model import Layer, empty_weight


class RMSNorm(Layer):
    """RMSNorm (arXiv:1910.07467) over the last dimension; `epsilon` is added to the mean square."""

    def __init__(self, build: Build, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = empty_weight(build, size)
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [T, size] in and out; the mean square is taken in float32."""
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)
