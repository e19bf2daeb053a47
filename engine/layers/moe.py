"""Mixtures of experts: a router that chooses some experts for each token, and the experts with their weights stacked.

    hidden ─┬─ gate ─ route ─ weights, experts ─┐
            ├───────────────────────────────────┴─ experts ─(+)─
            └─ shared expert, if there is one (· gate) ──────┘

All experts' matrices of a kind are one tensor, so a kernel finds any expert by its number. Each of several ranks holds
a share of every expert's width, or with `ep` some of the experts. It routes all tokens as the others do, computes what
it holds, and makes a part of the sum. Where an expert lies is a table that routing goes through, on the device: what is
chosen are then numbers of this rank. Left out: on a CPU, experts that stay packed as the checkpoint has them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.experts.reference import ExpertWeights, Places, Routed, Routing
from engine.layers.batch import Batch, upload
from engine.layers.build import Build
from engine.layers.linear import ReplicatedLinear
from engine.layers.model import Layer, copy_weight, empty_weight
from engine.layers.quantization import QuantizedExperts
from engine.parallel.collectives import all_reduce
from engine.parallel.placement import Placement, first_placement, table_of, whole_table
from engine.plugin.specs import LazyTensor

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")  # as most checkpoints name them


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The mixtures of a decoder: `inner` is the size of an expert, `layers` are those that have one.

    `shared` is the size of the expert that every token passes; 0 for none. With `shared_gate` each token weighs what
    that one makes, by the sigmoid of a number."""

    routing: Routing
    inner: int
    layers: frozenset[int]
    shared: int = 0
    shared_gate: bool = False
    corrected: bool = False  # the router has a bias for choosing
    parts: tuple[str, str, str] = EXPERT_PARTS


class Router(Layer):
    """The matrix that scores experts, and how they are chosen by it. In checkpoints it is called `gate`.

    With `corrected`, there is a bias for choosing as well: `gate.e_score_correction_bias`.
    """

    def __init__(self, build: Build, routing: Routing, size: int, corrected: bool = False) -> None:
        super().__init__()
        self.kernels = build.kernels
        self.routing = routing
        # Choices of each so far; where tokens are sent to experts, of those tokens that this rank has routed for all.
        self.counts = torch.zeros(routing.experts, dtype=torch.int64, device=build.device)
        self.places: Places | None = None  # of experts that lie on several ranks, as its Experts say
        self.divided = build.mesh.ep > 1
        self.weight = empty_weight(build, routing.experts, size)
        bias = empty_weight(build, routing.experts, dtype=torch.float32) if corrected else None
        self.e_score_correction_bias = bias

    def forward(self, hidden: Tensor, batch: Batch, counts: bool = True) -> Routed:
        """`hidden` [T, size] of the tokens of `batch` to (weights [T, k] float32, experts [T, k] int64, and what the
        kernels know of them). Padding of a captured step chooses no expert, and so do choices of another rank's. It
        `counts` what is chosen, unless another rank does."""
        assert self.places is not None or not self.divided, "who has experts divided tells their router the places"
        return self._route(hidden, batch.real, self.places, self.counts if counts else None)

    def everywhere(self, hidden: Tensor, real: Tensor | None) -> Routed:
        """As `forward`, of tokens that no other rank routes, wherever the experts lie: by the model's numbers of them.
        Tokens from the number `real` [1] int64 on are padding."""
        return self._route(hidden, real, None, self.counts)

    def _route(self, hidden: Tensor, real: Tensor | None, places: Places | None, counts: Tensor | None) -> Routed:
        ops = self.kernels.experts
        logits, bias = ops.gate(hidden, self.weight), self.e_score_correction_bias
        return ops.route(logits, bias, self.routing, counts, real, places)


