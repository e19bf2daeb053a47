"""Which rows share a prefix: against what can be read from the page table row by row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.worker.steps import prefixes
from engine.worker.steps.prefixes import SharedPrefixes

PAGE = 4


def shared(lines: dict[int, list[int]], *, slots: int = 40, pages: int = 64) -> SharedPrefixes:
    """A table with these pages of these slots."""
    table = SharedPrefixes(slots, pages, PAGE)
    triples = [(slot, index, page) for slot, line in lines.items() for index, page in enumerate(line)]
    table.apply(np.array(triples, np.int32), admitted=True)
    return table


def found(table: SharedPrefixes, starts: dict[int, int]) -> list[tuple[list[int], int]]:
    slots = np.array(list(starts))
    got = table.find(slots, np.array(list(starts.values())))
    return [(slots[prefix.rows].tolist(), prefix.positions) for prefix in got]


def groups(count: int, sizes: list[int], own: int) -> dict[int, list[int]]:
    """Slots whose first `count` pages are those of their group, and `own` more of their own."""
    lines, fresh = {}, iter(range(1, 100_000))
    for size in sizes:
        prefix = [next(fresh) for _ in range(count)]
        for _ in range(size):
            lines[len(lines)] = prefix + [next(fresh) for _ in range(own)]
    return lines


def test_each_group_has_its_prefix_and_loners_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "LEAST_SAVED", 64)
    lines = groups(20, [7, 1, 9, 3], own=3)
    table = shared(lines)
    starts = {slot: 22 * PAGE + slot % 4 for slot in lines}
    assert found(table, starts) == [(list(range(7)), 80), (list(range(8, 17)), 80), ([17, 18, 19], 80)]
    some = {slot: starts[slot] for slot in (*range(5, 19), 0, 3)}  # in another order, fewer of each
    assert found(table, some) == [([5, 6, 0, 3], 80), (list(range(8, 17)), 80), ([17, 18], 80)]


def test_a_prefix_ends_where_the_first_row_ends() -> None:
    """The page of a row's own token is never part of it, nor are leftovers in the table behind it."""
    lines = groups(60, [20], own=0)
    starts = dict.fromkeys(lines, 59 * PAGE + 1) | {3: 40 * PAGE + 2}
    assert found(shared(lines), starts) == []  # 20 x 40 pages are too little
    lines = {slot: line * 4 for slot, line in groups(64, [20], own=0).items()}
    table = shared(lines, pages=300)
    assert found(table, dict.fromkeys(lines, 250 * PAGE) | {3: 200 * PAGE + 2}) == [(list(range(20)), 800)]


def test_little_is_not_worth_it() -> None:
    assert found(shared(groups(3, [20], own=30)), dict.fromkeys(range(20), 33 * PAGE)) == []
    few = groups(60, [12], own=1)
    assert found(shared(few), dict.fromkeys(few, 60 * PAGE)) == []  # a step of few rows


def test_it_is_looked_up_anew_when_slots_change_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "LEAST_SAVED", 64)
    lines = groups(20, [16], own=2)
    table = shared(lines)
    starts = dict.fromkeys(lines, 21 * PAGE)
    assert found(table, starts) == [(list(range(16)), 80)]
    table.apply(np.array([[2, 22, 5000]], np.int32), admitted=False)  # a row grows: nothing to look up
    assert found(table, {slot: start + 4 for slot, start in starts.items()}) == [(list(range(16)), 80)]
    table.apply(np.array([[5, index, 6000 + index] for index in range(22)], np.int32), admitted=True)
    assert found(table, starts) == [([*range(5), *range(6, 16)], 80)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 3)), min_size=16, max_size=40))
def test_what_is_found_is_shared(rows: list[tuple[int, int, int]]) -> None:
    """Rows (stem, pages of it, pages of their own): whatever is found, all of its rows have the same pages there."""
    lines, starts = {}, {}
    for slot, (stem, common, own) in enumerate(rows):
        lines[slot] = [100 * (stem + 1) + index for index in range(common)]
        lines[slot] += [10_000 + 100 * slot + index for index in range(own + 1)]
        starts[slot] = (common + own) * PAGE + slot % PAGE
    begins = np.array(list(starts.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "LEAST_SAVED", 1)
        patch.setattr(prefixes, "LEAST_SHARE", 0.0)
        got = shared(lines).find(np.arange(len(rows)), begins)
    seen: set[int] = set()
    for prefix in got:
        pages = prefix.positions // PAGE
        assert len(prefix.rows) > 1 and pages > 0 and prefix.positions % PAGE == 0
        assert seen.isdisjoint(prefix.rows.tolist())
        seen.update(prefix.rows.tolist())
        assert len({tuple(lines[row][:pages]) for row in prefix.rows.tolist()}) == 1
        assert (begins[prefix.rows] >= prefix.positions).all()
