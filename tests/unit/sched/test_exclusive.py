"""What the device has gives way in the host, and goes down again before the device needs its room."""

import random
from typing import get_args

import pytest
from test_batcher import request
from test_moves import LONG, OTHER, TierBench, run

from engine.cache.tiers import WritePolicy


class Counting(TierBench):
    """As TierBench; remembers what went down, by the policy and for a step that waits."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.down = self.held = 0
        begin = self.below.begin

        def counted(move):
            self.down += move.count * (move.way == "down")
            self.held += move.count * (move.way == "down" and move.holds)
            begin(move)

        self.below.begin = counted


def text(number, pages=8):
    return [*[number % 4, number // 4 % 4, *LONG[2:32], *OTHER][: 4 * pages], number % 4]


@pytest.mark.parametrize("write", get_args(WritePolicy))
def test_device_and_host_together_hold_as_many_pages_as_both_have(write):
    """14 texts of 8 pages, where the device has room for 64 pages and the host for 74."""
    bench, order = Counting(74, write=write, stores=False, pages=64), list(range(14))
    for number in order:
        for turn in range(2):  # so that second-hit takes them down, too
            run(bench, f"{number}.{turn}", text(number))
    for turn in range(4):
        random.Random(turn).shuffle(order)
        assert [run(bench, f"{turn} {number}", text(number))[0] for number in order] == [32] * 14
    assert bench.scheduler.tiers.counts.refused == bench.held == 0
    bench.drain()


def test_what_gave_way_is_written_back_once_and_found_again():
    """Of three texts of 8 pages, where device and host have room for 18 each, and 3 of these are ready to give way."""
    bench, down = Counting(18, stores=False, pages=19), []
    for turn, number in enumerate([0, 1, 2, 1, 0, 2, 1, 0]):
        assert run(bench, f"{turn}", text(number))[0] == 32 * (turn > 2)
        down.append(bench.down)
    assert down == [8, 16, 24, 24, 24, 30, 34, 38]  # the last of them is the first that is missed below
    assert bench.held == 0
    bench.drain()


def test_no_step_waits_for_what_a_request_in_the_queue_needs():
    """Four texts at once, in turn with four others, and the device has room for five of them."""
    bench = Counting(60, stores=False, pages=44, max_step_tokens=200)
    for turn in range(6):
        numbers = range(4 * (turn % 2), 4 * (turn % 2) + 4)
        bench.admit(*(request(f"{turn}.{number}", text(number), max_new=2) for number in numbers))
        while bench.live or bench.below.moving:
            bench.step()
        cached = [bench.cached[f"{turn}.{number}"] for number in numbers]
        assert cached == [32 * (turn > 1)] * 4
    assert bench.held == 0 and bench.down > 64
    bench.drain()


@pytest.mark.parametrize("write", ["write-through", "second-hit"])
def test_where_all_fits_the_device_each_page_goes_down_once(write):
    """However small the host is, and even if it fits without room to spare."""
    for host, pages in ((100, 60), (12, 60), (100, 33), (12, 33)):
        bench = Counting(host, write=write, stores=False, pages=pages)
        for turn in range(5):
            for number in range(4):
                assert run(bench, f"{turn}.{number}", text(number))[0] == 32 * (turn > 0)
        assert (bench.down, bench.held, bench.scheduler.tiers.counts.refused) == (32, 0, 0)
        bench.drain()


def test_what_a_scan_computes_pushes_nothing_out_that_was_asked_for_twice():
    """Its pages give way on the device, where their doubles were taken, and come down again as new ones."""
    bench = Counting(16, pages=19, stores=False)
    for turn in range(2):
        run(bench, f"a{turn}", text(0))
    for number in range(1, 16):
        run(bench, f"scan{number}", text(number))
    before = bench.down
    assert before <= 8 + 2 * 8 * 15
    assert run(bench, "again", text(0)) == (32, 1)
    assert bench.scheduler.tiers.counts.from_host == 8
    bench.drain()


def test_what_gave_way_before_a_store_had_it_is_kept_when_it_comes_down_again():
    bench = Counting(18, pages=19)
    tiers = bench.scheduler.tiers
    tiers.keeping._shut, tiers.keeping._until = True, 1e9  # it is offered nothing
    for number in range(3):
        run(bench, f"{number}", text(number))
    assert not bench.below.store
    tiers.keeping._until = 0.0
    while bench.step():
        pass
    assert len(bench.below.store) == len(tiers.host) == 18
    bench.scheduler._pages.evict(19)
    while bench.step():
        pass
    assert len(bench.below.store) == bench.below.done["keep"] == 24
    bench.drain()


def test_what_is_used_again_while_it_goes_down_does_not_give_way_next():
    bench = Counting(16, pages=19, stores=False)
    for number in range(2):
        run(bench, f"a{number}", text(number))
    tiers, pages = bench.scheduler.tiers, bench.scheduler._pages
    bench.admit(request("b", text(2), max_new=1))
    while bench.live:
        bench.plan()
        bench.commit()
    bench.finish(0)
    assert tiers.device.cold
    bench.admit(request("c", text(1), max_new=1))
    bench.plan()
    mine = set(pages.tree.pages(request("x", text(1)).ids))
    assert not tiers.device.cold & mine
    bench.drain()
    assert bench.cached["c"] == 32


def test_what_makes_room_for_a_request_pushes_none_of_its_own_pages_out():
    """They are what the host has not used for longest."""
    bench = Counting(16, "write-back", stores=False, pages=9)
    for number in range(3):
        for turn in range(2):
            run(bench, f"{number}.{turn}", text(number))
    assert run(bench, "again", text(0))[0] == 32
    bench.drain()


@pytest.mark.parametrize("shut", [False, True])
def test_what_is_ready_to_give_way_is_what_gives_way_next(shut):
    """Also where there is not room to spare for all of it, as a store is to be given pages first, and takes none."""
    draw, sizes = random.Random(3), set()
    bench = Counting(16, stores=shut, pages=19, cold=1)
    tiers = bench.scheduler.tiers
    tiers.keeping._shut, tiers.keeping._until = shut, 1e9
    for turn in range(60):
        run(bench, f"{turn}", text(draw.randrange(5), pages=draw.randrange(2, 9)))
        cold = tiers.device.cold
        assert cold == {page for _, pages in tiers._tree.coldest(len(cold)) for page in pages}
        sizes.add(len(cold))
    assert max(sizes) > 4 and bench.down > 60


def test_what_gives_way_next_is_looked_for_once_for_many_pages(monkeypatch):
    """As each look goes through all that is ready: of 50 pages, and no sooner than 7 lack. The host has room."""
    monkeypatch.setattr("engine.cache.tiers.SLACK", 8)
    bench, looks = Counting(400, stores=False, pages=100, cold=2), []
    tiers = bench.scheduler.tiers
    coldest = tiers._tree.coldest
    monkeypatch.setattr(tiers._tree, "coldest", lambda count: looks.append(tiers.ready) or coldest(count))
    draw = random.Random(1)
    for turn in range(120):
        run(bench, f"{turn}", [draw.randrange(4) for _ in range(9)])
        assert len(looks) < 2 or tiers.ready >= 50 - 7 - 3  # of which a request may just have taken three
    assert bench.held == 0
    assert len(looks) > 5 and all(ready < 50 - 6 for ready in looks)
    bench.drain()


@pytest.mark.parametrize("pages", [24, 28, 36, 44])
def test_what_comes_up_for_one_that_waits_does_not_give_way_for_the_next(pages):
    """Five wait for the one slot, longer than it takes to bring their pages up, and the device has no room for all."""
    bench = Counting(48, stores=False, pages=pages, slots=1)
    for number in range(5):
        for turn in range(2):
            run(bench, f"{number}.{turn}", text(number))
    before = bench.scheduler.tiers.counts.from_host
    bench.admit(request("long", [3] * 9, max_new=40))
    bench.step()
    bench.admit(*(request(f"{number}", text(number), max_new=2) for number in range(5)))
    while bench.live or bench.below.moving:
        bench.step()
        if bench.below.moving:
            bench.finish()
    assert [bench.cached[f"{number}"] for number in range(5)] == [32] * 5
    assert bench.scheduler.tiers.counts.from_host - before <= 48  # a turn of one row may take a page of another
    bench.drain()
