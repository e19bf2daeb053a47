"""How ranks find each other: torch.distributed under a rendezvous of the caller, with a process group for each axis.

On GPUs they talk through NCCL, on CPUs through gloo. A rank that is alone joins nothing, and torch.distributed is not
imported. Left out: watching that a collective ends.
"""

import dataclasses
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from engine.errors import ConfigError
from engine.parallel.collectives import Group, Peers
from engine.parallel.mesh import AXES, Axis, Mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

SECONDS = 600.0  # that a rank waits for the others: they load their weights meanwhile
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one rank, by axis."""

    mesh: Mesh
    by_axis: Mapping[Axis, Group]
    device: torch.device = CPU
    moves: Group | None = None  # the ranks of `ep` again, for weights that move beside the steps

    @classmethod
    def apart(cls, mesh: Mesh) -> "Groups":
        """Of a rank that has not joined the others, if there are any."""
        return cls(mesh, {axis: _group(mesh, axis, None) for axis in AXES})

    def along(self, axis: Axis) -> Group:
        return self.by_axis[axis]

    def with_peers(self, axis: Axis, peers: Peers | None) -> "Groups":
        """The same, whose sums along `axis`, and along what has the same ranks, may go through `peers`."""
        ranks = self.along(axis).ranks
        changed = {
            other: dataclasses.replace(group, peers=peers) if group.ranks == ranks else group
            for other, group in self.by_axis.items()
        }
        return dataclasses.replace(self, by_axis=changed)

    def least(self, number: int) -> int:
        """The least that any rank gives. All ranks must call this, in the same order among their collectives."""
        if self.mesh.size == 1:
            return number
        import torch.distributed as distributed

        found = torch.tensor([number], device=self.device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MIN)
        return int(found)

    def slowest(self, times: torch.Tensor) -> torch.Tensor:
        """The largest of each of `times` that any rank gives, in place. Called as `least`."""
        if self.mesh.size > 1:
            import torch.distributed as distributed

            distributed.all_reduce(times, op=distributed.ReduceOp.MAX)
        return times

    def started(self) -> None:
        """All that compiles has compiled: from now on a wait that is long is in vain."""
        for group in self.by_axis.values():
            if group.peers is not None:
                group.peers.started()

    def check(self) -> None:
        """Raises EngineError where this rank has waited for another in vain."""
        for group in self.by_axis.values():
            if group.peers is not None:
                group.peers.check(group.ranks)

    def leave(self) -> None:
        """Ends the connections to the other ranks. Nothing may be under way.

        Whoever calls this ends by `os._exit`: a thread of gloo may still be about to give a tensor back to Python, and
        aborts the process where the interpreter has begun to end (seen with torch 2.13.0)."""
        if self.mesh.size > 1:
            import torch.distributed as distributed

            distributed.destroy_process_group()


def join(mesh: Mesh, rendezvous: str, device: torch.device = CPU, seconds: float = SECONDS) -> Groups:
    """Waits for all ranks of `mesh` at `rendezvous`: "tcp://host:port", where rank 0 listens, or "file:///path", a file
    that does not exist yet in a folder that all see. Called once a process.

    `seconds` are how long to wait, here and in collectives. Raises ConfigError where the others do not come."""
    if mesh.size == 1:
        return Groups.apart(mesh)
    import torch.distributed as distributed

    on_gpu = device.type == "cuda"
    try:
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=_store(rendezvous, mesh, timedelta(seconds=seconds)),
            rank=mesh.rank,
            world_size=mesh.size,
            timeout=timedelta(seconds=seconds),
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:  # torch has no narrower one for all that can fail here
        raise ConfigError(f"rank {mesh.rank} of {mesh.size} cannot join the others at {rendezvous}: {error}") from error
    made: dict[tuple[int, ...], ProcessGroup] = {}
    for axis in AXES:  # each rank makes all groups, in one order, as torch wants it; equal ones are made once
        for ranks in mesh.groups(axis):
            if len(ranks) > 1 and ranks not in made:
                everybody = len(ranks) == mesh.size
                group = distributed.group.WORLD if everybody else distributed.new_group(list(ranks))
                assert group is not None
                made[ranks] = group
    by_axis = {axis: _group(mesh, axis, made.get(mesh.group(axis))) for axis in AXES}
    return Groups(mesh, by_axis, device, _moves(mesh, device) if mesh.ep > 1 else None)


def _moves(mesh: Mesh, device: torch.device) -> Group:
    """A process group of its own for what goes on beside steps, whose collectives must not wait for it."""
    import torch.distributed as distributed

    own: ProcessGroup | None = None
    for ranks in mesh.groups("ep"):
        made = distributed.new_group(list(ranks))
        own = made if mesh.rank in ranks else own
    group = _group(mesh, "ep", own)
    # NCCL connects two ranks when they first send to each other, which holds up whatever waits for that.
    operations = []
    for peer in (rank for rank in group.ranks if rank != mesh.rank):
        operations.append(distributed.P2POp(distributed.isend, torch.zeros(1, device=device), peer, own))
        operations.append(distributed.P2POp(distributed.irecv, torch.zeros(1, device=device), peer, own))
    for work in distributed.batch_isend_irecv(operations):
        work.wait()
    return group


def _store(rendezvous: str, mesh: Mesh, timeout: timedelta) -> "Store":
    """Opened here, as torch reads a URL: it would cut a path at "#" or "?", listen on all interfaces of a host, and
    heed variables of who has started us."""
    import torch.distributed as distributed

    kind, _, where = rendezvous.partition("://")
    if kind == "file":
        return distributed.FileStore(where, mesh.size)
    host, _, port = where.rpartition(":")
    if mesh.rank:
        return distributed.TCPStore(host, int(port), mesh.size, is_master=False, timeout=timeout)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # who has chosen the port keeps it by such a socket
    listening.bind((host, int(port)))
    listening.listen()
    return distributed.TCPStore(
        host, int(port), mesh.size, is_master=True, timeout=timeout, master_listen_fd=listening.detach()
    )


def _group(mesh: Mesh, axis: Axis, process_group: "ProcessGroup | None") -> Group:
    return Group(mesh.group(axis), mesh.coordinates[axis], process_group)
