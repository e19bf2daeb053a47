"""Which pages steps under way may use: none is forgotten, whatever slots are given meanwhile."""

from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.messages.step import DRAFTS, TOKEN, StepPlan
from engine.worker.runner import Runner
from engine.worker.steps.copies import Copy
from engine.worker.steps.uses import PageUses

SLOTS, EACH, PAGE, PAGES = 3, 4, 2, 12


class End:
    """Of a step."""

    def __init__(self) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over


def plan(rows: list[tuple[int, int, int]], pages: list[tuple[int, int, int]], yields: int = TOKEN) -> StepPlan:
    """Rows are slot, start, length; pages slot, index, page."""
    columns = [array("i", column).tobytes() for column in zip(*[(*row, yields) for row in rows], strict=True)]
    names = ("slots", "starts", "lengths", "yields")
    packed = array("i", [number for line in pages for number in line]).tobytes()
    return StepPlan(0, **dict(zip(names, columns, strict=False)), pages=packed)  # type: ignore[arg-type]


def busy(uses: PageUses) -> set[int]:
    return {page for page in range(PAGES) if uses.busy(np.array([page]))}


def test_a_step_uses_the_pages_of_its_rows_until_it_is_over() -> None:
    uses, end = PageUses(SLOTS, EACH, PAGE, PAGES), End()
    uses.launched(plan([(1, 2, 1)], [(1, 0, 5), (1, 1, 6), (1, 2, 7), (2, 0, 8)]), end)
    assert busy(uses) == {5, 6}  # two pages hold three tokens, and slot 2 has no row
    assert uses.busy(np.array([3, 6])) and not uses.busy(np.array([3, 7]))
    uses.launched(plan([(1, 3, 1)], [(1, 0, 9)]), last := End())
    assert busy(uses) == {5, 6, 9}  # 5 is the first one's
    end.over = True
    assert busy(uses) == {6, 9}
    last.over = True
    assert not busy(uses)


def test_a_row_of_drafts_may_use_all_pages_of_its_slot() -> None:
    uses = PageUses(SLOTS, EACH, PAGE, PAGES)
    uses.launched(plan([(1, 0, 1)], [(1, index, 5 + index) for index in range(EACH)], DRAFTS), End())
    assert busy(uses) == {5, 6, 7, 8}


class Recorded(End):
    """An event of a device that is not there."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def record(self) -> None:
        pass


def test_a_copy_of_attention_looks_at_its_own_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its runner tells of each step that it launches."""
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    uses, ran = PageUses(SLOTS + 1, EACH, PAGE, PAGES), SimpleNamespace(moved=lambda _: None)
    runner: Any = SimpleNamespace(
        copy=Copy(1, 2, SLOTS), media=None, device=SimpleNamespace(type="cuda"), transfers=uses, _ahead_of=None,
        _run=lambda *_: ran,
    )  # fmt: skip
    Runner.launch(runner, plan([(1, 0, 1), (SLOTS + 2, 0, 1)], [(1, 0, 5), (SLOTS + 2, 0, 6)]))
    assert busy(uses) == {6}


@st.composite
def launches(draw: st.DrawFn) -> list[Any]:
    """Plans, and how many of the oldest steps are over before each."""
    page = st.tuples(st.integers(0, SLOTS - 1), st.integers(0, EACH - 1), st.integers(0, PAGES - 1))
    row = st.tuples(st.integers(0, SLOTS - 1), st.integers(0, PAGE * EACH - 3), st.integers(1, 2))
    one = st.tuples(st.lists(row, max_size=3, unique_by=lambda each: each[0]), st.lists(page, max_size=5))
    return draw(st.lists(st.tuples(one, st.integers(0, 2)), max_size=8))


@given(launches())
def test_no_page_is_forgotten(steps: list[Any]) -> None:
    uses, table = PageUses(SLOTS, EACH, PAGE, PAGES), np.zeros((SLOTS, EACH), int)
    under_way: list[tuple[End, set[int]]] = []
    for (rows, pages), over in steps:
        for end, _ in under_way[:over]:
            end.over = True
        del under_way[:over]
        for slot, index, page in pages:
            table[slot, index] = page
        used = {int(page) for slot, start, length in rows for page in table[slot, : -(-(start + length) // PAGE)]}
        under_way.append((End(), used))
        uses.launched(plan(rows, pages), under_way[-1][0])
        assert busy(uses) >= set().union(*(each for _, each in under_way))
    for end, _ in under_way:
        end.over = True
    assert not busy(uses)
