"""Types that kernels share with layers and with each other, and that belong to no one folder."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Packed = tuple[str, NDArray[np.uint8]]  # rows of a matrix: the kind of their blocks, and [rows, bytes of a row]


class Prefix(NamedTuple):
    """Rows of a step whose contexts begin with the same pages: their indices, ascending, and how many positions of
    them are the same, whole pages all."""

    rows: np.ndarray
    positions: int


class PackedMatrix(Protocol):
    """A weight matrix [rows, inputs] in the blocks of its file.

    What is computed with it is what would be computed with the float32 matrix that it unpacks to, exactly.
    """

    kind: str
    data: Tensor  # uint8 [rows, bytes of a row]
    rows: int
    inputs: int

    def linear(self, inputs: Tensor, out: Tensor) -> None:
        """`inputs` [T, inputs], dense, times the transposed matrix into `out` [T, rows], whose rows may be strided."""

    def select(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T] int64, as [T, inputs]."""

    def unpacked(self) -> Tensor:
        """The whole matrix, [rows, inputs]."""
