"""Steps from rows of numbers and back, for tests and benchmarks that do without a scheduler or a device."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from engine.messages.step import SlotAdmit, StepPlan

Row = tuple[int, int, int, int]  # slot, start, length, what it yields


def step_plan(
    step: int,
    rows: Iterable[Sequence[int]],
    admits: Iterable[SlotAdmit] = (),
    pages: Iterable[Sequence[int]] = (),
) -> StepPlan:
    """The plan of a step of these `rows`, each as in Row. `pages` are slot, index in the slot's page list, page."""
    numbers = array("i", map(int, chain.from_iterable(rows)))
    slots, starts, lengths, yields = (numbers[column::4].tobytes() for column in range(4))
    return StepPlan(
        step=step,
        slots=slots,
        starts=starts,
        lengths=lengths,
        yields=yields,
        admits=tuple(admits),
        pages=array("i", map(int, chain.from_iterable(pages))).tobytes(),
    )


def rows_of(plan: StepPlan) -> Iterator[Row]:
    """The rows of a plan."""
    columns = (array("i", column) for column in (plan.slots, plan.starts, plan.lengths, plan.yields))
    return zip(*columns, strict=True)
