"""Experts on ranks: what the balancer finds is an arrangement, and near the best there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.parallel.balance import balanced, check, gain, pack, replicate
from engine.parallel.placement import (
    Placement,
    arranged,
    copies_of,
    first_placement,
    imbalance,
    moves,
    rank_loads,
    slots_of,
    table_of,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.int64], int, int]:
    """Counts of experts, and ranks and slots that hold them."""
    ranks, experts = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    least = -(-experts // ranks)
    slots = draw(st.integers(least, experts))
    counts = draw(st.lists(st.integers(0, 10_000), min_size=experts, max_size=experts))
    return np.array(counts, np.int64), ranks, slots


# ── the balancer ─────────────────────────────────────────────────────────────────────────────


@given(cases())
def test_each_expert_lies_somewhere_and_none_twice_on_a_rank(case: tuple[NDArray[np.int64], int, int]) -> None:
    counts, ranks, slots = case
    placement = balanced(counts, ranks, slots)
    assert placement.shape == (ranks, slots) and placement.dtype == np.int32
    check(placement, len(counts))
    assert np.isclose(rank_loads(counts, placement).sum(), counts.sum())


@given(cases())
def test_the_busiest_copy_is_as_light_as_can_be(case: tuple[NDArray[np.int64], int, int]) -> None:
    """Fewer copies in all for a lighter largest one are not enough: each expert needs ceil(load / limit)."""
    counts, ranks, slots = case
    loads = counts.astype(float)
    copies = replicate(loads, ranks * slots, ranks)
    assert copies.sum() == ranks * slots and copies.min() >= 1 and copies.max() <= ranks
    worst = (loads / copies).max()
    capped = (loads / ranks).max()  # an expert cannot have more copies than there are ranks
    if worst > capped * (1 + 1e-9):
        needed = np.ceil(loads / (worst * (1 - 1e-9))).clip(min=1)
        assert needed.sum() > ranks * slots


def best(counts: NDArray[np.int64], ranks: int, slots: int) -> float:
    """The least imbalance of any arrangement."""
    experts, found = len(counts), np.inf
    lines = list(itertools.combinations(range(experts), slots))
    for chosen in itertools.combinations_with_replacement(lines, ranks):
        placement = np.array(chosen, np.int32)
        if copies_of(placement, experts).min() > 0:
            found = min(found, imbalance(rank_loads(counts, placement)))
    return found


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(6, 2, 3), (6, 2, 4), (6, 3, 2), (5, 3, 2), (6, 3, 3)])
def test_near_the_best_arrangement(experts: int, ranks: int, slots: int) -> None:
    """Of all arrangements, on skewed counts: 6% more than the least on average, 25% at most."""
    generator = np.random.default_rng(0)
    over = []
    for _ in range(12):
        counts = (generator.pareto(1.2, experts) * 100).astype(np.int64) + 1
        over.append(imbalance(rank_loads(counts, balanced(counts, ranks, slots))) / best(counts, ranks, slots))
    assert min(over) > 1 - 1e-9 and np.mean(over) < 1.06 and max(over) < 1.25


def test_a_hot_expert_gets_the_copies() -> None:
    counts = np.array([900, 10, 10, 10, 10, 10, 10, 40])
    placement = balanced(counts, 4, 3)
    assert copies_of(placement, 8).tolist() == [4, 1, 1, 1, 1, 1, 1, 2]
    first = first_placement(8, 4, 4)
    assert imbalance(rank_loads(counts, first)) > 1.8 and imbalance(rank_loads(counts, placement)) < 1.06
    assert 0.4 < gain(counts, first, placement) < 0.5 and gain(counts, placement, first) < 0


def test_packing_exchanges_where_only_bins_with_the_expert_have_room() -> None:
    """LPT alone ends where the last copy of 9 has room beside the other one only."""
    loads, experts = np.array([5.0, 5.0, 4.0, 3.0, 1.0, 1.0]), np.array([0, 1, 2, 3, 9, 9])
    bins = pack(loads, experts, 2, 3)
    assert sorted(expert for line in bins for expert in line) == [0, 1, 2, 3, 9, 9]
    assert all(9 in line for line in bins)


# ── placements ───────────────────────────────────────────────────────────────────────────────


@given(cases(), st.integers(0, 2**32 - 1))
def test_moves_make_one_arrangement_of_another(case: tuple[NDArray[np.int64], int, int], seed: int) -> None:
    counts, ranks, slots = case
    old = balanced(np.random.default_rng(seed).permutation(counts), ranks, slots)
    new = arranged(old, balanced(counts, ranks, slots))
    assert sorted(map(sorted, new.tolist())) == sorted(map(sorted, balanced(counts, ranks, slots).tolist()))
    made = old.copy()
    for move in moves(old, new):
        assert move.source != move.target, "what a rank has already stays in its slot"
        made[move.target, move.target_slot] = old[move.source, move.source_slot]
    assert np.array_equal(made, new)
    assert moves(new, new) == []


def test_of_several_copies_each_rank_sends_as_many() -> None:
    old, new = (
        np.array([[0, 1], [0, 2], [3, 4], [5, 6]], np.int32),
        np.array([[0, 1], [0, 2], [0, 4], [0, 6]], np.int32),
    )
    assert [move.source for move in moves(old, new)] == [0, 1]


def test_tables_say_where_the_copies_of_an_expert_lie() -> None:
    placement: Placement = np.array([[0, 1, 2], [2, 3, 0]], np.int32)
    assert table_of(placement, 0, 4, 2).tolist() == [[2, 0, -1], [1, 1, -1], [2, 2, -1], [1, -1, -1]]
    assert table_of(placement, 1, 4, 2).tolist() == [[2, -1, 2], [1, -1, -1], [2, -1, 0], [1, 1, -1]]


@pytest.mark.parametrize(("experts", "ranks", "redundant"), [(8, 2, 0), (8, 2, 8), (5, 3, 1), (256, 96, 32), (8, 1, 0)])
def test_the_first_placement_has_every_expert(experts: int, ranks: int, redundant: int) -> None:
    placement = first_placement(experts, ranks, redundant)
    assert placement.shape == (ranks, slots_of(experts, ranks, redundant))
    check(placement, experts)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="7 experts do not divide over 2 ranks"):
        slots_of(7, 2)


def test_nothing_counted_is_even() -> None:
    assert imbalance(np.zeros(3)) == 1.0
    assert rank_loads(np.array([4, 2]), np.array([[0], [1], [0]], np.int32)).tolist() == [2, 2, 2]
