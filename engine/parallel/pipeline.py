"""What passes between the stages of a pipeline: hidden states forwards, drawn tokens back.

    stage 0 ── hidden ──> stage 1 ── hidden ──> stage 2      each rank to the rank of its own place in the next stage
       ^ ^───────────────── tokens ──────────────┘           the last stage draws, and tells each other stage
       └───── tokens ──────┘ (from the last one too)

All sends are asynchronous: what is sent is kept until it has gone, and nobody waits for it. What is received has a
shape that both ends know from the plan of the step, and comes in the order of the steps. Each direction has process
groups of two ranks of its own, because operations of one group run in order on a GPU: a send that waits for its peer
must not hold up what comes from there. Left out: who needs what when (engine/worker/steps/stage.py).
"""

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.messages.step import steps_in_flight
from engine.parallel.collectives import Group
from engine.parallel.groups import Groups
from engine.parallel.progress import PROGRESS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

Pair = tuple[int, int]


@dataclass(slots=True)
class Coming:
    """A tensor that is on its way here from rank `peer`."""

    tensor: Tensor
    peer: int
    work: "Work"

    def wait(self) -> Tensor:
        """The tensor, once it is here; on a GPU, for what is queued there from now on."""
        with PROGRESS.inside(f"receive from rank {self.peer}"):
            self.work.wait()
        return self.tensor


class Pipeline:
    """This rank's ends of the links to other stages."""

    def __init__(
        self, rank: int, group: Group, forwards: "dict[Pair, ProcessGroup]", back: "dict[Pair, ProcessGroup]"
    ) -> None:
        self.group = group  # of the ranks in this one's place of each stage
        self._forwards, self._back = forwards, back
        self._rank = rank
        self._sent: deque[tuple[Tensor, Work]] = deque()
        # Of as many steps as are in flight at most. What is older has been received, as the step has ended.
        sends = self.group.size - 1 if self.last else 1
        self._kept = sends * steps_in_flight(self.group.size)

    @property
    def first(self) -> bool:
        return self.group.place == 0

    @property
    def last(self) -> bool:
        return self.group.place == self.group.size - 1

    def send_hidden(self, hidden: Tensor) -> None:
        """To the next stage. Nobody may write to `hidden` any more."""
        peer = self.group.ranks[self.group.place + 1]
        self._send(hidden.contiguous(), peer, self._forwards[self._rank, peer])

    def hidden(self, like: Tensor) -> Coming:
        """From the stage before, in the place of `like`."""
        peer = self.group.ranks[self.group.place - 1]
        return _receive(like, peer, self._forwards[peer, self._rank])

    def send_tokens(self, tokens: Tensor) -> None:
        """From the last stage to each other one. Nobody may write to `tokens` any more."""
        for peer in self.group.ranks[:-1]:
            self._send(tokens.contiguous(), peer, self._back[peer, self._rank])

    def tokens(self, like: Tensor) -> Coming:
        """What the last stage drew, in the place of `like`."""
        peer = self.group.ranks[-1]
        return _receive(like, peer, self._back[self._rank, peer])

    def gathered(self, own: object) -> list[Any]:
        """What each stage gives, in their order: all ranks call this between the same two steps. Waits for them."""
        import torch.distributed as distributed

        found: list[Any] = [None] * self.group.size
        distributed.all_gather_object(found, own, group=self.group.joined())
        return found

    def _send(self, tensor: Tensor, peer: int, group: "ProcessGroup") -> None:
        import torch.distributed as distributed

        work = distributed.isend(tensor, dst=peer, group=group)
        assert work is not None, "this rank is in the group"
        self._sent.append((tensor, work))
        while len(self._sent) > self._kept:
            with PROGRESS.inside("send to another stage"):
                self._sent.popleft()[1].wait()


def _receive(like: Tensor, peer: int, group: "ProcessGroup") -> Coming:
    import torch.distributed as distributed

    work = distributed.irecv(like, src=peer, group=group)
    assert work is not None, "this rank is in the group"
    return Coming(like, peer, work)


def join_stages(groups: Groups) -> Pipeline | None:
    """The links of this rank, once all have joined; None where there is one stage. All ranks must call it together."""
    mesh = groups.mesh
    if mesh.pp == 1:
        return None
    import torch.distributed as distributed

    links: tuple[dict[Pair, ProcessGroup], dict[Pair, ProcessGroup]] = ({}, {})
    for ranks in mesh.groups("pp"):  # each rank makes all groups, in one order, as torch wants it
        for made, pairs in zip(links, (pairwise(ranks), _to_last(ranks)), strict=True):
            for pair in pairs:
                made[pair] = distributed.new_group(list(pair))
    return Pipeline(mesh.rank, groups.along("pp"), *links)


def _to_last(ranks: tuple[int, ...]) -> list[Pair]:
    return [(rank, ranks[-1]) for rank in ranks[:-1]]
