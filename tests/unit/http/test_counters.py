"""Counts in shared memory: rows add up, outlive their front, and never go backwards."""

import os

import pytest

from engine.http import counters
from engine.http.counters import BUCKETS, ENDPOINTS, OTHER, REASONS, ROW_BYTES, Histogram, Row, Rows, TokenTimes
from engine.messages.control import Stats
from engine.runtime.board import KEPT, Board


def memories(count: int) -> list[memoryview]:
    return [memoryview(bytearray(KEPT)) for _ in range(count)]


def test_a_row_fits_into_what_a_front_keeps() -> None:
    assert ROW_BYTES <= KEPT
    row = Row(memoryview(bytearray(KEPT)))
    places = sorted(counters.PLACES.values())
    assert places[0] == counters.HISTOGRAMS_AT and len(row.counts) * 8 == ROW_BYTES
    for name in BUCKETS:  # the last cell of each is there, and no other's
        Histogram(row, name).observe(1e9)
    assert [row.histogram(name)[0][-1] for name in BUCKETS] == [1] * len(BUCKETS)
    assert [sum(row.histogram(name)[0]) for name in BUCKETS] == [1] * len(BUCKETS)


def test_rows_add_up() -> None:
    both = memories(2)
    first, second = map(Row, both)
    for row, times in ((first, 2), (second, 3)):
        for _ in range(times):
            row.count_request("chat", "stop")
            row.count_error(503)
    second.count_request("mine", "error")
    second.count_error(400)
    rows = Rows(both)
    assert rows.requests() == {("chat", "stop"): 5, ("mine", "error"): 1}
    assert rows.errors() == {400: 1, 503: 5}


def test_times_are_in_the_bucket_whose_bound_they_do_not_pass() -> None:
    memory = memories(1)
    histogram = Histogram(Row(memory[0]), "inter_token")
    histogram.observe(0.001)
    histogram.observe(0.0011, 3)
    histogram.observe(7.0)
    buckets, total = Rows(memory).histogram("inter_token")
    assert buckets[:3] == [("0.001", 1), ("0.002", 4), ("0.005", 4)] and buckets[-1] == ("+Inf", 5)
    assert total == pytest.approx(0.001 + 0.0033 + 7)


def test_times_that_are_alike_are_counted_together() -> None:
    memory = memories(1)
    rows, times = Rows(memory), TokenTimes(Row(memory[0]))
    times.observe(0.004, 2)
    times.alike += 3  # as the replies of one step do
    assert rows.histogram("inter_token")[1] == 0
    times.observe(0.04)
    assert dict(rows.histogram("inter_token")[0])["0.005"] == dict(rows.histogram("inter_token")[0])["+Inf"] == 5
    times.settle()
    times.settle()
    buckets, total = rows.histogram("inter_token")
    assert buckets[-1] == ("+Inf", 6) and total == pytest.approx(0.06)


def test_endpoints_beyond_the_last_place_are_counted_together() -> None:
    (memory,) = memories(1)
    row = Row(memory)
    for number in range(ENDPOINTS + 3):
        row.count_request(f"plugin {number}", REASONS[0])
        row.count_request(f"plugin {number}", REASONS[-1])
    counted = row.requests()
    assert counted["plugin 30", "stop"] == counted["plugin 30", "error"] == 1
    assert counted[OTHER, "stop"] == 4 and sum(counted.values()) == 2 * (ENDPOINTS + 3)
    assert Row(memory).requests() == counted  # as a successor finds it
    long = Row(memories(1)[0])
    long.count_request("é" * 50, "stop")
    long.count_request("é" * 50, "stop")
    assert long.requests() == {("é" * 20, "stop"): 2}


def test_what_every_front_hears_is_the_greatest_of_each_bucket() -> None:
    both = memories(2)
    first, second = (Histogram(Row(memory), "step") for memory in both)
    for histogram in (first, second):
        histogram.observe(0.001, 10)
    first.observe(0.02, 5)  # the second was starting
    second.observe(2, 1)  # and the first was
    buckets, total = Rows(both).histogram("step", max)
    assert buckets[0] == ("0.001", 10) and buckets[-1] == ("+Inf", 16)
    assert total == pytest.approx(2.01)


def test_totals_do_not_fall_where_a_front_has_heard_less() -> None:
    both = memories(2)
    first, second = map(Row, both)
    first.keep(Stats("ready", steps=9, idle_seconds_total=1.5))
    first.keep(Stats("ready", steps=8))  # which no core says
    second.keep(Stats("starting"))
    rows = Rows(both)
    assert (rows.total("steps", 0), rows.total("steps", 11)) == (9, 11)
    assert rows.total("idle_seconds_total", 0.0) == 1.5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a second process")
def test_the_counts_of_a_process_that_was_killed_are_there_for_its_successor() -> None:
    board = Board.shared(2)
    child = os.fork()
    if not child:
        row = Row(Board(board.descriptor, 1, 2).kept(1))
        row.count_request("chat", "stop")
        Histogram(row, "request").observe(0.5)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    board.clear(1)  # of the limits, which mean who lives
    successor = Row(board.kept(1))
    successor.count_request("chat", "stop")
    rows = Rows([board.kept(number) for number in range(2)])
    assert rows.requests() == {("chat", "stop"): 2}
    assert rows.histogram("request")[1] == 0.5
