"""Where requests go among copies of attention, and whether they should wait for each other: a simulation in which the
scheduler is real and a step takes what a formula says.

    python -m bench.engine.copies [--copies 8] [--requests 2000] [--held 0,1,4,16] [--json FILE]

The formula is of DeepSeek-V3 in FP8 on H200s, on paper: all copies step together, so a step takes

    weights, read once
    + tokens of what runs * KV bytes / bandwidth + prompt tokens * attention, of the slowest copy
    + tokens of all copies * experts / copies

Steady loads keep so many requests open; open loads have arrivals at random. `balance` is the mean number of tokens of
a copy in a step over the largest. `blind` places requests by the number that run, without looking for prefixes.
Left out: communication, which depends on how many tokens there are in all, however they are placed.
"""

import argparse
import json
import random
import statistics
from array import array
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.messages.request import Admit
from engine.messages.step import NOTHING, StepDone, StepPlan
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.sched.batcher import Scheduler
from engine.sched.copies import Copies
from engine.sched.policies import make_policy
from engine.sched.request import Request
from engine.testing.steps import rows_of

PAGE = 16
WEIGHTS = 10e-3  # seconds to read those that a decode step needs
READ = 70e3 / 4.3e12  # seconds to read a token's latents
ATTENTION = 2 * 11.4e9 / 600e12  # seconds of the projections of attention, for a token of a prompt
EXPERTS = 2 * 25e9 / 600e12  # seconds of all else, for a token, on one device
SLOTS = 64  # of a copy
PAGES = 12_000  # of a copy


@dataclass
class Load:
    """Prompts begin with one of `stems` of `stem` tokens, and have `tail` more; replies have `new`, on average."""

    stems: int
    stem: int
    tail: int
    new: int
    clients: int = 0  # that each wait for their reply before they ask again
    rate: float = 0.0  # requests a second, where clients do not wait


LOADS = {
    "steady, 1,024/256": Load(0, 0, 1024, 256, clients=500),
    "steady, 4,096/128": Load(0, 0, 4096, 128, clients=300),
    "open, 1,024/256, 22 a second": Load(0, 0, 1024, 256, rate=22.0),
    "open, 1,024/256, 5 a second": Load(0, 0, 1024, 256, rate=5.0),
    "open, 1,024/256, 1 a second": Load(0, 0, 1024, 256, rate=1.0),
    "steady, 32 stems of 4,096": Load(32, 4096, 256, 128, clients=300),
    "open, 200 stems of 4,096": Load(200, 4096, 256, 128, rate=20.0),
}


class Blind(Copies):
    """Goes by how many requests run."""

    def _cost(self, copy: Scheduler, request: Request) -> int:
        return copy.running << 32


