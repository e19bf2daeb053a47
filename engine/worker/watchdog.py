"""Says each second how far this rank has come, from a thread of its own: also while a collective keeps the rank busy.

And ends the process where nobody is left to work for: its parent is gone, which the rank itself would only see between
two steps, or the connection is. Left out: what is made of it (runtime/stalls.py).
"""

import logging
import os
import threading
import time

from engine.messages import ToWorker
from engine.messages.control import Beat
from engine.parallel.progress import PROGRESS
from engine.runtime.channel import BlockingFrames

log = logging.getLogger("engine.worker")

BEAT_SECONDS = 1.0


def beat() -> Beat:
    """Where this rank is now."""
    now, collective, on_device = time.monotonic(), PROGRESS.collective, PROGRESS.on_device
    return Beat(
        PROGRESS.step,
        collective,
        PROGRESS.number,
        now - PROGRESS.since if collective else 0.0,
        on_device,
        now - PROGRESS.device_since if on_device >= 0 else 0.0,
    )


def watch(frames: BlockingFrames[ToWorker], parent: int) -> None:
    """Begin; `parent` is the process that has started this one."""
    threading.Thread(target=_watch, args=(frames, parent), daemon=True, name="watchdog").start()


def _watch(frames: BlockingFrames[ToWorker], parent: int) -> None:
    while True:
        if os.getppid() != parent:
            log.warning("the process that has started this worker is gone: it ends")
            os._exit(0)
        try:
            frames.send(beat())
        except OSError as error:  # the worker would see it only once it is out of its collective
            log.warning("nobody reads what this worker says (%s): it ends", error)
            os._exit(0)
        time.sleep(BEAT_SECONDS)
