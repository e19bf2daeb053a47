"""Mixtures of experts: a router that chooses some experts for each token, and the experts with their weights stacked.

    hidden ─┬─ gate ─ route ─ weights, experts ─┐
            ├───────────────────────────────────┴─ experts ─(+)─
            └─ shared expert, if there is one ───────────────┘

All experts' matrices of a kind are one tensor, so a kernel finds any expert by its number. Each of several ranks holds
a share of every expert's width, routes all tokens as the others do, and makes a part of the sum. Left out: experts
divided by number; on a CPU, experts that stay packed as the checkpoint has them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.experts.reference import ExpertWeights, Recorder, Routed, Routing
from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.model import Layer, copy_weight, empty_weight
from engine.layers.quantization import QuantizedExperts
from engine.parallel.collectives import all_reduce
from engine.plugin.specs import LazyTensor

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")  # as most checkpoints name them


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The mixtures of a decoder: `inner` is the size of an expert, `layers` are those that have one.

    `shared` is the size of the expert that every token passes; 0 for none."""

    routing: Routing
    inner: int
    layers: frozenset[int]
    shared: int = 0
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
        counts = torch.zeros(routing.experts, dtype=torch.int64, device=build.device)
        self.recorder = Recorder(counts, torch.zeros(1, dtype=torch.int32, device=build.device))
        self.weight = empty_weight(build, routing.experts, size)
        bias = empty_weight(build, routing.experts, dtype=torch.float32) if corrected else None
        self.e_score_correction_bias = bias

    def forward(self, hidden: Tensor, batch: Batch) -> Routed:
        """`hidden` [T, size] of the tokens of `batch` to (weights [T, k] float32, experts [T, k] int64, and what the
        kernels know of them). Padding of a captured step chooses no expert."""
        ops = self.kernels.experts
        logits = ops.gate(hidden, self.weight)
        return ops.route(logits, self.e_score_correction_bias, self.routing, self.recorder, batch.real)


class Experts(Layer):
    """`count` gated MLPs between `size` and `inner`, of which each token uses a few.

    The checkpoint has a module for each, `…experts.{i}`, with three matrices that go by the names in `parts`: gate,
    up and down. A rank has `share` of their width.
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
        self.share = build.share(inner, "tp", "numbers of an expert's width")
        self.group = build.group("tp")
        self.sums = summed and self.group.size > 1
        width = self.share.stop - self.share.start
        self.waits = build.quantization is not None  # to be named, before it is known how it is stored
        waits = torch.device("meta") if self.waits else None
        self.gate_up = empty_weight(build, count, 2 * width, size, device=waits)
        self.down = empty_weight(build, count, size, width, device=waits)
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
        stored = ExpertWeights(self.gate_up, self.down) if self.quantized is None else self.quantized.weights()
        made = self.build.kernels.experts.experts(hidden, Routed(weights, experts, order), stored, base)
        return all_reduce(made, self.group) if self.sums else made

    # ── loading ──────────────────────────────────────────────────────────────────────────────

    def named(self, path: str) -> None:
        self.path = path
        scheme = self.build.quantization
        if scheme is None or not self.waits:
            return
        self.waits = False
        modules = self._modules_of(path, self._parts)
        taken = sum(scheme.takes(module) for module, _ in modules)
        if not taken:
            self.gate_up, self.down = (empty_weight(self.build, *each.shape) for each in (self.gate_up, self.down))
        elif taken < len(modules):
            raise ConfigError(f"the checkpoint quantizes {taken} of the {len(modules)} matrices of {path}, not all")
        else:
            self.quantized = scheme.experts(self.build, self.count, self.size, self.inner, self.share)
            for name, parameter in self.quantized.tensors.items():
                self.register_parameter(name, parameter)

    def _modules_of(self, path: str, parts: tuple[str, ...]) -> list[tuple[str, str]]:
        """The checkpoint's modules, and how `load` is told of them."""
        return [(f"{path}.{expert}.{part}", f"{expert}.{part}") for expert in range(self.count) for part in parts]

    def names(self, path: str, parameter: str) -> list[tuple[str, str]]:
        parts = self._parts[:2] if parameter.startswith("gate_up") else self._parts[2:]
        belonging = parameter.removeprefix("gate_up").removeprefix("down").removeprefix("_")
        ends = self.quantized.suffixes[belonging] if self.quantized is not None and belonging else ("weight",)
        return [(f"{module}.{end}", part) for module, part in self._modules_of(path, parts) for end in ends]

    def whole(self, parameter: str, part: str) -> tuple[int, ...] | None:
        if self.quantized is not None:
            return None
        return (self.inner, self.size) if parameter == "gate_up" else (self.size, self.inner)

    def optional(self) -> frozenset[str]:
        return self.quantized.optional if self.quantized is not None else frozenset()

    def passed_over(self, path: str) -> list[str]:
        ignored = self.quantized.ignored if self.quantized is not None else ()
        return [f"{module}.{name}" for module, _ in self._modules_of(path, self._parts) for name in ignored]

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
        expert, _, matrix = part.partition(".")
        if self.quantized is not None:
            return self.quantized.load(name, parameter, int(expert), int(matrix == self._parts[1]), tensor)
        target = self.get_parameter(parameter)[int(expert)]
        index = (slice(0, self.size), self.share)
        if parameter == "gate_up":
            target = target.chunk(2)[self._parts.index(matrix)]
            index = (self.share, slice(0, self.size))
        whole = self.whole(parameter, part)
        assert whole is not None
        copy_weight(name, target, tensor, whole, index)


class SparseMLP(nn.Module):
    """A router and its experts in the place of an MLP, with a shared expert that every token passes, or without.

    The names of the members are those of most checkpoints. What the shared expert makes is not summed over the ranks:
    the experts do that, of both.
    """

    def __init__(self, gate: Router, experts: Experts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        base = None if self.shared_experts is None else self.shared_experts(hidden, batch)
        return self.experts(hidden, *self.gate(hidden, batch), base=base)
