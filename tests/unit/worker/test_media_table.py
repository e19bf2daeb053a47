"""The worker's table of media: each thing has memory of its own."""

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from engine.messages.assets import Bound, Load, Loaded
from engine.messages.media import MEDIA, MediaUse, Pixels, packed
from engine.messages.step import SlotAdmit, StepPlan
from engine.params.sampling import Sampling
from engine.worker.media import MediaTable

WIDTH = 4
GREEDY = Sampling(0.0, 0, 1.0, 0.0, 0)


class Tower:
    """Encodes all together: each of `grid[0]` embeddings repeats a pixel of its medium."""

    turns, levels, width, dtype = False, 0, WIDTH, torch.float32

    def __init__(self) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []  # how many tensors of steps before were there when it was asked

    def encode(self, media: Sequence[Pixels]) -> list[Tensor]:
        self.alive.append(sum(each() is not None for each in self.made))
        together = torch.cat([torch.full((each.grid[0], WIDTH), float(each.data[0])) for each in media])
        self.made.append(weakref.ref(together))
        return list(together.split([each.grid[0] for each in media]))


class Table:
    """A table of media of four slots, on a CPU, told as a worker is."""

    def __init__(self) -> None:
        self.tower = Tower()
        tower: Any = self.tower
        self.table = MediaTable(tower, 4, torch.device("cpu"), embeds=True)

    def show(self, sizes: dict[int, int], *, forgets: Sequence[int] = (), slot: int = 0) -> None:
        """A step that makes media of these sizes, by number, for a request in `slot`, after it forgets others."""
        told: list[Loaded] = []
        for number, size in sizes.items():
            payload = packed(Pixels(bytes([number]) * size, (size,), (size,), 1.0, (0.0,), (1.0,)))
            self.table.load(Load(MEDIA, number, payload), told.append)
        assert not any(each.cause for each in told)
        ends = np.cumsum([0, *sizes.values()]).tolist()
        uses = [MediaUse(((at, size),), size) for at, size in zip(ends, sizes.values(), strict=False)]
        bound = [Bound(MEDIA, number, msgspec.msgpack.encode(use)) for number, use in zip(sizes, uses, strict=True)]
        admit = SlotAdmit(slot, bytes(4 * ends[-1]), GREEDY, ends[-1], bound=tuple(bound))
        lines = [np.array([(slot, each) for each in numbers], "<i4").tobytes() for numbers in (sizes, forgets)]
        plan = StepPlan(1, b"", b"", b"", b"", (admit,))
        self.table.apply(replace(plan, encodes=lines[0], forgets=lines[1]))
        assert not self.table.take_failed()

    def held(self) -> dict[int, int]:
        """Bytes of memory that each of those held keeps from being freed, by number."""
        return {number: each.untyped_storage().nbytes() for number, each in self.table._held.items()}


def own(size: int) -> int:
    return size * WIDTH * 4


def test_what_stays_of_media_encoded_together_keeps_no_memory_of_the_others() -> None:
    table = Table()
    table.show({1: 3, 2: 2, 3: 4})
    assert len(table.tower.alive) == 1, "they are encoded together"
    assert table.held() == {1: own(3), 2: own(2), 3: own(4)}
    assert {number: each.unique().tolist() for number, each in table.table._held.items()} == {1: [1], 2: [2], 3: [3]}
    (together,) = table.tower.made
    assert together() is None
    table.show({4: 1}, forgets=[1, 3])
    assert table.held() == {2: own(2), 4: own(1)}


def test_what_is_dropped_is_gone_whole() -> None:
    table = Table()
    table.show({1: 3, 2: 2})
    table.table.drop(1)
    assert (table.held(), list(table.table._pixels)) == ({2: own(2)}, [2])


def test_a_row_behind_all_that_it_shows_looks_at_none_of_it() -> None:
    """In a step where another row shows something; it would once for each slice of a clip."""
    table = Table()
    table.show({1: 3, 2: 2}, slot=0)
    table.show({3: 4}, slot=1)
    looked: list[int] = []

    class Looked(list[Any]):
        def __iter__(self) -> Any:
            looked.append(len(self))
            return super().__iter__()

    table.table._slots[0].uses = Looked(table.table._slots[0].uses)
    for start, looks in ((5, []), (4, [2])):
        rows: Any = SimpleNamespace(slots=np.array([0, 1]), starts=np.array([start, 1]), lengths=np.array([1, 2]))
        shown = table.table.shown(rows)
        assert looked == looks and shown.embeddings is not None
        assert shown.embeddings[:, 0].tolist() == [2.0] * len(looks[:1]) + [3.0, 3.0]


def test_many_media_leave_what_few_do() -> None:
    """Each step shows another two, in the next slot, and drops those of four steps before."""
    table, seen = Table(), set()
    for step in range(40):
        table.show({2 * step + 1: 3, 2 * step + 2: 2}, slot=step % 4)
        for number in (2 * step - 7, 2 * step - 6):
            table.table.drop(number)
        if step >= 4:
            kept = table.table
            counts = (len(each) for each in (kept._pixels, kept._held, kept._slots, kept.failed))
            seen.add((*counts, sum(table.held().values())))
    assert seen == {(8, 8, 4, 0, 4 * own(5))}
