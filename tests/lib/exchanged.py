"""Tokens that differ by rank and what they choose, for tests of their way to experts and back: over gloo
(tests/parallel/test_exchange.py) and over NCCL (tests/gpu/test_two_gpu_experts.py)."""

import numpy as np
import torch
from torch import Tensor

from engine.kernels import choose
from engine.kernels.experts.reference import ExpertWeights, MoeOps, Routed, Routing
from engine.parallel.exchange import Arrived, Exchange, places_of
from engine.parallel.groups import Groups
from engine.parallel.placement import whole_table

EXPERTS, SIZE, INNER = 7, 160, 12
PLACEMENTS = {  # by ranks; expert 0 is on all
    2: np.array([[0, 1, 6, 3], [2, 4, 5, 0]], np.int32),
    3: np.array([[0, 1, 6], [2, 3, 0], [4, 5, 0]], np.int32),
}
OPS = MoeOps()


def case(counts: tuple[int, ...], chosen: str) -> tuple[Tensor, Routed, ExpertWeights]:
    """All tokens, in the order of ranks, with what they choose."""
    generator = torch.Generator().manual_seed(sum(counts) + len(chosen))
    hidden = torch.randn(sum(counts), SIZE, generator=generator)
    logits = torch.randn(sum(counts), EXPERTS, generator=generator)
    if chosen == "all to one rank":
        logits[:, 4:6] += 100
    routed = OPS.route(logits, None, Routing(experts=EXPERTS, top_k=2, normalised=True))
    if chosen == "some are padding":
        routed = routed._replace(experts=torch.where(torch.arange(len(hidden))[:, None] % 3 == 0, -1, routed.experts))
        routed = routed._replace(weights=routed.weights.masked_fill(routed.experts < 0, 0.0))
    weights = [torch.randn(EXPERTS, *shape, generator=generator) / 8 for shape in ((2 * INNER, SIZE), (SIZE, INNER))]
    return hidden, routed, ExpertWeights(*weights)


class Own:
    """This rank's tokens, and its part of the experts, on its device."""

    def __init__(self, groups: Groups, counts: tuple[int, ...], chosen: str, fp8: bool = False) -> None:
        self.rank, device = groups.mesh.rank, groups.device
        placement = PLACEMENTS[groups.mesh.ep]
        self.tokens = slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1]))
        hidden, routed, weights = case(counts, chosen)
        self.hidden, self.weights, self.experts = (
            each[self.tokens].to(device) for each in (hidden, routed.weights, routed.experts)
        )
        self.held = ExpertWeights(
            *(None if each is None else each[placement[self.rank]].to(device) for each in weights)
        )
        self.table = torch.from_numpy(whole_table(placement, EXPERTS, len(placement))).to(device)
        self.exchange = Exchange(groups.along("ep"), placement.shape[1], fp8)

    def there_and_back(self, ops: MoeOps, most: int | None) -> tuple[Tensor, Arrived]:
        """What comes back for this rank's tokens, and what arrived here."""
        places = places_of(self.table, self.experts, first=self.rank)
        arrived = self.exchange.dispatch(self.hidden, self.weights, places, most)
        made = ops.experts(arrived.hidden, Routed(arrived.weights, arrived.experts), self.held, among=EXPERTS)
        return self.exchange.combine(made, arrived.way, len(self.hidden)), arrived


def exchanged(
    groups: Groups, counts: tuple[int, ...], chosen: str, most: int | None, fp8: bool
) -> tuple[Tensor, list[int], int]:
    """What comes back for this rank's tokens; how many lines came from each rank, and how many of those chose."""
    ops = choose(groups.device, torch.float32).experts
    back, arrived = Own(groups, counts, chosen, fp8).there_and_back(ops, most)
    return back.cpu(), arrived.way.came, int((arrived.experts >= 0).any(1).sum())
