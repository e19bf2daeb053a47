"""Sleeps that end in time: the kernel may end a thread's sleep 50 us late, to end several together.

A worker sleeps that long between two looks at its device (loop.py), so a step's end was noticed up to 125 us late, a
sixth of a small model's step, and some later than others. Left out: systems other than Linux, which are left as they
are.
"""

import ctypes
import sys

PR_SET_TIMERSLACK = 29  # of <sys/prctl.h>
SLACK = 1_000  # nanoseconds


def sleep_precisely() -> bool:
    """For this thread and those that it starts; whether the system knows of this."""
    if sys.platform != "linux":
        return False
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(PR_SET_TIMERSLACK, SLACK, 0, 0, 0) == 0
