"""The operations of reference.py on a GPU, in Triton: four launches for a few tokens, five or six for a step of more.

    gate ─ route ─┬─ few tokens: vector_up ─ vector_down
                  ├─ more: (order, where they are many) ─ multiply gate, up ─ multiply down ─ combine
                  └─ FP8 weights: (order) ─ quantize ─ multiply_fp8 gate, up ─ multiply_fp8 down ─ combine

How products are cut depends on how many tokens an expert gets on average: `REGIMES`, to be tuned by
`bench/kernels/moe.py --sweep`. Where it is very many, torch's own grouped product can take the place of `multiply`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.dense.reference import Ops
from engine.kernels.experts.products import combine, multiply, vector_down, vector_up
from engine.kernels.experts.products_fp8 import multiply_pair
from engine.kernels.experts.reference import ExpertWeights, MoeOps, Places, Routed, Routing
from engine.kernels.experts.routing import gate, order_reference, route
from engine.kernels.fp8.reference import BLOCK, E4M3
from engine.kernels.fp8.triton import LONGEST_LINE, Cut

GATE_TOKENS = 32  # up to so many, logits are made by a kernel of our own
VECTOR_TOKENS = 4  # up to so many, each choice reads its expert's weights by itself
LIBRARY_SHARE = float("inf")  # tokens of an average expert from which on torch's grouped product is used


@dataclass(frozen=True, slots=True)
class Regime:
    """How gate and up, and down, are multiplied where an average expert has at most `share` tokens: by activations of
    their own type, and by FP8 ones where weights are FP8. Tasks have as many rows for both: who routes does not know
    which they are."""

    share: float
    bfloat16: tuple[Cut, Cut]
    fp8: tuple[Cut, Cut]


# A Cut is rows, columns, depth, tasks together, warps, stages. In FP8, gate and up make scales of as many numbers as
# they have columns, and down takes as many at a time. To read at full speed, an SM wants 100 KB and more on their way.
REGIMES = (
    Regime(
        8.0,
        (Cut(16, 32, 128, 1, 4, 4), Cut(16, 64, 128, 1, 4, 4)),
        (Cut(16, 128, 128, 1, 4, 3), Cut(16, 128, 128, 1, 4, 4)),
    ),
    Regime(
        24.0,
        (Cut(32, 64, 64, 4, 4, 4), Cut(32, 64, 128, 4, 4, 4)),
        (Cut(32, 128, 128, 4, 4, 3), Cut(32, 128, 128, 4, 4, 3)),
    ),
    Regime(
        64.0,
        (Cut(64, 64, 64, 8, 4, 4), Cut(64, 128, 64, 8, 4, 4)),
        (Cut(64, 128, 128, 8, 8, 4), Cut(64, 128, 128, 8, 4, 4)),
    ),
    Regime(
        float("inf"),
        (Cut(128, 128, 64, 8, 8, 3), Cut(128, 128, 64, 8, 8, 4)),
        (Cut(128, 128, 128, 8, 16, 3), Cut(128, 128, 128, 8, 8, 4)),
    ),
)
ALONE = (Cut(16, 64, 128, 1, 4, 8), Cut(16, 64, 64, 1, 4, 8))  # in FP8, each choice by itself


def regime(tokens: int, top_k: int, experts: int) -> Regime:
    """That of a step of so many tokens."""
    return next(each for each in REGIMES if tokens * top_k <= each.share * experts)


class TritonMoeOps(MoeOps):
    """The operations on CUDA tensors. `dense` activates between torch's grouped products."""

    def __init__(self, dense: Ops | None = None) -> None:
        self._dense = dense or Ops()

    def gate(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if 0 < len(hidden) <= GATE_TOKENS and hidden.shape[1] <= LONGEST_LINE:
            return gate(hidden, weight)
        if hidden.dtype == torch.float32:
            return super().gate(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    def route(
        self,
        logits: Tensor,
        bias: Tensor | None,
        routing: Routing,
        counts: Tensor | None = None,
        real: Tensor | None = None,
        places: Places | None = None,
    ) -> Routed:
        tokens = len(logits)
        rows = regime(tokens, routing.top_k, routing.experts).bfloat16[0].rows if tokens > VECTOR_TOKENS else 0
        return route(logits, bias, routing, rows, counts, real, places)

    def rounds(self, hidden: Tensor, weights: ExpertWeights) -> bool:
        """Where weights are FP8, in whole blocks, unless hidden states are float32."""
        whole = not any(size % BLOCK for size in weights.down.shape[1:])
        return weights.down.dtype == E4M3 and hidden.dtype != torch.float32 and whole

    def experts(
        self,
        hidden: Tensor,
        routed: Routed,
        weights: ExpertWeights,
        base: Tensor | None = None,
        among: int | None = None,
    ) -> Tensor:
        tokens, top_k = routed.experts.shape
        among = among or len(weights.down)
        if not tokens:
            return torch.empty_like(hidden)
        hidden, chosen = hidden.contiguous(), routed.experts.contiguous()
        routed = routed._replace(weights=routed.weights.contiguous(), experts=chosen)
        if self.rounds(hidden, weights):
            return self.by_fp8(hidden, routed, weights, base, among)
        if tokens <= VECTOR_TOKENS:
            made = vector_up(hidden, weights.gate_up, weights.gate_up_scale, chosen)
            return vector_down(made, weights.down, weights.down_scale, chosen, routed.weights, base)
        up, down = regime(tokens, top_k, among).bfloat16
        if routed.order is None or routed.order.rows != up.rows:
            routed = routed._replace(order=order_reference(chosen, len(weights.down), up.rows))
        if tokens * top_k >= LIBRARY_SHARE * among and weights.down.dtype == hidden.dtype:
            return self.by_library(hidden, routed, weights, base)
        return self.by_task(hidden, routed, weights, base, up, down)

    def by_task(
        self, hidden: Tensor, routed: Routed, weights: ExpertWeights, base: Tensor | None, up: Cut, down: Cut
    ) -> Tensor:
        """`experts` by the tasks of `routed.order`."""
        (choices, top_k), (size, inner) = (routed.experts.numel(), routed.experts.shape[1]), weights.down.shape[1:]
        made = torch.empty(choices, inner, dtype=hidden.dtype, device=hidden.device)
        multiply(hidden, weights.gate_up, weights.gate_up_scale, routed.order, up, top_k, made)
        lines = torch.empty(choices, size, dtype=hidden.dtype, device=hidden.device)
        multiply(made, weights.down, weights.down_scale, routed.order, down, 0, lines)
        return combine(lines, routed.weights, None, base)

    def by_fp8(
        self, hidden: Tensor, routed: Routed, weights: ExpertWeights, base: Tensor | None, among: int | None = None
    ) -> Tensor:
        """`experts` where weights are FP8, by activations that become FP8."""
        tokens, top_k = routed.experts.shape
        if tokens <= VECTOR_TOKENS:
            lines = multiply_pair(hidden, routed.experts, weights, top_k, *ALONE)
        else:
            up, down = regime(tokens, top_k, among or len(weights.down)).fp8
            order = routed.order
            if order is None or order.rows != up.rows:
                order = order_reference(routed.experts, len(weights.down), up.rows)
            lines = multiply_pair(hidden, order, weights, top_k, up, down)
        return combine(lines, routed.weights, None, base)

    def by_library(self, hidden: Tensor, routed: Routed, weights: ExpertWeights, base: Tensor | None) -> Tensor:
        """`experts` by torch's grouped product, between gathers: for many tokens, in bfloat16."""
        order, top_k, count = routed.order, routed.experts.shape[1], routed.experts.numel()
        position = torch.arange(count, device=hidden.device)
        real = position < order.ends[-1]  # what comes after is padding's
        choices = torch.where(real, order.choices.to(torch.int64), 0)
        made = torch._grouped_mm(hidden[choices // top_k], weights.gate_up.transpose(1, 2), offs=order.ends)
        made = self._dense.silu_and_mul(made)
        made = torch._grouped_mm(made, weights.down.transpose(1, 2), offs=order.ends)
        places = torch.zeros(count + 1, dtype=torch.int32, device=hidden.device)
        places[torch.where(real, choices, count)] = position.to(torch.int32)
        return combine(made, routed.weights, places[:count], base)
