"""The board: each front writes its own row, all see the sum, and a row of who is gone is zero."""

import os

import pytest

from engine.runtime.board import ROW, Board, Counter


def test_a_front_that_is_alone_counts_for_itself() -> None:
    board = Board()
    board.add(Counter.REQUESTS, 3)
    board.add(Counter.REQUESTS, -1)
    board.set(Counter.STORED_BYTES, 1 << 40)
    assert board.total(Counter.REQUESTS) == board.own(Counter.REQUESTS) == 2
    assert board.total(Counter.STORED_BYTES) == 1 << 40
    assert board.total(Counter.CONNECTIONS) == 0


def test_fronts_see_each_other_and_write_their_own_row_alone() -> None:
    shared = Board.shared(3)
    assert shared.descriptor is not None
    fronts = [Board(os.dup(shared.descriptor), number, 3) for number in range(3)]
    for front in fronts:
        front.add(Counter.CONNECTIONS, front.number + 1)
    assert [board.total(Counter.CONNECTIONS) for board in (shared, *fronts)] == [6] * 4
    assert [fronts[0].of(number, Counter.CONNECTIONS) for number in range(3)] == [1, 2, 3]
    assert fronts[1].own(Counter.CONNECTIONS) == 2
    shared.clear(1)
    assert [front.total(Counter.CONNECTIONS) for front in fronts] == [4] * 3
    assert fronts[1].own(Counter.CONNECTIONS) == 0
    for board in (shared, *fronts):
        board.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a second process")
def test_a_process_that_inherits_the_descriptor_has_the_same_board() -> None:
    shared = Board.shared(2)
    child = os.fork()
    if not child:
        Board(shared.descriptor, 1, 2).add(Counter.REQUESTS, 7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert shared.of(1, Counter.REQUESTS) == shared.total(Counter.REQUESTS) == 7
    shared.close()


def test_counters_fit_into_a_row() -> None:
    assert 8 * len(Counter) <= ROW
