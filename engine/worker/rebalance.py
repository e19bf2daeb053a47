"""Experts move between ranks while requests run, one layer after the other.

    step n    what was counted is uneven: all layers wait
    step n+1  the first: its new arrangement; weights leave for room beside the slots, on a stream of their own
    step n+3  they have come: copied into the slots, and the table of places says so; the next layer's leave

Everything follows from counts, which all ranks of a stage read alike, and from the number of steps. So all ranks decide
and change the same at the same step, and nobody asks another. A step reads either the old arrangement or the new one.
Where it is the new one, the same experts do the same for each token on another rank: replies differ by rounding at
most. A layer that would gain little stays as it is. Left out: arrangements that weigh what moving costs against what it
gains.
"""

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import counted
from engine.layers.model import Model
from engine.layers.moe import Experts
from engine.options.parallel import ParallelOptions
from engine.parallel.balance import balanced, gain
from engine.parallel.placement import Move, Placement, arranged, imbalance, moves, rank_loads
from engine.parallel.progress import PROGRESS

if TYPE_CHECKING:
    from torch.distributed import Work

logger = logging.getLogger("engine.worker")

THRESHOLD = 1.2  # where there are copies and nothing else is said
LEAST_GAIN = 0.05  # of the work of a layer's busiest rank
STEPS = 2  # from where a layer's weights leave to where they are used
Counts = NDArray[np.int64]  # [layers, experts]


@dataclass(slots=True)
class Moving:
    """A layer whose weights are on their way: what comes into which slot of this rank, and when it is used."""

    layer: Experts
    placement: Placement
    coming: list[tuple[int, list[Tensor]]]
    works: "list[Work]"
    left: "torch.cuda.Event | None"
    steps: int = STEPS


class Rebalancer:
    """The mixtures of this rank, in order, and when and how their experts move."""

    def __init__(self, layers: list[Experts], options: ParallelOptions) -> None:
        self._layers = [layer for layer in layers if layer.build.mesh.ep > 1]
        usual = THRESHOLD if options.redundant_experts else float("inf")
        self._threshold = options.rebalance_threshold or usual
        self._least = options.rebalance_tokens
        self._seen: Counts | None = None  # since experts were last found even, or moved
        self._tokens = 0.0
        self._waiting: deque[tuple[Experts, NDArray[np.int64]]] = deque()
        self._moving: Moving | None = None
        self._stream: torch.cuda.Stream | None = None
        self.moved = 0

    @property
    def waiting(self) -> int:
        """Layers that are still to be looked at, or on their way."""
        return len(self._waiting) + (self._moving is not None)

    @property
    def divided(self) -> bool:
        """Whether experts lie on several ranks."""
        return bool(self._layers)

    def observe(self, counts: Counts, tokens: float) -> None:
        """Some steps of so many tokens chose `counts`: if experts are uneven by now, they are going to move."""
        if not self._layers or self.waiting:
            return
        self._seen = counts if self._seen is None else self._seen + counts
        self._tokens += tokens
        if self._tokens < self._least:
            return
        pairs = zip(self._seen, self._layers, strict=True)
        even = float(np.mean([imbalance(rank_loads(line, layer.placement)) for line, layer in pairs]))
        if even > self._threshold:
            logger.info("the busiest rank has %.2f times the mean load: experts move where that gains enough", even)
            self.begin(self._seen)
        self._seen, self._tokens = None, 0.0

    def begin(self, counts: Counts) -> None:
        """From the next step on, layers are arranged for `counts`, which all ranks give alike."""
        assert not self.waiting
        self._waiting.extend(zip(self._layers, counts, strict=True))

    @torch.inference_mode()
    def step(self) -> None:
        """Called before each step is launched, on all ranks at the same one."""
        if self._moving is not None:
            self._moving.steps -= 1
            if not self._moving.steps:
                self._use(self._moving)
                self._moving = None
        if self._waiting and self._moving is None:  # one a step: to arrange it may take some milliseconds
            self._moving = self._send(*self._waiting.popleft())

    # ── one layer ────────────────────────────────────────────────────────────────────────────

    def _send(self, layer: Experts, counts: NDArray[np.int64]) -> Moving | None:
        """Has the weights of `layer` leave for where they belong by `counts`; None where it may stay as it is."""
        old = layer.placement
        new = balanced(counts, *old.shape)
        if gain(counts, old, new) < LEAST_GAIN:
            return None
        new = arranged(old, new)
        if (stream := self._side_stream(layer)) is None:
            coming, works = transfer(layer, moves(old, new))
            return Moving(layer, new, coming, works, None)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            coming, works = transfer(layer, moves(old, new))
            for work in works:
                work.wait()  # of this stream, not of the host
            left = torch.cuda.Event()
            left.record()
        return Moving(layer, new, coming, [], left)

    def _side_stream(self, layer: Experts) -> torch.cuda.Stream | None:
        if layer.build.device.type != "cuda":
            return None
        self._stream = self._stream or torch.cuda.Stream(layer.build.device)
        return self._stream

    def _use(self, moving: Moving) -> None:
        """What has come is in its slots, and choices go there, from the next step on."""
        with PROGRESS.inside("move of experts"):
            for work in moving.works:
                work.wait()
        if moving.left is not None:
            torch.cuda.current_stream().wait_event(moving.left)
        own = tensors_of(moving.layer)
        for slot, parts in moving.coming:
            for weight, part in zip(own, parts, strict=True):
                weight[slot].copy_(part)
        moving.layer.place(moving.placement)
        self.moved += 1
        logger.debug(
            "experts of %s have moved, %s to this rank", moving.layer.path, counted(len(moving.coming), "one", "ones")
        )


def tensors_of(layer: Experts) -> list[Tensor]:
    """All that belongs to experts, [held, ...] each."""
    return [each for each in layer.stored() if each is not None]


def most_moved(model: Model) -> int:
    """Bytes on their way to this rank at once, at most: as much as its experts of one layer have."""
    layers = (layer for layer in model.modules() if isinstance(layer, Experts) and layer.build.mesh.ep > 1)
    return max((sum(each.nbytes for each in tensors_of(layer)) for layer in layers), default=0)


def transfer(layer: Experts, all_moves: list[Move]) -> "tuple[list[tuple[int, list[Tensor]]], list[Work]]":
    """Begins this rank's part of `all_moves`: what comes into which slot, once the works are done. Ranks that hold the
    same part of the width exchange it among themselves."""
    import torch.distributed as distributed

    groups = layer.build.groups
    assert groups is not None and groups.moves is not None
    group, own = groups.moves, tensors_of(layer)
    coming: list[tuple[int, list[Tensor]]] = []
    operations = []
    for move in all_moves:
        if move.source == group.place:
            peer = group.ranks[move.target]
            parts = [weight[move.source_slot].view(torch.uint8) for weight in own]
            operations += [distributed.P2POp(distributed.isend, part, peer, group.joined()) for part in parts]
        elif move.target == group.place:
            peer = group.ranks[move.source]
            room = [torch.empty_like(weight[move.target_slot]) for weight in own]
            coming.append((move.target_slot, room))
            parts = [part.view(torch.uint8) for part in room]
            operations += [distributed.P2POp(distributed.irecv, part, peer, group.joined()) for part in parts]
    works = distributed.batch_isend_irecv(operations) if operations else []
    return coming, works
