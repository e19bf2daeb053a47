"""Maps of pages: each letter is that of who has the page, on the device and below it, and a map's work is bounded."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batcher import Bench, request
from test_moves import LONG, OTHER, TierBench

from engine.cache.maps import CELLS, MOST_MARKED, OWN, SHARED, map_of, map_of_store
from engine.messages.looking import PagesLook
from engine.sched.looking import look_at_cache, parts_of


class Counted(list[int]):
    """Pages, which count how many of them are taken out."""

    taken = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        Counted.taken += len(found)
        return found


def maps(bench: Bench) -> list[str]:
    """Those of the device, of the host and of the store."""
    pages, _, tiers = look_at_cache(parts_of(bench.scheduler), 30 * 100)
    return [pages.owners, *(each.map.owners for each in tiers)]


def mapped(taken: bytes, shared: Sequence[int], own: Sequence[Sequence[int]]) -> PagesLook:
    return map_of(taken, b".c", {SHARED: [(shared, 0)], OWN: [(pages, 0) for pages in own]})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("csr."), st.integers(1, 240)), min_size=1, max_size=8))
def test_a_map_has_a_letter_for_each_page_or_for_most_of_several(runs: list[tuple[str, int]]) -> None:
    owners = "".join(letter * count for letter, count in runs)
    places: dict[str, list[int]] = {letter: [at for at, each in enumerate(owners) if each == letter] for letter in "sr"}
    told = mapped(bytes(letter != "." for letter in owners), places["s"], [places["r"][:MOST_MARKED]])
    assert (
        len(told.owners) <= CELLS and (len(told.owners) - 1) * told.each < len(owners) <= len(told.owners) * told.each
    )
    if max(map(len, places.values())) > MOST_MARKED:
        return
    for cell, letter in enumerate(told.owners):
        part = owners[cell * told.each : (cell + 1) * told.each]
        marked = "s" in part or "r" in part
        assert part.count(letter) == max(map(part.count, ".csr")) if marked else letter == part[0]


def test_of_many_pages_one_stands_for_several() -> None:
    shared = Counted(range(10_000))
    own = [Counted(range(10_000 + 200 * row, 10_200 + 200 * row)) for row in range(100)]
    taken = bytes([1] * 35_000 + [0] * 5_000)  # the last ones that are taken are cached alone
    Counted.taken = 0
    told = mapped(taken, shared, own)
    assert 2 * MOST_MARKED * 0.9 < Counted.taken <= 2 * MOST_MARKED
    cells = [told.owners[first // told.each] for first in (5_000, 15_000, 25_000, 32_000, 38_000)]
    assert (cells, told.each) == (["s", "r", "r", "c", "."], 79)
    assert [told.owners.count(letter) for letter in "src."] == pytest.approx([127, 253, 64, 63], abs=4)


def test_a_page_that_many_share_is_looked_at_once() -> None:
    bench = Bench(pages=600, page_size=4, slots=8, max_step_tokens=4096)
    bench.admit(*(request(str(row), [0, 1, 2, 3] * 50 + [row % 4] * 8, max_new=9) for row in range(8)))
    for _ in range(4):
        bench.step()
    assert len({id(each.node) for each in bench.scheduler.running_requests()}) == 4
    for node in bench.scheduler.cache.tree.nodes():
        node.pages = Counted(node.pages)
    Counted.taken = 0
    (device,) = maps(bench)
    pages = bench.scheduler.counts()["pages"] - bench.scheduler.counts()["pages_free"]
    assert Counted.taken == bench.scheduler.cache.tree.size < pages and device.count("s") == Counted.taken // 2


def test_pages_that_move_and_that_are_kept_are_told_apart() -> None:
    bench = TierBench(24, pages=12, slots=2)
    bench.admit(request("a", LONG, max_new=2, session="one"))
    bench.finish()  # what the store has is known, and there is nothing for it
    bench.finish()
    bench.plan()
    assert [move.way for move in bench.below.moving] == ["down"]
    assert maps(bench) == ["oooooooor...", 8 * "i" + 16 * ".", ""]
    bench.finish()
    assert [move.way for move in bench.below.moving] == ["keep"]
    assert maps(bench) == ["ssssssssr...", 8 * "o" + 16 * ".", "iiiiiiii"]
    bench.finish()
    while bench.live:
        Bench.step(bench)
    assert maps(bench) == ["kkkkkkkk....", 8 * "a" + 16 * ".", ""]
    bench.admit(request("b", OTHER, max_new=1))
    while bench.live or bench.below.moving:
        bench.step()
    assert "k" not in maps(bench)[0]  # the session had to give up what it had
    bench.scheduler.tiers.counts.store_pages, bench.scheduler.tiers.counts.store_bytes = 18, 18 * 100
    bench.admit(request("c", LONG, max_new=1))
    while bench.plan() is None and not any(move.way == "up" for move in bench.below.moving):
        bench.finish()
    device, host, store = maps(bench)
    assert device.count("i") == host.count("o") == 6 and host.count("c") == 10 and store == 18 * "c" + 12 * "."
    while bench.live:
        bench.step()
    assert maps(bench)[1] == 8 * "a" + 10 * "c" + 6 * "."
    bench.drain()


@pytest.mark.parametrize(
    ("figures", "letters", "each"),
    [
        ((0, 0, 0, 0), "", 1),
        ((10, 4, 2, 1), "ii" + "o" + "ccc" + "....", 1),
        ((0, 3, 1, 5), "i" + "ooo", 1),
        ((2048, 1000, 4, 0), "i" + 250 * "c" + 261 * ".", 4),
    ],
)
def test_a_store_tells_no_places(figures: tuple[int, int, int, int], letters: str, each: int) -> None:
    told = map_of_store(*figures)
    assert (told.owners, told.each) == (letters, each)
