"""Which experts get copies, and which rank holds what, so that ranks have equal work: numbers in, an arrangement out.

    loads [experts] ─ replicate ─> copies of each ─ pack ─> placement [ranks, slots] ─ improve ─> the same, more even

The steps are those of DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB; DeepSeek-V3,
arXiv:2412.19437, section 3.4): the expert whose copies are busiest gets the next copy; copies are packed on ranks,
largest first, on the rank that has the least so far (Graham's LPT with a number of slots for each rank). Unlike there,
a rank never has two copies of an expert: the second would serve nothing. At last pairs of slots are exchanged as long
as that lowers the largest load.

All of it depends on its arguments alone, so that ranks that are given the same counts find the same arrangement. Left
out: what it costs to move experts (placement.py arranges the lines so that little has to); groups of experts that stay
on a host, as no message between hosts becomes smaller by that here.
"""

import numpy as np
from numpy.typing import NDArray

from engine.parallel.placement import Placement, copies_of, holds, imbalance, rank_loads

Loads = NDArray[np.float64]  # [experts]
EXCHANGES = 64  # of two slots, at most


def balanced(counts: NDArray[np.int64], ranks: int, slots: int) -> Placement:
    """An arrangement of the experts whose choices `counts` [experts] are, on `ranks` of `slots` each. Each expert lies
    somewhere, none twice on a rank."""
    loads = counts.astype(np.float64)
    copies = replicate(loads, ranks * slots, ranks)
    experts = np.repeat(np.arange(len(loads)), copies)
    placement = np.array(pack((loads / copies)[experts], experts, ranks, slots), np.int32)
    return improve(loads / copies, placement)


def replicate(loads: Loads, slots: int, most: int) -> NDArray[np.int64]:
    """[experts]: how many copies each gets, one at least and `most` at most, `slots` in all. The largest load of a copy
    is the least that there can be: each further copy goes where it is largest."""
    assert len(loads) <= slots <= most * len(loads), f"{slots} slots for {len(loads)} experts of {most} copies at most"
    copies = np.ones(len(loads), np.int64)
    for _ in range(slots - len(loads)):
        share = np.where(copies < most, loads / copies, -1.0)
        copies[int(share.argmax())] += 1
    return copies


def pack(loads: Loads, experts: NDArray[np.int64], bins: int, room: int) -> list[list[int]]:
    """The experts in each of `bins` with `room` items, of items whose `loads` and `experts` are given: the largest
    first, each to the bin with the least load that has room, and not that expert yet. No expert has more items than
    there are bins, and all places are filled."""
    assert len(loads) == bins * room, f"{len(loads)} items for {bins} bins of {room}"
    held: list[list[int]] = [[] for _ in range(bins)]
    of_expert = dict(zip(experts.tolist(), loads.tolist(), strict=True))
    total = np.zeros(bins)
    for item in np.argsort(-loads, kind="stable").tolist():
        expert = int(experts[item])
        free = [each for each in range(bins) if len(held[each]) < room]
        fits = [each for each in free if expert not in held[each]]
        target = min(fits, key=total.__getitem__) if fits else _make_room(expert, free[0], held, total, of_expert)
        held[target].append(expert)
        total[target] += loads[item]
    return held


def _make_room(expert: int, free: int, held: list[list[int]], total: Loads, loads: dict[int, float]) -> int:
    """Where `expert`, which lies in all bins with room, goes: to a full bin, from which another expert goes to `free`.

    There is one: some bin lacks the expert, and it has more experts than `free` has besides this one."""
    target = min((each for each in range(len(held)) if expert not in held[each]), key=total.__getitem__)
    moved = min((each for each in held[target] if each not in held[free]), key=loads.__getitem__)
    held[target].remove(moved)
    held[free].append(moved)
    total[target] -= loads[moved]
    total[free] += loads[moved]
    return target


def improve(share: Loads, placement: Placement) -> Placement:
    """`placement` after exchanges of two slots, of the busiest rank and another one, each of which lowers the larger
    load of the two as much as any does. `share` [experts] is the load of each copy of an expert."""
    placement, held = placement.copy(), holds(placement, len(share))
    for _ in range(EXCHANGES):
        totals = share[placement].sum(axis=1)
        busiest = int(totals.argmax())
        mine = placement[busiest]
        given = share[mine][:, None, None] - share[placement][None]  # [own slot, rank, slot]: what the busiest loses
        after = np.maximum(totals[busiest] - given, totals[None, :, None] + given)
        there = held[busiest, placement][None] | held[:, mine].T[:, :, None]  # one of the two would have it twice
        after = np.where(there, np.inf, after)
        after[:, busiest] = np.inf
        own, rank, slot = np.unravel_index(int(after.argmin()), after.shape)
        if after[own, rank, slot] >= totals[busiest] * (1 - 1e-9):
            break
        given_up, taken = int(placement[busiest, own]), int(placement[rank, slot])
        placement[busiest, own], placement[rank, slot] = taken, given_up
        held[busiest, [given_up, taken]], held[rank, [given_up, taken]] = (False, True), (True, False)
    return placement


def gain(counts: NDArray[np.int64], old: Placement, new: Placement) -> float:
    """The share of the busiest rank's work that `new` saves; negative where `old` is better."""
    before, after = (imbalance(rank_loads(counts, each)) for each in (old, new))
    return 1 - after / before


def check(placement: Placement, experts: int) -> None:
    """Raises AssertionError where an expert lies nowhere, or twice on a rank."""
    assert copies_of(placement, experts).min() > 0, "an expert lies nowhere"
    assert all(len(set(line)) == len(line) for line in placement.tolist()), "a rank has an expert twice"
