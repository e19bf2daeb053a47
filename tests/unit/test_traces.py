"""What bench/lib/traces.py reads off a trace of steps, a made-up one."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bench.lib.traces import waits


def event(cat: str, name: str, begin: float, length: float, number: int | None = None) -> dict[str, Any]:
    args = {} if number is None else {"correlation": number}
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": length, "args": args}


def trace(path: Path, steps: int) -> Path:
    """Steps of 100 us, asked for 150 ahead: a graph of two kernels (30, 4 nothing, 26), 10 nothing, a second graph
    (20), 10 nothing; in every fourth a copy covers half of the first hole. Before them one without a kernel."""
    events = [event("user_annotation", "step 0: 9 rows, 300 tokens", 0, 5)]
    for step in range(1, steps + 1):
        asked, ran = 100.0 * step, 100.0 * step + 150
        events.append(event("user_annotation", f"step {step}: 2 rows, 2 tokens", asked, 50))
        events.append(event("cuda_runtime", "cudaGraphLaunch", asked + 1, 5, 2 * step))
        events.append(event("cuda_runtime", "cudaGraphLaunch", asked + 20, 5, 2 * step + 1))
        events.append(event("kernel", "a", ran, 30, 2 * step))
        events.append(event("kernel", "b", ran + 34, 26, 2 * step))
        events.append(event("kernel", "draw", ran + 70, 20, 2 * step + 1))
        if step % 4 == 0:
            events.append(event("gpu_memcpy", "copy", ran + 20, 12, 2 * step))
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events[::-1]}, file)
    return path


def test_the_device_waits_between_steps_between_launches_and_inside_graphs(tmp_path: Path) -> None:
    seen = waits(trace(tmp_path / "t.json.gz", 12), 2)
    assert seen.steps == 8  # without the last four, which may not have run
    whole = 7 * 100 + 90
    assert seen.between == pytest.approx(7 * 10 / whole)
    assert seen.launches == pytest.approx(8 * 10 / whole)
    assert seen.graphs == pytest.approx((8 * 4 - 2 * 2) / whole)


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 whole decode steps of 2 rows"):
        waits(trace(tmp_path / "t.json.gz", 5), 2)
    with pytest.raises(ValueError, match="0 whole decode steps of 9 rows"):
        waits(trace(tmp_path / "t.json.gz", 12), 9)
