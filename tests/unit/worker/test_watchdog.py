"""The watchdog of a rank: heard while the rank is held up, and the end of it where nobody is left to work for."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine.messages import FromWorker
from engine.messages.control import Beat
from engine.parallel.progress import Progress
from engine.runtime.channel import BlockingFrames

HELD_UP = """
import os, socket, sys, time
from engine.messages import ToWorker
from engine.parallel.progress import PROGRESS
from engine.runtime.channel import BlockingFrames
from engine.worker import watchdog

watchdog.BEAT_SECONDS = 0.05
PROGRESS.step = 45
watchdog.watch(BlockingFrames(socket.socket(fileno=int(sys.argv[1])), ToWorker), os.getppid())
with PROGRESS.inside("all_reduce"):
    time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], pass_fds=[int(sys.argv[2])])
print(child.pid, flush=True)
time.sleep(600)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="several ranks of a host are for Linux")


def socket_pair() -> tuple[BlockingFrames[FromWorker], socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    return BlockingFrames(ours, receives=FromWorker), ours, theirs


def test_a_rank_in_a_collective_says_so_each_time() -> None:
    frames, ours, theirs = socket_pair()
    command = [sys.executable, "-c", HELD_UP, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        beats = [frames.receive() for _ in range(4)]
        for beat in beats[1:]:  # the first may come before the collective begins
            assert isinstance(beat, Beat)
            assert (beat.step, beat.collective, beat.number) == (45, "all_reduce", 1)
        assert beats[1].seconds < beats[2].seconds < beats[3].seconds
        ours.close()  # nobody reads it any more
        assert process.wait(60) == 0


def test_a_rank_does_not_outlive_its_parent() -> None:
    frames, ours, theirs = socket_pair()
    command = [sys.executable, "-c", PARENT, HELD_UP, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True) as parent:
        theirs.close()
        assert parent.stdout is not None
        assert int(parent.stdout.readline())
        assert isinstance(frames.receive(), Beat)
        parent.send_signal(signal.SIGKILL)
        while frames.receive() is not None:  # until nobody has the other end
            pass
    ours.close()


def test_progress_counts_collectives_and_leaves_those_that_fail() -> None:
    progress = Progress()
    with progress.inside("all_gather"):
        assert (progress.collective, progress.number) == ("all_gather", 1)
    with pytest.raises(RuntimeError), progress.inside("all_reduce"):
        raise RuntimeError("connection closed by peer")
    assert (progress.collective, progress.number) == ("", 2)
