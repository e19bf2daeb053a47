"""A mixture of experts in plain torch: which experts a token gets, and what they make of it. The definition of both.

triton.py computes the same on a GPU. A token's k choices are its k experts; a choice's row among all choices is
token * k + slot. Where experts lie on several ranks, a choice is the number of an expert on this rank, or -1 for one
that another rank computes. Left out: how tokens and results travel between ranks (engine/parallel).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import ConfigError
from engine.kernels.fp8.reference import dequantize


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the `top_k` of `experts` are chosen and weighed.

    Scores are a softmax over all experts' logits, or a sigmoid of each. Experts come in `groups`, of which only
    `kept_groups` are chosen from: those with the largest sum of their `group_best` best scores (1 in DeepSeek-V2,
    arXiv:2405.04434; 2 in V3, arXiv:2412.19437). A correction bias is added to the scores for choosing, not to the
    weights. Those of a token are divided by their sum if `normalised`, then multiplied by `scale`.

    Raises ConfigError for numbers that do not go together.
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
        each = self.experts // max(self.groups, 1)
        if self.groups < 1 or self.experts != each * self.groups or not 0 < self.group_best <= each:
            raise ConfigError(f"{self.experts} experts do not divide into {self.groups} groups to choose from")
        if not 0 < self.kept_groups <= self.groups or not 0 < self.top_k <= each * self.kept_groups:
            raise ConfigError(
                f"a token cannot choose {self.top_k} of the {self.experts} experts in {self.kept_groups} of their "
                f"{self.groups} groups: there are at most {each * self.kept_groups}"
            )


class Routed(NamedTuple):
    """The choices of T tokens: float32 `weights` and int64 `experts`, [T, k]. Padding chooses -1, at weight 0, and so
    does who chooses an expert of another rank.

    `order` is whatever the implementation that made them has prepared for its `experts`."""

    weights: Tensor
    experts: Tensor
    order: Any = None


@dataclass(frozen=True, slots=True)
class Places:
    """Where the experts that are chosen lie. Line e of `table` [experts, 1 + most copies] int32, on the device, is how
    many copies of expert e there are, then the number of each among the `held` experts of this rank, or -1 for a copy
    on another one. Token t, counted among those of a step, takes copy t modulo their number: so all ranks, which see
    the same tokens, take the same one."""

    table: Tensor
    held: int


class ExpertWeights(NamedTuple):
    """The matrices of all experts, each a SwiGLU: `gate_up` [experts, 2 * I, H], gate before up, and `down`
    [experts, H, I]. In FP8 (engine/kernels/fp8/reference.py) they have scales: of blocks, [experts, 2, row blocks,
    column blocks] and [experts, row blocks, column blocks], or of rows, [experts, 2 * I] and [experts, H]."""

    gate_up: Tensor
    down: Tensor
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    def matrices(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of one expert, in `dtype`."""
        gate_up, down = self.gate_up[expert], self.down[expert]
        if self.gate_up_scale is None or self.down_scale is None:
            return gate_up, down
        both, scale = gate_up.unflatten(0, (2, -1)), self.gate_up_scale[expert]
        scale = scale.view(2, -1) if scale.dim() == 1 else scale
        return dequantize(both, scale, dtype).flatten(0, 1), dequantize(down, self.down_scale[expert], dtype)


class MoeOps:
    """The operations in torch."""

    def gate(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Float32 logits [T, experts] of `hidden` [T, H], by `weight` [experts, H]."""
        return functional.linear(hidden.to(torch.float32), weight.to(torch.float32))

    def route(
        self,
        logits: Tensor,
        bias: Tensor | None,
        routing: Routing,
        counts: Tensor | None = None,
        real: Tensor | None = None,
        places: Places | None = None,
    ) -> Routed:
        """Chooses by float32 `logits` [T, experts] and the correction `bias` [experts]. Adds to `counts` [experts]
        int64 how often each expert is chosen. Of equals, any may be chosen; a token's experts come in any order. Tokens
        from the number `real` [1] int64 on are padding. With `places` what is returned are experts of this rank."""
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
        if real is not None:
            padding = (torch.arange(len(logits), device=logits.device) >= real)[:, None]
            weights, experts = weights.masked_fill(padding, 0.0), experts.masked_fill(padding, -1)
        if counts is not None:
            chosen = experts.flatten()
            ones = torch.ones_like(chosen) if real is None else (chosen >= 0).to(torch.int64)
            counts.scatter_add_(0, chosen if real is None else chosen.clamp(min=0), ones)
        if places is not None:
            lines = places.table[experts.clamp(min=0)]
            token = torch.arange(len(logits), device=logits.device)[:, None]
            own = lines.gather(-1, (1 + token % lines[..., 0])[..., None])[..., 0].to(torch.int64)
            experts = torch.where(experts < 0, -1, own)
            weights = weights.masked_fill(experts < 0, 0.0)
        return Routed(weights * routing.scale, experts)

    def rounds(self, hidden: Tensor, weights: ExpertWeights) -> bool:
        """Whether `experts` makes E4M3 of `hidden`, with a scale for each 128 numbers of a token, before it multiplies:
        then it may be given what has been rounded so."""
        return False

    def experts(
        self,
        hidden: Tensor,
        routed: Routed,
        weights: ExpertWeights,
        base: Tensor | None = None,
        among: int | None = None,
    ) -> Tensor:
        """The weighted sum of what each token's experts make of it, and of `base`, where there is one.

        `hidden` and `base` [T, H]. `among` are the experts that tokens chose from, where this rank has the `weights` of
        some alone. Returns [T, H] of hidden's type; sums over experts are taken in float32.
        """
        top_k = routed.experts.shape[1]
        chosen = routed.experts.flatten()
        counts = torch.bincount(chosen + 1, minlength=len(weights.gate_up) + 1).tolist()
        order = chosen.argsort(stable=True)
        scale = routed.weights.flatten()
        out = torch.zeros_like(hidden, dtype=torch.float32) if base is None else base.to(torch.float32, copy=True)
        begin = counts.pop(0)  # of padding
        for expert, count in enumerate(counts):
            if count:
                rows = order[begin : begin + count]
                tokens = rows // top_k
                gate_up, down = weights.matrices(expert, hidden.dtype)
                gate, up = functional.linear(hidden[tokens], gate_up).chunk(2, dim=-1)
                made = functional.linear(functional.silu(gate).mul_(up), down)
                out.index_add_(0, tokens, made.to(torch.float32) * scale[rows, None])
                begin += count
        return out.to(hidden.dtype)
