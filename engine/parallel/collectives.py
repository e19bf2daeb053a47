"""What the ranks of a group do together. Alone, a rank does nothing, and torch.distributed is not imported.

All ranks of a group must make the same calls in the same order, with tensors of the same shape and type; sums are the
same on all of them, bit for bit. On a GPU they may be part of a CUDA graph. Where a group has `peers`, small sums take
a kernel of our own (peers.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from engine.kernels.dense.reference import Ops
from engine.parallel.progress import PROGRESS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Peers(Protocol):
    """What sums in the place of the process group, where it is faster (peers.py). All ranks are told the same."""

    def sum(self, part: Tensor) -> bool:
        """Sums `part` [T, size] over the ranks, in place; False where that is left to the process group."""
        ...

    def sum_add_norm(self, part: Tensor, stream: Tensor, weight: Tensor, epsilon: float) -> bool:
        """Adds the sum of the ranks' `part` [T, size] to `stream` and puts the norm of that in the place of `part`;
        False as `sum`."""
        ...

    def choose(
        self, found: tuple[Tensor, Tensor], slots: Tensor, lasts: Tensor, tokens: Tensor, lengths: Tensor
    ) -> Tensor | None:
        """The best of the scores and ids [S, chunks] that each rank has `found`, ids [S] int64, as
        kernels/collectives/draw.py says; None as `sum`."""
        ...

    def started(self) -> None:
        """All that compiles has compiled: from now on a rank that waits for long waits in vain."""
        ...

    def check(self, ranks: Sequence[int]) -> None:
        """Raises EngineError where this one of `ranks` has waited for another in vain. Waits for nothing itself."""
        ...


@dataclass(frozen=True, slots=True)
class Group:
    """This rank's group along one axis: its ranks, this one's place among them, and how they talk; None where they
    have not joined, as in a model that is built and loaded but not run."""

    ranks: tuple[int, ...]
    place: int
    process_group: "ProcessGroup | None" = None
    peers: Peers | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    def joined(self) -> "ProcessGroup":
        assert self.process_group is not None, f"ranks {self.ranks} have not joined (engine.parallel.groups.join)"
        return self.process_group


@dataclass(frozen=True, slots=True)
class Divided:
    """This rank's `part` of `size` things, which the ranks of a group divide."""

    part: slice
    size: int
    group: Group


def all_reduce(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the group's ranks, in place."""
    if group.size > 1 and not (group.peers is not None and group.peers.sum(tensor)):
        import torch.distributed as distributed

        with PROGRESS.inside("all_reduce"):
            distributed.all_reduce(tensor, group=group.joined())
    return tensor


def largest(tensor: Tensor, group: Group) -> Tensor:
    """The largest over the group's ranks of each number, in place."""
    if group.size > 1:
        import torch.distributed as distributed

        with PROGRESS.inside("all_reduce"):
            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=group.joined())
    return tensor


def sum_add_norm(
    part: Tensor, stream: Tensor, weight: Tensor, epsilon: float, *, group: Group, ops: Ops
) -> tuple[Tensor, Tensor]:
    """(rms_norm of the sum, the sum) of `stream` [T, size] and the `part` [T, size] of each rank of the group. May
    write over both arguments."""
    if group.peers is not None and group.peers.sum_add_norm(part, stream, weight, epsilon):
        return part, stream
    return ops.add_rms_norm(all_reduce(part, group), stream, weight, epsilon)


def all_gather(tensor: Tensor, group: Group, dim: int = 0) -> Tensor:
    """The tensors of all ranks, one after the other along `dim`: of [a, b], [ranks * a, b] or [a, ranks * b]."""
    if group.size == 1:
        return tensor
    import torch.distributed as distributed

    tensor = tensor.contiguous()
    stacked = tensor.new_empty(group.size, *tensor.shape)
    # torch 2.13 gives the same call another name, and warns of the first; so below
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
    scatter = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)
    with PROGRESS.inside("reduce_scatter"):
        scatter(out, tensor.contiguous(), group=group.joined())
    return out


def broadcast(tensor: Tensor, group: Group, source: int = 0) -> Tensor:
    """What the rank in place `source` of the group has, in place."""
    if group.size > 1:
        import torch.distributed as distributed

        with PROGRESS.inside("broadcast"):
            distributed.broadcast(tensor, src=group.ranks[source], group=group.joined())
    return tensor
