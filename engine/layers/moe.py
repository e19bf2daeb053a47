"""Mixtures of experts: a router that chooses some experts for each token, and the experts with their weights stacked.

    hidden ─┬─ gate ─ route ─ weights, experts ─┐
            ├───────────────────────────────────┴─ experts ─(+)─
            └─ shared expert, if there is one ───────────────┘

All experts' matrices of a kind are one tensor, so a kernel finds any expert by its number. Left out: experts spread
over several devices; on a CPU, experts that stay packed as the checkpoint has them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.kernels.moe import ExpertWeights, Recorder, Routed, Routing, moe_ops_for
from engine.layers.build import Build
from engine.layers.model import Layer, copy_weight, empty_weight
from engine.plugin.specs import LazyTensor

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")  # as most checkpoints name them


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The mixtures of a decoder: `inner` is the size of an expert, `layers` are those that have one."""

    routing: Routing
    inner: int
    layers: frozenset[int]
    parts: tuple[str, str, str] = EXPERT_PARTS


class Router(Layer):
    """The matrix that scores experts, and how they are chosen by it. In checkpoints it is called `gate`.

    With `corrected`, there is a bias for choosing as well: `gate.e_score_correction_bias`.
    """

    def __init__(self, build: Build, routing: Routing, size: int, corrected: bool = False) -> None:
        super().__init__()
        self.routing = routing
        self.recorder: Recorder | None = None  # where its choices are counted, if that is wanted
        self.weight = empty_weight(build, routing.experts, size)
        bias = empty_weight(build, routing.experts, dtype=torch.float32) if corrected else None
        self.e_score_correction_bias = bias

    def forward(self, hidden: Tensor) -> Routed:
        """`hidden` [T, size] to (weights [T, k] float32, experts [T, k] int64, and what the kernels know of them)."""
        ops = moe_ops_for(hidden)
        return ops.route(ops.gate(hidden, self.weight), self.e_score_correction_bias, self.routing, self.recorder)


class Experts(Layer):
    """`count` gated MLPs between `size` and `inner`, of which each token uses a few.

    The checkpoint has a module for each, `…experts.{i}`, with three matrices that go by the names in `parts`: gate,
    up and down.
    """

    def __init__(
        self, build: Build, count: int, size: int, inner: int, parts: tuple[str, str, str] = EXPERT_PARTS
    ) -> None:
        super().__init__()
        assert build.world == 1, "experts on several ranks are not built yet"
        self.count, self.size, self.inner = count, size, inner
        self.gate_up = empty_weight(build, count, 2 * inner, size)
        self.down = empty_weight(build, count, size, inner)
        self._parts = parts

    def forward(
        self, hidden: Tensor, weights: Tensor, experts: Tensor, order: object = None, base: Tensor | None = None
    ) -> Tensor:
        """What the experts make of `hidden` [T, size], weighed and summed, [T, size]; `base` [T, size] is added.

        `weights` [T, k] float32, `experts` [T, k] int64 and `order` are what a Router returned.
        """
        return moe_ops_for(hidden).experts(
            hidden, Routed(weights, experts, order), ExpertWeights(self.gate_up, self.down), base
        )

    def names(self, path: str, parameter: str) -> list[tuple[str, str]]:
        parts = self._parts[:2] if parameter == "gate_up" else self._parts[2:]
        return [
            (f"{path}.{expert}.{part}.weight", f"{expert}.{part}") for expert in range(self.count) for part in parts
        ]

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        expert, _, matrix = part.partition(".")
        target = self.get_parameter(parameter)[int(expert)]
        if parameter == "gate_up":
            target = target.chunk(2)[self._parts.index(matrix)]
        copy_weight(name, target, tensor, tuple(target.shape), (slice(None),))


class SparseMLP(nn.Module):
    """A router and its experts in the place of an MLP, with a shared expert that every token passes, or without.

    The names of the members are those of most checkpoints.
    """

    def __init__(self, gate: Router, experts: Experts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, hidden: Tensor) -> Tensor:
        base = None if self.shared_experts is None else self.shared_experts(hidden)
        return self.experts(hidden, *self.gate(hidden), base=base)
