"""A mixture whose experts lie on several ranks, each of which has tokens of its own: by gathering, or by all-to-all.

    own tokens ─┬─ gather: every rank routes all tokens ─ its experts ─ reduce-scatter ─────────────────┬─(+)─
                ├─ all-to-all: a rank routes its own ─ to the ranks of their experts ─ all-to-all, back ─┘  │
                └─ shared expert ──────────────────────────────────────────────────────────────────────────┘

Where attention runs in copies, a rank's own tokens are those of its copy. Where several ranks share a copy's
attention, they have the same tokens, and each sends an equal part of them. What it returns is then its part of the sum
over these ranks. The shared expert is computed where a token is at home, so only the ranks of a copy divide it. Which
way a step goes follows from how many tokens the plan has (parallel/ways.py). So all ranks take the same one, and all
ways give the same but for rounding. Left out: ranks that share an expert's width.
"""

import torch
from torch import Tensor

from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.moe import SparseMLP
from engine.layers.spread import gather, scatter
from engine.parallel.collectives import all_reduce
from engine.parallel.exchange import Exchange, places_of
from engine.parallel.ways import Ways


class Dispatch:
    """What `mlp`, whose experts are not summed, makes of this copy's tokens [T, H] of a batch, [T, H]: the sum over the
    ranks if it is `summed`, else a part of it over those that share attention."""

    def __init__(self, mlp: SparseMLP, build: Build, ways: Ways, *, summed: bool = True) -> None:
        assert not mlp.experts.sums
        self.parts = mlp.gate, mlp.experts
        self.shared = mlp.shared
        self.ways, self.summed = ways, summed
        self.ops = build.kernels.experts
        self.ranks, self.copies, self.sharers = (build.group(axis) for axis in ("ep", "dp", "attention_tp"))
        assert self.ranks.size == build.mesh.tp, "each expert lies whole on a rank"

    def __call__(self, hidden: Tensor, batch: Batch) -> Tensor:
        base = self.shared(hidden, batch)
        most = len(hidden) if batch.spread is None else batch.spread.most
        each = -(-most // self.sharers.size)
        way = self.ways.choose(each, captured=not len(batch.lengths))
        if way == "gather":
            made = self._by_gathering(hidden, batch, base)
        else:
            made = self._by_sending(hidden, batch, base, each, fixed=way == "places")
        return all_reduce(made, self.sharers) if self.summed else made

    def _by_gathering(self, hidden: Tensor, batch: Batch, base: Tensor | None) -> Tensor:
        """All ranks see all tokens, so one of them counts what these choose."""
        gate, experts = self.parts
        counts = self.ranks.place == 0
        if self.copies.size == 1:
            made: Tensor = experts(hidden, *gate(hidden, batch, counts), base=base)
            return made
        assert batch.spread is not None, "a step of several copies says how its tokens are spread"
        together = gather(hidden, batch.spread, self.copies)
        made = scatter(experts(together, *gate(together, batch, counts)), batch.spread, len(hidden), self.copies)
        return made if base is None else made + base

    def _by_sending(self, hidden: Tensor, batch: Batch, base: Tensor | None, each: int, *, fixed: bool) -> Tensor:
        """This rank sends up to `each` of the tokens, to places of their own if they are `fixed`."""
        gate, experts = self.parts
        first = each * self.sharers.place
        count, real = self._own(hidden, batch)
        own = slice(min(first, count), min(first + each, count))
        routed = gate.everywhere(hidden[own], None if real is None else (real - first).clamp(min=0))
        exchange = Exchange(self.ranks, experts.held, self.ops.rounds(hidden, experts.stored()))
        assert experts.everywhere is not None
        places = places_of(experts.everywhere, routed.experts, first=self.ranks.place)
        arrived = exchange.dispatch(hidden[own], routed.weights, places, each if fixed else None)
        made = experts(arrived.hidden, arrived.weights, arrived.experts)
        back = exchange.combine(made, arrived.way, own.stop - own.start, None if base is None else base[own])
        if len(back) == len(hidden):
            return back
        out = torch.zeros_like(hidden) if base is None else base
        out[own] = back
        return out

    def _own(self, hidden: Tensor, batch: Batch) -> tuple[int, Tensor | None]:
        """How many tokens this rank's copy has, as the host knows it, and how many [1] of these are no padding, where
        the device alone does."""
        if batch.spread is None:
            return len(hidden), batch.real
        copy = self.copies.place
        if batch.spread.real is not None:
            return len(hidden), batch.spread.real[copy : copy + 1]
        return batch.spread.counts[copy], None
