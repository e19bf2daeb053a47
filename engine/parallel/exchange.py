"""Tokens travel to the ranks that hold their experts, and what these make of them travels back: all-to-all.

    dispatch   each token goes once to each rank that has some of its experts, with their numbers there and its weights
               rank 0  a b c ──> a b │ c      rank 1  d e ──> d │ e      by where they go
                                 └─────── rank 0 gets a b d, rank 1 gets c e
    combine    each rank's part of a token's result goes back, and the token adds what comes, in the order of the ranks

Two forms, of the same results. With counts: ranks first tell each other how many tokens go where, and no more travels;
the host learns the counts, so it waits. With fixed places: each rank has room for `most` tokens from each, whose places
are those that they have at home; nothing waits, so it may be part of a CUDA graph, and what is not sent travels as
padding that chooses no expert. All tokens of a rank may go to one other, so no token can lack a place. That moves as
many lines as gathering all tokens does.

Hidden states may travel as E4M3 with a scale for each 128 numbers, as the kernels for FP8 weights would round them
anyway. Results travel in the type of the hidden states. Left out: ranks that share an expert's width; messages that go
to a host once and are divided there (DeepEP, github.com/deepseek-ai/DeepEP); products that begin before all has come.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.fp8.reference import E4M3, blocks, dequantize_tokens, quantize_tokens
from engine.parallel.collectives import Group
from engine.parallel.progress import PROGRESS


class Way(NamedTuple):
    """How a dispatch went, and its results come back. `lines` [T, m] int64 says which lines of what comes back are a
    token's, in the order of ranks; the line after the last for none. `sent` and `came` are lines for and from each
    rank."""

    lines: Tensor
    sent: list[int]
    came: list[int]


class Arrived(NamedTuple):
    """What has come to this rank: `hidden` [M, H], `weights` [M, k] float32, and `experts` [M, k] int64, numbers of
    this rank or -1, at weight 0: as `Routed` has them. `way` leads back."""

    hidden: Tensor
    weights: Tensor
    experts: Tensor
    way: Way


def places_of(table: Tensor, experts: Tensor, first: int = 0) -> Tensor:
    """Where each choice `experts` [T, k] int64 goes, over all ranks: rank * held + number there. `table` [experts, 1 +
    most] int32 has the number of copies of each expert, then their places. Token t takes copy first + t; padding, which
    chooses -1, goes nowhere: -1."""
    lines = table[experts.clamp(min=0)]
    token = first + torch.arange(len(experts), device=experts.device)[:, None]
    chosen = lines.gather(-1, (1 + token % lines[..., 0])[..., None])[..., 0].to(torch.int64)
    return torch.where(experts < 0, -1, chosen)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Between the ranks of `group`, each of which holds `held` experts; `fp8`: hidden states travel as E4M3."""

    group: Group
    held: int
    fp8: bool = False

    def dispatch(self, hidden: Tensor, weights: Tensor, places: Tensor, most: int | None = None) -> Arrived:
        """Sends `hidden` [T, H] to where its `places` [T, k] are, with `weights` [T, k]. All ranks call this at once;
        T may differ. With `most`, the same on all ranks and T at most, by fixed places."""
        ranks, top_k = self.group.size, places.shape[1]
        target = torch.where(places < 0, ranks, places // self.held)
        goes = target.new_zeros(len(hidden), ranks + 1).scatter_(1, target, 1)[:, :ranks]
        if most is None:
            sent, came = self._counts(goes.sum(0))
            rank, token = goes.t().nonzero().unbind(1)
            place = goes.sum(0).cumsum(0) - goes.sum(0) + goes.cumsum(0) - 1
        else:
            assert len(hidden) <= most, f"places for {most} tokens are too few for {len(hidden)}"
            sent = came = [most] * ranks
            hidden, weights, target, places, goes = (
                functional.pad(each, (0, 0, 0, most - len(each)), value=value)
                for each, value in ((hidden, 0), (weights, 0), (target, ranks), (places, -1), (goes, 0))
            )
            lines = torch.arange(ranks * most, device=hidden.device)
            token, rank = lines % most, lines // most
            place = lines.view(ranks, most).t()
        there = target[token] == rank[:, None]  # of a token's choices, those that go with this line
        numbers = torch.where(there, places[token] % self.held, -1).to(torch.int32)
        states = [each.view(torch.uint8)[token] for each in self._packed(hidden)]
        chosen = [each.view(torch.uint8) for each in (numbers, torch.where(there, weights[token], 0.0))]
        arrived = self._all_to_all(torch.cat([*states, *chosen], 1), sent, came)
        way = Way(_lines(goes, place, min(top_k, ranks), sum(sent)), sent, came)
        return self._unpacked(arrived, hidden, top_k, way)

    def combine(self, made: Tensor, way: Way, count: int, base: Tensor | None = None) -> Tensor:
        """What the ranks have made of this one's `count` tokens, and `base` [count, H], summed in float32: of `made`
        [M, H], the result for what has arrived here, [count, H]."""
        back = self._all_to_all(made, way.came, way.sent)
        back = torch.cat((back, back.new_zeros(1, back.shape[1])))
        total = back[way.lines[:count]].to(torch.float32).sum(1)
        return (total if base is None else total.add_(base)).to(made.dtype)

    def _counts(self, own: Tensor) -> tuple[list[int], list[int]]:
        """How many tokens go to each rank, and come from each. Waits for the device."""
        came = self._all_to_all(own[:, None], [1] * self.group.size, [1] * self.group.size)[:, 0]
        sent, comes = torch.stack((own, came)).tolist()
        return sent, comes

    def _all_to_all(self, lines: Tensor, sent: list[int], came: list[int]) -> Tensor:
        """Of `lines` [sum(sent), size], so many go to each rank, and so many come."""
        if self.group.size == 1:
            return lines
        import torch.distributed as distributed

        out = lines.new_empty(sum(came), lines.shape[1])
        with PROGRESS.inside("all_to_all"):
            distributed.all_to_all_single(out, lines.contiguous(), came, sent, group=self.group.joined())
        return out

    def _packed(self, hidden: Tensor) -> list[Tensor]:
        """As they travel."""
        if not self.fp8:
            return [hidden.contiguous()]
        numbers, scales = quantize_tokens(hidden)
        return [numbers.contiguous(), scales.contiguous()]

    def _unpacked(self, arrived: Tensor, like: Tensor, top_k: int, way: Way) -> Arrived:
        size = like.shape[1]
        kinds = [(size, E4M3), (blocks(size), torch.float32)] if self.fp8 else [(size, like.dtype)]
        kinds += [(top_k, torch.int32), (top_k, torch.float32)]
        parts = arrived.split([count * kind.itemsize for count, kind in kinds], dim=1)
        *states, experts, weights = (part.contiguous().view(kind) for part, (_, kind) in zip(parts, kinds, strict=True))
        hidden = dequantize_tokens(*states).to(like.dtype) if self.fp8 else states[0]
        return Arrived(hidden, weights, experts.to(torch.int64), way)


def _lines(goes: Tensor, place: Tensor, most: int, none: int) -> Tensor:
    """[T, most]: for each token the `place` [T, ranks] of where it `goes` [T, ranks], in the order of ranks; `none` for
    the rest."""
    ranks = goes.shape[1]
    order = torch.where(goes > 0, torch.arange(ranks, device=goes.device), ranks).sort(dim=1).values[:, :most]
    place = functional.pad(place, (0, 1), value=none)
    return place.gather(1, order)
