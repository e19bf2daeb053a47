"""From token ids to vectors and back to logits."""

import torch
from torch import Tensor, nn

from engine.layers.build import Build
from engine.layers.linear import ColumnLinear
from engine.layers.model import Layer, empty_weight


class Embedding(Layer):
    """A table of one vector a token. Every rank holds it whole."""

    def __init__(self, build: Build, vocab_size: int, size: int) -> None:
        super().__init__()
        self.weight = empty_weight(build, vocab_size, size)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` [T] int64 to [T, size]."""
        return nn.functional.embedding(ids, self.weight)


class LMHead(ColumnLinear):
    """From hidden states to logits. `tied` shares the matrix of that embedding instead of having its own."""

    def __init__(self, build: Build, size: int, vocab_size: int, tied: Embedding | None = None) -> None:
        super().__init__(build, size, vocab_size if tied is None else 0)
        if tied is not None:
            self.weight = tied.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[S, size] to float32 logits [S, vocab_size]."""
        return super().forward(hidden).to(torch.float32)
