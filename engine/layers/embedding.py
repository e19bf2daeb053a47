"""From token ids to vectors and back to logits."""

from torch import Tensor, nn

from engine.kernels.types import PackedMatrix
from engine.layers.build import Build
from engine.layers.linear import ColumnLinear, packed_rows
from engine.layers.model import Layer, check_shape, empty_weight
from engine.plugin.specs import LazyTensor


class Embedding(Layer):
    """A table of one vector a token. Every rank holds it whole; on a CPU it stays packed if the checkpoint's is."""

    def __init__(self, build: Build, vocab_size: int, size: int) -> None:
        super().__init__()
        self.kernels = build.kernels
        self.weight = empty_weight(build, vocab_size, size)
        self.matrix: PackedMatrix | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` [T] int64 to [T, size]."""
        if self.matrix is not None:
            return self.matrix.select(ids)
        return nn.functional.embedding(ids, self.weight)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        packed = packed_rows(self.kernels.dense, tensor, 1)
        if packed is None:
            return super().load(name, parameter, part, tensor)
        check_shape(name, tensor, tuple(self.weight.shape))
        (self.matrix,) = self.kernels.dense.matrices([packed])
        self.register_buffer("packed", self.matrix.data)
        self.weight = nn.Parameter(self.weight.new_empty(0, self.weight.shape[1]), requires_grad=False)


class LMHead(ColumnLinear):
    """From hidden states to logits. `tied` shares the matrix of that embedding instead of having its own."""

    def __init__(self, build: Build, size: int, vocab_size: int, tied: Embedding | None = None) -> None:
        super().__init__(build, size, vocab_size if tied is None else 0, quantizable=False)
        self._tied = (tied,) if tied is not None else ()  # in a tuple: it is not a part of this module
        if tied is not None:
            self.weight = tied.weight

    def loaded(self) -> None:
        super().loaded()
        for embedding in self._tied:
            self.weight = embedding.weight
            self.matrices = (embedding.matrix,) if embedding.matrix is not None else ()

    def forward(self, hidden: Tensor) -> Tensor:
        """[S, size] to logits [S, vocab_size]."""
        return super().forward(hidden)
