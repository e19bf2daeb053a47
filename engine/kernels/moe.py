"""A mixture of experts in plain torch: which experts a token gets, and what they make of it. The definition of both.

`moe_ops_for` gives the fastest implementation for a tensor, each tested against this one. A token's k choices are its
k experts; a choice's row among all choices is token * k + slot. Left out: experts spread over several devices.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the `top_k` of `experts` are chosen and weighed.

    Scores are a softmax over all experts' logits, or a sigmoid of each. Experts come in `groups`, of which only
    `kept_groups` are chosen from: those with the largest sum of their `group_best` best scores (1 in DeepSeek-V2,
    arXiv:2405.04434; 2 in V3, arXiv:2412.19437). A correction bias is added to the scores for choosing, not to the
    weights. Those of a token are divided by their sum if `normalised`, then multiplied by `scale`.
    """

    experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    normalised: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        each = self.experts // self.groups
        assert self.experts == each * self.groups and 0 < self.group_best <= each
        assert 0 < self.kept_groups <= self.groups and 0 < self.top_k <= each * self.kept_groups


class Routed(NamedTuple):
    """The choices of T tokens: float32 `weights` and int64 `experts`, [T, k]. `order` is whatever the implementation
    that made them has prepared for its `experts`."""

    weights: Tensor
    experts: Tensor
    order: Any = None


class MoeOps:
    """The operations in torch."""

    def gate(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Float32 logits [T, experts] of `hidden` [T, H], by `weight` [experts, H]."""
        return functional.linear(hidden.to(torch.float32), weight.to(torch.float32))

    def route(self, logits: Tensor, bias: Tensor | None, routing: Routing) -> Routed:
        """Chooses by float32 `logits` [T, experts] and the correction `bias` [experts]. Of equals, any may be chosen;
        a token's experts come in any order."""
        scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
        choice = scores if bias is None else scores + bias
        if routing.groups > 1:
            grouped = choice.unflatten(-1, (routing.groups, -1))
            best = grouped.topk(routing.group_best, dim=-1).values.sum(-1).topk(routing.kept_groups, dim=-1).indices
            kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
            choice = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
        experts = choice.topk(routing.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if routing.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routed(weights * routing.scale, experts)

    def experts(
        self, hidden: Tensor, routed: Routed, gate_up: Tensor, down: Tensor, base: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of what each token's experts make of it, and of `base`, where there is one.

        `hidden` and `base` [T, H]; an expert is SwiGLU between `gate_up` [experts, 2 * I, H], its gate before its up,
        and `down` [experts, H, I]. Returns [T, H] of hidden's type; sums over experts are taken in float32.
        """
        top_k = routed.experts.shape[1]
        chosen = routed.experts.flatten()
        counts = torch.bincount(chosen, minlength=len(gate_up)).tolist()
        order = chosen.argsort(stable=True)
        scale = routed.weights.flatten()
        out = torch.zeros_like(hidden, dtype=torch.float32) if base is None else base.to(torch.float32, copy=True)
        begin = 0
        for expert, count in enumerate(counts):
            if count:
                rows = order[begin : begin + count]
                tokens = rows // top_k
                gate, up = functional.linear(hidden[tokens], gate_up[expert]).chunk(2, dim=-1)
                made = functional.linear(functional.silu(gate).mul_(up), down[expert])
                out.index_add_(0, tokens, made.to(torch.float32) * scale[rows, None])
                begin += count
        return out.to(hidden.dtype)


_REFERENCE = MoeOps()


def moe_ops_for(tensor: Tensor) -> MoeOps:
    """The operations that work best on what `tensor` is."""
    return _REFERENCE
