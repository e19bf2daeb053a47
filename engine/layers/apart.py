"""Experts that a checkpoint keeps in one tensor of all, read as if each had its own.

    experts.gate_up_proj [count, 2 * inner, size] ──> experts.0.gate_proj.weight [inner, size], experts.0.up_proj.weight
    experts.down_proj    [count, size, inner]     ──> experts.0.down_proj.weight [size, inner], experts.1.…

Some have inputs before outputs: [count, size, 2 * inner] and [count, inner, size]. Scales, `gate_up_proj_scale_inv` or
`gate_up_proj_scale`, lie as their matrices do. Nothing is read before it is wanted, so a rank reads its own experts.
Left out: scales of activations, scales without a dimension for outputs.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from engine.errors import ConfigError
from engine.plugin.specs import LazyTensor

TOGETHER = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?(|_scale_inv|_scale)\Z")


def experts_apart(
    tensors: Iterable[tuple[str, LazyTensor]], count: int, size: int, inner: int
) -> Iterator[tuple[str, LazyTensor]]:
    """`tensors`, and in the place of each that has the matrices of `count` experts between `size` and `inner`, one for
    each of them. Raises ConfigError for one of another shape."""
    all_of_them = list(tensors)
    matrices = {"gate_up_proj": (count, 2 * inner, size), "down_proj": (count, size, inner)}
    found = [(TOGETHER.match(name), tensor) for name, tensor in all_of_them]
    turned = False
    for match, tensor in found:
        if match is not None and not match[3]:
            straight = matrices[match[2]]
            if tuple(tensor.shape) not in (straight, (count, straight[2], straight[1])):
                raise ConfigError(
                    f"weight {match[0]} has shape {tuple(tensor.shape)} in the checkpoint, but its configuration calls "
                    f"for {straight}, or for the last two the other way round: the two do not belong together"
                )
            turned |= tuple(tensor.shape) != straight  # of one kind of matrix the two may be alike
    for (name, tensor), (match, _) in zip(all_of_them, found, strict=True):
        if match is None:
            yield name, tensor
        else:
            yield from _each(match, tensor, count, turned)


def _each(match: re.Match[str], tensor: LazyTensor, count: int, turned: bool) -> Iterator[tuple[str, LazyTensor]]:
    path, parts = match[1], ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
    if len(tensor.shape) != 3 or tensor.shape[0] != count or tensor.shape[2 if turned else 1] % len(parts):
        raise ConfigError(
            f"{match[0]} has shape {tuple(tensor.shape)} in the checkpoint; scales of {count} experts have three "
            "dimensions, of experts, outputs and inputs, and gate and up have as many outputs each"
        )
    rows = tensor.shape[2 if turned else 1] // len(parts)
    for expert in range(count):
        for place, part in enumerate(parts):
            yield f"{path}.{expert}.{part}.weight{match[3]}", OneOf(tensor, expert, place * rows, rows, turned)


@dataclass(frozen=True, slots=True)
class OneOf:
    """`rows` of an expert's matrix from `first` on, as a tensor not read yet; `turned`, they are columns there."""

    tensor: LazyTensor
    expert: int
    first: int
    rows: int
    turned: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.tensor.shape[1 if self.turned else 2]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """[rows, columns]"""
        both = (*(index if isinstance(index, tuple) else (index,)), slice(None))[:2]
        begin, end, _ = both[0].indices(self.rows)
        rows, expert = slice(self.first + begin, self.first + end), slice(self.expert, self.expert + 1)
        if self.turned:
            return self.tensor[expert, both[1], rows][0].T
        return self.tensor[expert, rows, both[1]][0]
