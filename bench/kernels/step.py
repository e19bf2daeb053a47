"""Where the time of a step goes on a GPU, kernel by kernel: a worker without its engine, profiled on dummy weights.

    python -m bench.kernels.step bench/configs/qwen3-0.6b [--rows 1,256] [--context 512] [--prompt 128]

Prints for a decode step of so many rows, and for a prompt: host time to launch, device time, and each kernel's share.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from engine.config import resolve
from engine.messages.control import Boot
from engine.messages.step import TOKEN, SlotAdmit, StepPlan
from engine.params.sampling import Sampling
from engine.testing.steps import step_plan
from engine.worker.runner import Runner
from engine.worker.start import start

STEPS = 20


def plan(runner: Runner, rows: int, first: int, length: int, admit: bool) -> StepPlan:
    """`rows` rows of `length` tokens from position `first`, each with pages of its own."""
    numbers = [(slot, first, length, TOKEN) for slot in range(rows)]
    if not admit:
        return step_plan(0, numbers)
    longest = first + length + STEPS + 1
    pages = -(-longest // runner.page_size)
    ids = np.ones(first + length, "<i4").tobytes()
    sampling = Sampling(0.6, 0, 1.0, 0.0, 1)
    admits = tuple(SlotAdmit(slot, ids, sampling, first + length) for slot in range(rows))
    triples = [(slot, index, slot * pages + index) for slot in range(rows) for index in range(pages)]
    return step_plan(0, numbers, admits, triples)


def shares(runner: Runner, plans: list[StepPlan]) -> None:
    """Runs the plans twice: timed, then profiled."""
    hosts, devices = [], []
    for each in plans:
        began = time.perf_counter()
        step = runner.launch(each)
        hosts.append(1e3 * (time.perf_counter() - began))
        devices.append(1e3 * runner.finish(step).seconds)
    print(f"host {statistics.median(hosts):.3f} ms, device {statistics.median(devices):.3f} ms a step")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for each in plans:
            runner.finish(runner.launch(each))
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    busy = sum(event.self_device_time_total for event in events) / len(plans)
    print(f"kernels {busy / 1e3:.3f} ms a step:")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:16]:
        total, calls = event.self_device_time_total / len(plans), event.count / len(plans)
        print(f"  {total:9.1f} us {total / busy:5.1%} {calls:6.1f} x {total / max(calls, 1e-9):8.2f}  {event.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", default="1,256")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    options = dict(option.split("=", 1) for option in given.option)
    config = resolve({"model": str(given.model), "load": "dummy", "device": "cuda", "max_model_len": "4096"} | options)
    runner, ready = start(Boot(config), 0.0)
    print(ready.attention, {name: round(seconds, 2) for name, seconds in ready.phases.items()})
    torch.cuda.synchronize()
    for rows in map(int, given.rows.split(",")):
        print(f"\ndecode, {rows} rows, context {given.context}")
        steps = [plan(runner, rows, given.context + step, 1, admit=step == 0) for step in range(STEPS)]
        runner.finish(runner.launch(steps[0]))
        shares(runner, steps[1:])
    print(f"\na prompt of {given.prompt}")
    first = plan(runner, 1, 0, given.prompt, admit=True)
    runner.finish(runner.launch(first))
    shares(runner, [plan(runner, 1, 0, given.prompt, admit=False)] * 10)


if __name__ == "__main__":
    main()
