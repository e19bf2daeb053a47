"""What copies of attention share: an MLP or a mixture, divided over the ranks of all copies.

    copy 0   attention ─ [T0, H] ─┐ all-gather               reduce-scatter ┌─ [T0, H] ─ attention …
                                  ├───────────> [N, H] ─ MLP ──────────────>┤
    copy 1   attention ─ [T1, H] ─┘             parts of a sum              └─ [T1, H] ─ attention …

All ranks send as many tokens as the copy with the most has, which every host knows from the plan (`batch.spread`). In
between, all tokens lie together without gaps, so that padding costs the MLP nothing. What comes back is summed over the
copies; where several ranks share a copy's attention, it is still a part of the sum over these, as what attention itself
returns is. Left out: sending tokens to those ranks alone that hold their experts.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from engine.layers.batch import Batch, Spread
from engine.layers.build import Build
from engine.parallel.collectives import Group, all_gather, all_reduce, reduce_scatter

Shared = Callable[[Tensor, Batch], Tensor]


def gather(hidden: Tensor, spread: Spread, copies: Group) -> Tensor:
    """`hidden` [T, H] of this copy's tokens to [N, H], those of all copies together, padding last."""
    if len(hidden) < spread.most:
        hidden = functional.pad(hidden, (0, 0, 0, spread.most - len(hidden)))
    gathered = all_gather(hidden, copies)
    return gathered if spread.order is None else gathered[spread.order]


def scatter(made: Tensor, spread: Spread, count: int, copies: Group) -> Tensor:
    """Of the sum over the copies of `made` [N, H], what is this copy's: the first `count` rows of it, [count, H]."""
    return reduce_scatter(made if spread.back is None else made[spread.back], copies)[:count]


def over_copies(mlp: Shared, build: Build, *, summed: bool = True) -> Shared:
    """`mlp` as it is told of this copy's tokens: it computes those of all copies, of which this copy's come back.

    `mlp` returns this rank's part of a sum over all ranks. What comes back is the sum if it is `summed`, else a part of
    it over the ranks that share attention. One copy computes its tokens alone, and sums as well."""
    copies, ranks = build.group("dp"), build.group("attention_tp")

    def shared(hidden: Tensor, batch: Batch) -> Tensor:
        spread = batch.spread
        if copies.size == 1:
            own = mlp(hidden, batch)
        else:
            assert spread is not None, "a step of several copies says how its tokens are spread"
            own = scatter(mlp(gather(hidden, spread, copies), batch), spread, len(hidden), copies)
        return all_reduce(own, ranks) if summed else own

    return shared
