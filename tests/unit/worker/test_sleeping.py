"""A worker's sleeps end in time, and those of others are left as they are."""

import ctypes
import sys
import threading

import pytest

from engine.worker.sleeping import SLACK, sleep_precisely

PR_GET_TIMERSLACK = 30


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux alone")
def test_the_system_may_end_sleeps_of_this_thread_a_microsecond_late() -> None:
    libc = ctypes.CDLL(None)
    slack = libc.prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0)
    found = []

    def thread() -> None:
        found.append(sleep_precisely())
        found.append(libc.prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0))

    other = threading.Thread(target=thread)
    other.start()
    other.join()
    assert found == [True, SLACK]
    assert libc.prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0) == slack != SLACK
