"""CPU time of one step outside the device: scheduler and actors at 256 running requests, on a FakeExecutor.

    python -m bench.engine.scheduling [--running 256] [--steps 2000] [--copies 1] [--json FILE]

Each request generates throughout; prompts are of mixed lengths. Figures are CPU time of the process (not wall clock),
sampled a step at a time, less what the fake device itself takes. `logic` is plan + commit alone; the third row adds a
task for each request that takes every chunk as it comes. The budget of the second row is 1 ms: a decode step of a small
model on a fast GPU lasts about two. With `--copies`, `logic` is also measured for as many copies of attention, which
divide the requests.
"""

import argparse
import json
import random
import statistics
import time
from array import array
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio

from engine.actors.scheduler import SchedulerActor
from engine.config import Config, resolve
from engine.messages import FromFront, ToFront
from engine.messages.control import WorkerReady
from engine.messages.request import Admit, Generate
from engine.messages.step import StepDone, StepPlan
from engine.params.sampling import Sampling, SamplingParams
from engine.plugin.registry import Plugins
from engine.runtime.actor import Actor
from engine.runtime.channel import Outbox, channel, open_channel
from engine.runtime.launch import open_front
from engine.sched import Scheduler
from engine.sched.copies import Copies
from engine.sched.policies import make_policy
from engine.testing.fake import FakeDevice, FakeExecutor

PAGE = 16
PAGES = 1 << 18
LONGEST = 16384


class TimedDevice(FakeDevice):
    """Notes the process's CPU time around each step."""

    def __init__(self) -> None:
        super().__init__()
        self.spent = 0.0
        self.marks: list[tuple[int, float]] = []  # rows, CPU seconds of everything but this device

    def step(self, plan: StepPlan) -> StepDone:
        began = time.process_time()
        self.marks.append((len(plan.slots) // 4, began - self.spent))
        done = super().step(plan)
        self.spent += time.process_time() - began
        return done


def logic(running: int, steps: int, copies: int = 1) -> list[float]:
    """Seconds of plan + commit of each decode step, two in flight."""
    options: dict[str, Any] = {
        "pages": PAGES,
        "page_size": PAGE,
        "slots": running,
        "max_model_len": LONGEST,
        "max_step_tokens": 8192,
        "policy": make_policy(Plugins.load(()), "fcfs"),
        "prefix_cache": True,
        "max_waiting": running,
    }
    scheduler = Scheduler(**options) if copies == 1 else Copies(copies, **options)
    rng = random.Random(0)
    for index in range(running):
        ids = array("i", [rng.randrange(50_000) for _ in range(rng.randint(16, 512))])
        scheduler.admit(Admit(str(index), ids.tobytes(), Sampling(0.0, 0, 1.0, 0.0, 0), (), LONGEST - len(ids)))
    device = FakeDevice()
    in_flight = []
    seconds: list[float] = []
    while len(seconds) < steps:
        began = time.process_time()
        plan = scheduler.plan()
        planned = time.process_time()
        assert plan is not None
        in_flight.append(device.step(plan))
        if len(in_flight) < 2:
            continue
        done = in_flight.pop(0)
        again = time.process_time()
        scheduler.commit_each(done)
        if len(plan.slots) == running * 4:
            seconds.append(planned - began + time.process_time() - again)
    return seconds


async def actors(running: int, steps: int, reading: bool) -> list[float]:
    """Seconds of each full decode step: scheduler, executor, detokenizer, front; `reading`, clients are woken too."""
    config = resolve(
        {"model": "echo", "page_size": PAGE, "max_running": running, "max_step_tokens": 8192, "log_level": "error"}
    )
    device = TimedDevice()

    def core(config: Config, front: Outbox[ToFront]) -> tuple[list[Actor], Outbox[FromFront]]:
        to_scheduler, scheduler_inbox = open_channel()
        to_executor, executor_inbox = channel(4)
        policy = make_policy(Plugins.load(()), config.schedule.policy)
        ready = WorkerReady(PAGES, PAGE, running, 8192, LONGEST, 257, 4, "none", "none", {})
        executor = FakeExecutor(ready, executor_inbox, to_scheduler)
        executor.device = device
        return [
            SchedulerActor(config, policy, scheduler_inbox, executor=to_executor, makers={}, front=front),
            executor,
        ], to_scheduler

    rng = random.Random(0)
    async with open_front(config, core) as front, anyio.create_task_group() as group:
        await front.ready()

        async def client(number: int) -> None:
            prompt = bytes(rng.randrange(97, 123) for _ in range(rng.randint(16, 512))).decode()
            params = SamplingParams(temperature=0, max_tokens=LONGEST - 600)
            async with aclosing(front.generate(Generate(str(number), params, text=prompt))) as stream:
                async for _ in stream:
                    if not reading:
                        await anyio.sleep_forever()

        for number in range(running):
            group.start_soon(client, number)
        while sum(rows == running for rows, _ in device.marks) < steps + 100:  # they come one by one, amid steps
            await anyio.sleep(0.05)
        group.cancel_scope.cancel()
    pairs = pairwise(device.marks)
    return [after - before for (rows, before), (_, after) in pairs if rows == running]


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "steps": len(ordered),
        "median_ms": statistics.median(ordered) * 1e3,
        "p10_ms": ordered[len(ordered) // 10] * 1e3,
        "p90_ms": ordered[len(ordered) * 9 // 10] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    def run(reading: bool) -> dict[str, float]:
        return summary(anyio.run(actors, options.running, options.steps, reading, backend_options={"use_uvloop": True}))

    figures: dict[str, Any] = {
        "logic (plan + commit)": summary(logic(options.running, options.steps)),
        "scheduler + actors": run(reading=False),
        "and waking the clients": run(reading=True),
    }
    if options.copies > 1:
        divided = summary(logic(options.running, options.steps, options.copies))
        figures[f"logic, {options.copies} copies"] = divided
    print(f"CPU time of a decode step, {options.running} running requests")
    for name, row in figures.items():
        print(f"  {name:24s} median {row['median_ms']:.3f} ms   p10 {row['p10_ms']:.3f}   p90 {row['p90_ms']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
