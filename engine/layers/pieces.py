"""Parts of a checkpoint's tensors as tensors of their own, not read yet: for checkpoints that stack what layers divide.

    q_proj  query 0 │ gate 0 │ query 1 │ gate 1      -> q_proj  query 0 │ query 1      gate_proj  gate 0 │ gate 1

A model whose checkpoints do so says it in `stacked`, and loads the parts in the place of the whole. Scales of a
quantization divide as it says (`Scheme.divided`). Left out: columns.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.plugin.specs import LazyTensor

Ranges = Sequence[tuple[int, int]]  # of rows, one after the other: the first, and how many
# By a module of checkpoints (parent.module): the modules that it stacks, which lie beside it here, and their rows in it
Stacks = Mapping[str, Mapping[str, Ranges]]
Index = slice | tuple[slice, ...]


def divided(name: str, tensor: LazyTensor, parts: Mapping[str, Ranges]) -> Iterator[tuple[str, LazyTensor]]:
    """`tensor`, called `name` in the checkpoint (path.module.weight), as those of the modules `parts` in the place of
    its own, each of these rows. Raises ConfigError when it has other rows than they."""
    rows = rows_of(parts)
    if tensor.shape[0] != rows:
        raise ConfigError(
            f"weight {name} has shape {tuple(tensor.shape)} in the checkpoint, but its configuration "
            f"calls for {rows} rows: the two do not belong together"
        )
    for part, ranges in parts.items():
        yield beside(name, part), Rows(tensor, ranges)


def rows_of(parts: Mapping[str, Ranges]) -> int:
    """How many rows all of them have together."""
    return sum(count for ranges in parts.values() for _, count in ranges)


def beside(name: str, part: str) -> str:
    """What a tensor called `name` in the checkpoint (path.module.X) is called in the module `part` beside its own."""
    path, _, end = name.rpartition(".")
    return f"{path.rpartition('.')[0]}.{part}.{end}"


def one_after_the_other(sizes: Mapping[str, int]) -> dict[str, Ranges]:
    """The `parts` of a tensor in which modules of so many rows lie one below the other."""
    ends = np.cumsum(list(sizes.values())).tolist()
    return {part: [(end - size, size)] for (part, size), end in zip(sizes.items(), ends, strict=True)}


class Rows:
    """The rows `ranges` of a tensor not read yet, end to end, as a tensor not read yet."""

    def __init__(self, tensor: LazyTensor, ranges: Ranges) -> None:
        self._tensor = tensor
        self._ranges = ranges
        self.shape = (sum(count for _, count in ranges), *tensor.shape[1:])

    def __getitem__(self, index: Index) -> Tensor:
        rows, *others = index if isinstance(index, tuple) else (index,)
        found = [self._tensor[(part, *others)] for part in self._within(rows)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def packed(self, rows: slice, columns: slice) -> tuple[str, np.ndarray] | None:
        """The blocks of some of the rows as they are stored, where the tensor has such and they lie together."""
        packed, parts = getattr(self._tensor, "packed", None), list(self._within(rows))
        found: tuple[str, np.ndarray] | None = None
        if packed is not None and len(parts) == 1:
            found = packed(parts[0], columns)
        return found

    def _within(self, rows: slice) -> Iterator[slice]:
        """The same rows, as the tensor counts them."""
        begin, end, _ = rows.indices(self.shape[0])
        for first, count in self._ranges:
            low, high = max(begin, 0), min(end, count)
            if low < high:
                yield slice(first + low, first + high)
            begin, end = begin - count, end - count
