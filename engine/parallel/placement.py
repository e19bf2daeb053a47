"""Which rank holds which experts of a layer, and what has to travel for another arrangement: plain integers, no torch.

    placement [ranks, slots]: the expert in each slot        table of rank 0, 6 experts and 2 copies on 2 ranks
        rank 0   0 1 2 3                                      expert 0: 2 copies, in its slot 0 and on another rank
        rank 1   4 5 0 1                                      expert 4: 1 copy, on another rank

A rank never has two copies of an expert, so there are at most as many as ranks. `ranks` here are the groups that
experts are divided over by number (the mesh's `ep`); ranks of one group hold the same experts. Left out: which
arrangement is a good one (balance.py).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, counted

Placement = NDArray[np.int32]  # [ranks, slots]


@dataclass(frozen=True, slots=True)
class Move:
    """An expert's weights, from a slot of one rank to a slot of another."""

    source: int
    source_slot: int
    target: int
    target_slot: int


def slots_of(experts: int, ranks: int, redundant: int = 0) -> int:
    """How many experts each of `ranks` holds, of `experts` and `redundant` copies.

    Raises ConfigError where they do not divide, and for more copies than ranks can hold."""
    if ranks == 1 and redundant:
        raise ConfigError(
            f"{redundant} redundant experts are copies for other ranks, and there is one (ep 1); choose an --ep of 2 "
            "or more"
        )
    if redundant > experts * (ranks - 1):
        raise ConfigError(
            f"{redundant} redundant experts are more than {ranks} ranks can hold beside {experts} experts, as none "
            f"has an expert twice; choose --redundant-experts of at most {experts * (ranks - 1)}"
        )
    if (experts + redundant) % ranks:
        copies = f" and {counted(redundant, 'copy', 'copies')}" if redundant else ""
        more = redundant + ranks - (experts + redundant) % ranks
        raise ConfigError(
            f"{experts} experts{copies} do not divide over {ranks} ranks (ep); choose an --ep that divides them, or "
            f"--redundant-experts {more}"
        )
    return (experts + redundant) // ranks


def first_placement(experts: int, ranks: int, redundant: int = 0) -> Placement:
    """The one before anything has been counted: experts in order, then the first ones again. Raises as `slots_of`."""
    slots = slots_of(experts, ranks, redundant)
    return (np.arange(ranks * slots) % experts).reshape(ranks, slots).astype(np.int32)


def copies_of(placement: Placement, experts: int) -> NDArray[np.int64]:
    """[experts]: how many copies of each there are."""
    return np.bincount(placement.ravel(), minlength=experts)


def holds(placement: Placement, experts: int) -> NDArray[np.bool_]:
    """[ranks, experts]: whether a rank has an expert."""
    found = np.zeros((len(placement), experts), np.bool_)
    np.put_along_axis(found, placement, True, axis=1)
    return found


def table_of(placement: Placement, rank: int, experts: int, most: int) -> NDArray[np.int32]:
    """The lines of `Places` (engine/kernels/experts/reference.py) that `rank` routes by: [experts, 1 + most] int32."""
    table = whole_table(placement, experts, most)
    slots, copies = placement.shape[1], table[:, 1:]
    copies[copies // slots != rank] = -1
    copies[copies >= 0] -= rank * slots
    return table


def whole_table(placement: Placement, experts: int, most: int) -> NDArray[np.int32]:
    """As `table_of`, with the places of copies on all ranks, rank * slots + slot: [experts, 1 + most] int32."""
    table = np.full((experts, 1 + most), -1, np.int32)
    table[:, 0] = 0
    for holder, line in enumerate(placement):
        table[line, 0] += 1  # no expert is twice in a line
        table[line, table[line, 0]] = holder * len(line) + np.arange(len(line))
    return table


def rank_loads(counts: NDArray[np.int64], placement: Placement) -> NDArray[np.float64]:
    """[ranks]: choices that each rank computes, of `counts` [experts], as tokens are spread over copies evenly."""
    each = counts / np.maximum(copies_of(placement, len(counts)), 1)
    loads: NDArray[np.float64] = each[placement].sum(axis=1)
    return loads


def imbalance(loads: NDArray[np.float64]) -> float:
    """The largest load over the mean one: 1 where all are alike, or nothing has been counted."""
    mean = float(loads.mean())
    return float(loads.max()) / mean if mean else 1.0


def arranged(old: Placement, new: Placement) -> Placement:
    """`new` with as much in place as in `old` as there can be cheaply: its lines go to the ranks that have most of
    their experts already, the best pair first, and what a rank has stays in its slot. All ranks are alike here."""
    experts = 1 + int(old.max())
    shared = holds(old, experts).astype(np.int64) @ holds(new, experts).astype(np.int64).T
    lines = np.empty_like(new)
    for _ in range(len(old)):
        rank, line = np.unravel_index(int(shared.argmax()), shared.shape)
        lines[rank] = _kept(old[rank], new[line])
        shared[rank], shared[:, line] = -1, -1
    return lines


def _kept(old: NDArray[np.int32], new: NDArray[np.int32]) -> NDArray[np.int32]:
    stays = np.isin(old, new)
    line = old.copy()
    line[~stays] = new[~np.isin(new, old)]
    return line


def moves(old: Placement, new: Placement) -> list[Move]:
    """What travels to make `new` of `old`, in one order on all ranks. Of several copies, the one is sent whose rank has
    sent the least so far."""
    sent = [0] * len(old)
    found = []
    for target, slot in zip(*np.nonzero(old != new), strict=True):
        holders, places = np.nonzero(old == new[target, slot])
        source, place = min(zip(holders.tolist(), places.tolist(), strict=True), key=lambda each: sent[each[0]])
        sent[source] += 1
        found.append(Move(source, place, int(target), int(slot)))
    return found
