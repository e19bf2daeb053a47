"""Streams and events of a GPU that is not there: what is put on a stream is done when the test says so."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.worker import transfers
from engine.worker.transfers import Copy, Transfers


class Event:
    """What is waited for is the record before the wait, as on a device."""

    def __init__(self, **_: Any) -> None:
        self.mark: threading.Event | None = None

    def record(self, stream: "Stream") -> None:
        self.mark = mark = threading.Event()
        stream.put(mark.set)

    def synchronize(self) -> None:
        assert self.mark is None or self.mark.wait(20), "nobody lets the stream go on"

    def query(self) -> bool:
        return self.mark is None or self.mark.is_set()


class Stream:
    """Jobs in order, and marks that those behind them wait for."""

    def __init__(self, _: object = None) -> None:
        self._jobs: deque[Callable[[], object] | threading.Event] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def query(self) -> bool:
        return not self._jobs

    def put(self, job: Callable[[], object]) -> None:
        self._jobs.append(job)

    def wait_event(self, event: Event) -> None:
        if event.mark is not None:
            self._jobs.append(event.mark)

    def go_on(self, most: int = 1000) -> None:
        """Do up to `most` jobs, but none behind a mark that is not set."""
        while self._jobs and most:
            job = self._jobs[0]
            if isinstance(job, threading.Event):
                if not job.is_set():
                    return
            else:
                job()
                most -= 1
            self._jobs.popleft()


class SimulatedCuda:
    """In place of `torch.cuda`, as far as copies use it; `main` is the stream of the steps."""

    Event, Stream = Event, Stream

    def __init__(self) -> None:
        self.main = Stream()
        self._current = threading.local()

    def current_stream(self, _: object = None) -> Stream:
        found: Stream = getattr(self._current, "stream", self.main)
        return found

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        yield
        self._current.stream = before

    def device(self, _: object) -> Any:
        return nullcontext()


def simulate(monkeypatch: pytest.MonkeyPatch, **constants: int) -> SimulatedCuda:
    """A GPU for `Transfers` that are made from now on, with these `constants` of their module: copies are put on its
    streams one by one."""
    cuda, copy_all = SimulatedCuda(), Transfers._copy_all

    def put_copies(its: Transfers, way: str, copies: Sequence[Copy]) -> None:
        for copy in copies:
            cuda.current_stream().put(lambda copy=copy: copy_all(its, way, [copy]))  # type: ignore[misc]

    seen = {name: getattr(torch, name) for name in dir(torch) if name != "cuda"}
    monkeypatch.setattr(transfers, "torch", SimpleNamespace(**seen, cuda=cuda))
    monkeypatch.setattr(transfers, "pin", lambda host: None)
    monkeypatch.setattr(Transfers, "_copy_all", put_copies)
    for name, value in constants.items():
        monkeypatch.setattr(transfers, name, value)
    return cuda


def until(is_so: Callable[[], bool]) -> None:
    """Wait for another thread."""
    for _ in range(20_000):
        if is_so():
            return
        time.sleep(0.001)
    raise AssertionError("it never was")