@dataclass
class Run:
    """A scheduler and its load, in simulated time."""

    scheduler: Copies
    load: Load
    requests: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    now: float = 0.0
    asked: dict[str, float] = field(default_factory=dict)  # when, of those that have no token yet
    first: list[float] = field(default_factory=list)  # seconds to the first token
    said: dict[str, tuple[float, int]] = field(default_factory=dict)  # when the first token came, and how many have
    each: list[float] = field(default_factory=list)  # seconds a token after the first, of each reply
    tokens: int = 0
    begun: int = 0
    ended: int = 0

    def ask(self, when: float) -> None:
        load, rng = self.load, self.rng
        stem = rng.randrange(load.stems) if load.stems else self.begun
        ids = array("i", [stem * 7 + place % 5 for place in range(load.stem)])
        ids.extend(rng.randrange(50_000) for _ in range(int(load.tail * rng.uniform(0.5, 1.5))))
        new = int(load.new * rng.uniform(0.2, 1.8)) + 1
        rid = str(self.begun)
        self.scheduler.admit(Admit(rid, ids.tobytes(), Sampling(0.0, 0, 1.0, 0.0, 0), (), new))
        self.asked[rid] = when
        self.begun += 1

    def run(self) -> None:
        """Two steps in flight, as on a device, until all requests have ended."""
        flying: deque[StepPlan] = deque()
        arrivals: deque[float] = deque()
        if self.load.rate:
            when = 0.0
            for _ in range(self.requests):
                when += self.rng.expovariate(self.load.rate)
                arrivals.append(when)
        for _ in range(min(self.load.clients, self.requests)):
            self.ask(0.0)
        while self.ended < self.requests:
            while arrivals and arrivals[0] <= self.now:
                self.ask(arrivals.popleft())
            while len(flying) < 2 and (plan := self.scheduler.plan(self.now)) is not None:
                flying.append(plan)
            if not flying:
                self.now = arrivals[0]
                continue
            self._step(flying.popleft())

    def _step(self, plan: StepPlan) -> None:
        copies = self.scheduler.copies
        each = len(copies[0].slots)
        prompts, total, yielding = [0] * len(copies), 0, 0
        for slot, _, length, yields in rows_of(plan):
            total += length
            prompts[slot // each] += length if length > 1 else 0
            yielding += yields != NOTHING
        slowest = max(
            READ * copy.context_tokens + ATTENTION * count for copy, count in zip(copies, prompts, strict=True)
        )
        self.now += WEIGHTS + slowest + EXPERTS * total / len(copies)
        ones = array("i", [1] * yielding).tobytes()
        for told in self.scheduler.commit_each(StepDone(plan.step, ones, ones, 0.0), self.now):
            self.tokens += len(told.tokens) // 4
            for row, _ in told.cached:
                self.first.append(self.now - self.asked[told.rids[row]])
            for rid in told.rids:
                first, count = self.said.get(rid, (self.now, 0))
                self.said[rid] = first, count + 1
            for finish in told.finishes:
                first, count = self.said.pop(told.rids[finish.row])
                self.each.append((self.now - first) / max(count - 1, 1))
                self.ended += 1
                if self.load.clients and self.begun < self.requests:
                    self.ask(self.now)


def figures(load: Load, copies: int, requests: int, held: int, kind: type[Copies]) -> dict[str, float]:
    scheduler = kind(
        copies, PAGES, PAGE, slots=SLOTS * copies, max_model_len=16384, max_step_tokens=8192 // copies,
        policy=make_policy(Plugins.load(()), "fcfs"), prefix_cache=True, max_waiting=requests, held_steps=held,
    )  # fmt: skip
    run = Run(scheduler, load, requests)
    run.run()
    scheduler.check_integrity()
    counts: dict[str, Any] = scheduler.counts()
    total = sum(each.tokens_total for each in counts["copies"])
    return {
        "tokens_per_second": run.tokens / run.now,
        "first_token_median": statistics.median(run.first),
        "first_token_p95": statistics.quantiles(run.first, n=20)[-1],
        "token_median": statistics.median(run.each),
        "cached": counts["cached_tokens_total"] / counts["prompt_tokens_total"],
        "balance": total / copies / counts["most_tokens_total"],
        "steps": counts["steps"],
    }


def line(way: str, row: dict[str, float]) -> str:
    return (
        f"  {way:8s} {row['tokens_per_second']:8.0f} tok/s   first token {row['first_token_median']:6.2f} s, "
        f"p95 {row['first_token_p95']:6.2f}, then {1e3 * row['token_median']:5.1f} ms each   "
        f"cached {100 * row['cached']:4.0f} %   balance {row['balance']:.2f}   {row['steps']:.0f} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--held", default="0,1,4,16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for name, load in LOADS.items():
        print(f"{name}, {options.copies} copies, {options.requests} requests")
        ways: list[tuple[str, type[Copies], int]] = [("blind", Blind, 0)]
        ways += [(f"held {held}", Copies, int(held)) for held in options.held.split(",")]
        for way, kind, held in ways:
            row = found[f"{name}; {way}"] = figures(load, options.copies, options.requests, held, kind)
            print(line(way, row))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