class Experts(Layer):
    """`count` gated MLPs between `size` and `inner`, of which each token uses a few.

    The checkpoint has a module for each, `…experts.{i}`, with three matrices that go by the names in `parts`: gate,
    up and down. A rank has those in its line of `placement`, and `share` of their width. `places` is what the layer's
    Router needs: None where this rank has all experts. Raises ConfigError for numbers that do not divide.
    """

    def __init__(
        self,
        build: Build,
        count: int,
        size: int,
        inner: int,
        parts: tuple[str, str, str] = EXPERT_PARTS,
        *,
        summed: bool = True,
    ) -> None:
        super().__init__()
        self.count, self.size, self.inner = count, size, inner
        self.build = build
        ranks, redundant = build.mesh.ep, build.redundant_experts
        self.placement: Placement = first_placement(count, ranks, redundant)
        self.held = self.placement.shape[1]
        self.most_copies = min(ranks, redundant + 1)
        self.places: Places | None = None
        if ranks > 1:
            self.places = Places(torch.from_numpy(self._table(self.placement)).to(build.device), self.held)
        self.everywhere: Tensor | None = None  # the places of experts over all ranks, where tokens are sent to them
        if build.ways is not None:
            self.everywhere = torch.from_numpy(self._whole_table(self.placement)).to(build.device)
        self.share = build.share(inner, "expert_tp", "numbers of an expert's width")
        self.group = build.group("tp")
        self.sums = summed and self.group.size > 1
        width = self.share.stop - self.share.start
        self.waits = build.quantization is not None  # to be named, before it is known how it is stored
        waits = torch.device("meta") if self.waits else None
        self.gate_up = empty_weight(build, self.held, 2 * width, size, device=waits)
        self.down = empty_weight(build, self.held, size, width, device=waits)
        self.quantized: QuantizedExperts | None = None
        self.path = ""
        self._parts = parts

    def forward(
        self, hidden: Tensor, weights: Tensor, experts: Tensor, order: object = None, base: Tensor | None = None
    ) -> Tensor:
        """What the experts make of `hidden` [T, size], weighed and summed, [T, size]; `base` [T, size] is added.

        `weights` [T, k] float32, `experts` [T, k] int64 and `order` are what a Router returned. `base` is summed over
        the ranks as the experts are: each rank gives its part. A layer that is not `summed` returns this rank's part.
        """
        ops, routed = self.build.kernels.experts, Routed(weights, experts, order)
        made = ops.experts(hidden, routed, self.stored(), base, self.count)
        return all_reduce(made, self.group) if self.sums else made

    def stored(self) -> ExpertWeights:
        """The matrices of the experts that this rank holds, [held, ...]."""
        return ExpertWeights(self.gate_up, self.down) if self.quantized is None else self.quantized.weights()

    # ── where experts lie ────────────────────────────────────────────────────────────────────

    @property
    def own(self) -> list[int]:
        """The experts that this rank holds, in their order here."""
        held: list[int] = self.placement[self.build.mesh.coordinates["ep"]].tolist()
        return held

    def place(self, placement: Placement) -> None:
        """From the next step on, experts lie as `placement` says; their weights are there already."""
        assert self.places is not None and placement.shape == self.placement.shape
        self.placement = placement
        self.places.table.copy_(upload(self._table(placement), self.places.table.device))
        if self.everywhere is not None:
            self.everywhere.copy_(upload(self._whole_table(placement), self.everywhere.device))

    def _whole_table(self, placement: Placement) -> NDArray[np.int32]:
        return whole_table(placement, self.count, self.most_copies)

    def _table(self, placement: Placement) -> NDArray[np.int32]:
        return table_of(placement, self.build.mesh.coordinates["ep"], self.count, self.most_copies)

    # ── loading ──────────────────────────────────────────────────────────────────────────────

    def named(self, path: str) -> None:
        self.path = path
        scheme = self.build.quantization
        if scheme is None or not self.waits:
            return
        self.waits = False
        modules = [f"{self.stored_as or path}.{expert}.{part}" for expert in range(self.count) for part in self._parts]
        taken = sum(map(scheme.takes, modules))
        if not taken:
            self.gate_up, self.down = (empty_weight(self.build, *each.shape) for each in (self.gate_up, self.down))
        elif taken < len(modules):
            raise ConfigError(f"the checkpoint quantizes {taken} of the {len(modules)} matrices of {path}, not all")
        else:
            self.quantized = scheme.experts(self.build, self.held, self.size, self.inner, self.share)
            for name, parameter in self.quantized.tensors.items():
                self.register_parameter(name, parameter)

    def names(self, path: str, parameter: str) -> list[tuple[str, str]]:
        parts = self._parts[:2] if parameter.startswith("gate_up") else self._parts[2:]
        belonging = parameter.removeprefix("gate_up").removeprefix("down").removeprefix("_")
        ends = self.quantized.suffixes[belonging] if self.quantized is not None and belonging else ("weight",)
        return [
            (f"{path}.{expert}.{part}.{end}", f"{place}.{part}")
            for place, expert in enumerate(self.own)
            for part in parts
            for end in ends
        ]

    def whole(self, parameter: str, part: str) -> tuple[int, ...] | None:
        if self.quantized is not None:
            return None
        return (self.inner, self.size) if parameter == "gate_up" else (self.size, self.inner)

    def optional(self) -> frozenset[str]:
        return self.quantized.optional if self.quantized is not None else frozenset()

    def passed_over(self, path: str) -> list[str]:
        """What belongs to experts of other ranks, too."""
        ignored = self.quantized.ignored if self.quantized is not None else ()
        suffixes = self.quantized.suffixes.values() if self.quantized is not None else ()
        all_of_them, own = (*ignored, "weight", *(end for ends in suffixes for end in ends)), set(self.own)
        return [
            f"{path}.{expert}.{part}.{end}"
            for expert in range(self.count)
            for part in self._parts
            for end in (ignored if expert in own else all_of_them)
        ]

    def loaded(self) -> None:
        if self.quantized is not None and self.quantized.loaded(self.path):
            dense = self.quantized.weights(self.build.dtype)
            for name in self.quantized.tensors:
                delattr(self, name)
            self.gate_up, self.down = (nn.Parameter(each, requires_grad=False) for each in dense[:2])
            self.quantized = None

    def fill_at_random(self, generator: torch.Generator) -> None:
        if self.quantized is None:
            return super().fill_at_random(generator)
        self.quantized.fill_at_random(generator)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        place, _, matrix = part.partition(".")
        if self.quantized is not None:
            return self.quantized.load(name, parameter, int(place), int(matrix == self._parts[1]), tensor)
        target = self.get_parameter(parameter)[int(place)]
        index = (slice(0, self.size), self.share)
        if parameter == "gate_up":
            target = target.chunk(2)[self._parts.index(matrix)]
            index = (self.share, slice(0, self.size))
        whole = self.whole(parameter, part)
        assert whole is not None
        copy_weight(name, target, tensor, whole, index)


class SparseMLP(nn.Module):
    """A router and its experts in the place of an MLP, with a shared expert that every token passes, or without.

    The names of the members are those of most checkpoints: a shared expert with a gate is called otherwise than one
    without. What the shared expert makes is not summed over the ranks: the experts do that, of both.
    """

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        shared_experts: nn.Module | None = None,
        shared_gate: ReplicatedLinear | None = None,
    ) -> None:
        super().__init__()
        gate.places = experts.places
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts if shared_gate is None else None
        self.shared_expert = None if shared_gate is None else shared_experts
        self.shared_expert_gate = shared_gate

    def shared(self, hidden: Tensor, batch: Batch) -> Tensor | None:
        """What the shared expert makes of `hidden` [T, size], this rank's part of it; None where there is none."""
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            weighed: Tensor = self.shared_expert_gate(hidden, batch).sigmoid() * self.shared_expert(hidden, batch)
            return weighed
        return None if self.shared_experts is None else self.shared_experts(hidden, batch)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        base = self.shared(hidden, batch)
        return self.experts(hidden, *self.gate(hidden, batch), base=base)
