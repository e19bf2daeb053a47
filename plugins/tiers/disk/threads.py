"""A few threads that use the disk for callers who do not wait for ever.

    caller    ── works ──> a bounded queue ──> thread: work(ticket) ── in memory of its own (ticket.buffer)
              <─ True ── or, when the time is up, False                ticket.copy(...): only while the caller waits

A thread that is stuck in the kernel cannot be freed. So a caller leaves it alone: it takes its ticket back, after which
the thread touches no memory of the caller's. Threads are daemons: a stuck one does not keep the process alive.
"""

import mmap
import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from engine_plugins.tiers.disk.layout import whole_blocks

MOST_WAITING = 256  # works in the queue
PAUSE_SECONDS = 10.0  # for which nothing is asked after a call that was not answered in time


class Ticket:
    """One work, as its thread sees it. `buffer` is the thread's own: whole blocks that begin with one."""

    def __init__(self) -> None:
        self.buffer = memoryview(b"")
        self.done = False
        self.result = False
        self.left = False  # nobody waits
        self._lock = threading.Lock()

    def copy(self, target: memoryview, source: memoryview) -> bool:
        """Copy between memory of the caller's and our own, unless the caller has left. Others may run meanwhile."""
        with self._lock:
            if self.left:
                return False
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
            return True

    def leave(self) -> None:
        """Nobody waits any more; on return nothing touches the caller's memory."""
        with self._lock:
            self.left = True


Work = Callable[[Ticket], bool]


class Threads:
    """`count` threads, each with a buffer of `size` bytes."""

    def __init__(self, name: str, count: int, size: int, pause: float = PAUSE_SECONDS) -> None:
        self.stalls = 0  # calls that were not answered in time
        self._queue: queue.Queue[tuple[Ticket, Work, threading.Semaphore] | None] = queue.Queue(MOST_WAITING)
        self._size = max(whole_blocks(size), 1)
        self._pause = pause
        self._paused_until = 0.0
        self._running: dict[int, Ticket] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(index,), name=f"{name}-{index}", daemon=True)
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def passed_over(self) -> bool:
        """Whether nothing is asked of the disk now: it was too slow a moment ago, or all threads are stuck."""
        if time.monotonic() < self._paused_until:
            return True
        running = list(self._running.values())
        return len(running) == len(self._threads) and all(ticket.left for ticket in running)

    def run(self, works: Sequence[Work], seconds: float, *, waits: bool = False) -> list[bool]:
        """What each of `works` returns, within `seconds`; False for what does not. A work raises nothing. Where the
        disk is passed over all are False at once, unless this `waits` for it to go on."""
        if self.passed_over and not waits:
            return [False] * len(works)
        end = time.monotonic() + seconds
        finished = threading.Semaphore(0)
        tickets: list[Ticket] = []
        try:
            for work in works:
                ticket = Ticket()
                self._queue.put((ticket, work, finished), timeout=max(0.0, end - time.monotonic()))
                tickets.append(ticket)
            late = not all(finished.acquire(timeout=max(0.0, end - time.monotonic())) for _ in tickets)
        except queue.Full:
            late = True
        if late:
            for ticket in tickets:
                ticket.leave()
            self.stalls += 1
            self._paused_until = time.monotonic() + self._pause
        return [ticket.result for ticket in tickets] + [False] * (len(works) - len(tickets))

    def close(self, seconds: float = 1.0) -> None:
        """End the threads that are not stuck."""
        end = time.monotonic() + seconds
        for _ in self._threads:
            try:
                self._queue.put(None, timeout=max(0.0, end - time.monotonic()))
            except queue.Full:
                return
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self, index: int) -> None:
        buffer = memoryview(mmap.mmap(-1, self._size))
        while (found := self._queue.get()) is not None:
            ticket, work, finished = found
            if not ticket.left:
                ticket.buffer = buffer
                self._running[index] = ticket
                result = work(ticket)
                del self._running[index]
                ticket.result = result and not ticket.left
            finished.release()
            del found, ticket, work
