"""Traces of steps, for people who look where the time goes: torch's profiler, from one step to another.

A trace is Chrome's JSON, compressed: chrome://tracing and https://ui.perfetto.dev show it. Each step is a span with its
number, its rows and its tokens. Writing one takes a while, in which no step is launched. Each rank traces itself, into
a file of its own. Left out: one trace of all ranks.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine.errors import RequestError, counted
from engine.messages.questions import Profile
from engine.messages.step import StepPlan

log = logging.getLogger("engine.worker")


class StepProfiler:
    """At most one trace at a time. `launching` and `finishing` go round each step."""

    def __init__(self, device: torch.device) -> None:
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile: profile | None = None
        self._path = Path()
        self._left = 0  # steps to be finished, those in flight at the start among them
        self._written = ""  # the last trace, until a Profile has been told of it

    def answer(self, asked: Profile, in_flight: int) -> str:
        """Begins or ends a trace, as `asked`, and tells its path; `in_flight` steps have been launched before.

        Raises RequestError for what cannot begin or end."""
        if not asked.folder:
            if self._profile is not None:
                self._end()
            path, self._written = self._written, ""
            if not path:
                raise RequestError("no profile is running; POST /start_profile begins one")
            return path
        if self._profile is not None:
            raise RequestError(f"a profile is running already, for {self._path}; POST /stop_profile ends it")
        folder = Path(asked.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"steps-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}.trace.json.gz"
            self._path.touch(exist_ok=False)
        except OSError as error:
            raise RequestError(f"{folder} cannot be written to: {error.strerror}; say another") from error
        self._left = in_flight + asked.steps
        self._profile = profile(activities=self._activities)
        self._profile.start()
        log.info("tracing %s for %s", counted(asked.steps, "step"), self._path)
        return str(self._path)

    @contextmanager
    def launching(self, plan: StepPlan) -> Iterator[None]:
        if self._profile is None:
            yield
            return
        lengths = np.frombuffer(plan.lengths, "<i4")
        with record_function(f"step {plan.step}: {len(lengths)} rows, {lengths.sum()} tokens"):
            yield

    @contextmanager
    def finishing(self) -> Iterator[None]:
        yield
        if self._profile is not None:
            self._left -= 1
            if self._left <= 0:
                self._end()

    def _end(self) -> None:
        assert self._profile is not None
        began = time.perf_counter()
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._path))
        self._profile, self._written = None, str(self._path)
        log.info("wrote %s in %.1f s", self._path, time.perf_counter() - began)
