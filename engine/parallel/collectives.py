"""What the ranks of a group do together. Alone, a rank does nothing, and torch.distributed is not imported.

All ranks of a group must make the same calls in the same order, with tensors of the same shape and type; sums are the
same on all of them, bit for bit. On a GPU they may be part of a CUDA graph. Left out: reductions of our own for few
numbers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from engine.parallel.progress import PROGRESS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Group:
    """This rank's group along one axis: its ranks, this one's place among them, and how they talk; None where they
    have not joined, as in a model that is built and loaded but not run."""

    ranks: tuple[int, ...]
    place: int
    process_group: "ProcessGroup | None" = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    def joined(self) -> "ProcessGroup":
        assert self.process_group is not None, f"ranks {self.ranks} have not joined (engine.parallel.groups.join)"
        return self.process_group


def all_reduce(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the group's ranks, in place."""
    if group.size > 1:
        import torch.distributed as distributed

        with PROGRESS.inside("all_reduce"):
            distributed.all_reduce(tensor, group=group.joined())
    return tensor


def all_gather(tensor: Tensor, group: Group, dim: int = 0) -> Tensor:
    """The tensors of all ranks, one after the other along `dim`: of [a, b], [ranks * a, b] or [a, ranks * b]."""
    if group.size == 1:
        return tensor
    import torch.distributed as distributed

    tensor = tensor.contiguous()
    stacked = tensor.new_empty(group.size, *tensor.shape)
    # torch 2.13 gives the same call another name, and warns of the first
    gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)
    with PROGRESS.inside("all_gather"):
        gather(stacked.flatten(0, 1), tensor, group=group.joined())
    return stacked.flatten(0, 1) if dim == 0 else stacked.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(tensor: Tensor, group: Group) -> Tensor:
    """Of the sum over the group's ranks this rank's part: of [ranks * a, ...], [a, ...]."""
    if group.size == 1:
        return tensor
    import torch.distributed as distributed

    assert tensor.shape[0] % group.size == 0, f"{tensor.shape[0]} rows do not divide over {group.size} ranks"
    out = tensor.new_empty(tensor.shape[0] // group.size, *tensor.shape[1:])
    with PROGRESS.inside("reduce_scatter"):
        distributed.reduce_scatter_tensor(out, tensor.contiguous(), group=group.joined())
    return out


def broadcast(tensor: Tensor, group: Group, source: int = 0) -> Tensor:
    """What the rank in place `source` of the group has, in place."""
    if group.size > 1:
        import torch.distributed as distributed

        with PROGRESS.inside("broadcast"):
            distributed.broadcast(tensor, src=group.ranks[source], group=group.joined())
    return tensor
