"""What it is worth to compute pages that a disk has, where that is sooner: the engine's scheduler in simulated time.

    python -m bench.engine.sooner [--disk 1.8] [--together 8] [--turns 144] [--conversations 48] [--seeds 1]

The traffic is that of the row `agents` of bench/engine/tiers.py. Device, bus and disk take the time that they were
measured to take on an H200 with Llama-3.1-8B's shape; each does one thing after the other. Nothing else takes any time:
neither messages nor the scheduler itself, nor finding out what the disk has. So the figures are what a policy could
reach. A move that holds the next step makes it wait. Pages of the prompts are told by where they were: on the device,
come up, or missed, so computed. The time that the scheduler takes itself is measured: what this machine's processor
spends in its calls and in those of the moves. Policies:

    none      no tiers
    never     the host's memory alone
    always    whatever the disk has is fetched
    sooner    what is there sooner than it would be computed
"""

import argparse
import heapq
import itertools
import random
import statistics
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
from msgspec.structs import replace

from bench.engine.tiers import SIZES
from bench.lib.returning import Idle
from engine.cache.tiers import TierOptions
from engine.messages.assets import Need
from engine.messages.request import Admit
from engine.messages.step import StepDone
from engine.messages.tiers import NAME_BYTES, PAGES, Move, Moved
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.sched import Scheduler
from engine.sched.assets import Due, WaitingRoom
from engine.sched.moves import Moves, patience
from engine.sched.policies import make_policy
from engine.testing.fake import FakeDevice
from engine.worker.steps.uses import PageUses

Policy = Literal["none", "never", "always", "sooner"]
PAGE = 16
AGENTS = SIZES["full"]
IN_FLIGHT = 2  # steps
GREEDY = Sampling(0.0, 0, 1.0, 0.0, 0)


@dataclass
class Shape:
    """What is asked, in tokens, the room for it, in pages, and what each thing takes, in seconds."""

    conversations: int = AGENTS.conversations
    first: int = AGENTS.first
    new: int = AGENTS.new
    reply: int = AGENTS.reply
    turns: int = AGENTS.turns
    together: int = AGENTS.together[0]
    device_pages: int = AGENTS.cache // PAGE
    host_pages: int = 16_384
    step_tokens: int = 8_192
    piece: int = 32  # pages
    step: float = 0.0055  # and of each row
    row: float = 0.00012
    prompt: float = 0.0045  # more of a step with prompts, and of each of their tokens beyond the first hundred
    token: float = 24.5e-6
    disk: float = (2 << 20) / 1.80e9  # of a page
    bus: float = (2 << 20) / 40e9  # each way, both at once


@dataclass
class Outcome:
    """Of the turns that count. `pages` that moved, by what the scheduler counts."""

    turns: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    computing: float = 0.0  # seconds
    reading: float = 0.0
    held: float = 0.0  # steps, by moves that they wait for
    scheduling: float = 0.0  # of the processor of this machine
    cached: int = 0  # pages of prompts
    prompt: int = 0
    pages: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.turns / self.seconds


class Line:
    """Does one thing after the other."""

    def __init__(self) -> None:
        self.free = self.busy = 0.0

    def take(self, now: float, seconds: float) -> float:
        """When a job is over that comes now."""
        self.free = max(now, self.free) + seconds
        self.busy += seconds
        return self.free


class Timed:
    """`it`, and the `seconds` of the processor that its methods take."""

    def __init__(self, it: object) -> None:
        self.it, self.seconds = it, 0.0

    def __getattr__(self, name: str) -> object:
        found = getattr(self.it, name)
        if not callable(found):
            return found

        def method(*given: object) -> object:
            began = time.process_time()
            result = found(*given)
            self.seconds += time.process_time() - began
            return result

        return method


@dataclass
class End:
    """Of a step."""

    simulation: "Simulation"
    at: float

    def query(self) -> bool:
        return self.simulation.now >= self.at


class Simulation:
    """An engine with `policy`, and the clients of the traffic."""

    def __init__(self, shape: Shape, policy: Policy, seed: int = 0) -> None:
        self.shape, self.random = shape, random.Random(seed)
        self.now, self._events, self._count = 0.0, list[tuple[float, int, Callable[[], None]]](), itertools.count()
        stores = policy in ("always", "sooner")
        options = TierOptions(shape.host_pages, stores=stores, always=policy == "always", piece=shape.piece)
        longest = shape.first + (shape.turns + 1) * (shape.new + shape.reply)
        scheduler = Scheduler(
            shape.device_pages,
            PAGE,
            64,
            max_model_len=longest,
            max_step_tokens=shape.step_tokens,
            policy=make_policy(Plugins.load(()), "fcfs"),
            prefix_cache=True,
            max_waiting=1000,
            tiers=None if policy == "none" else options,
        )
        self.uses = PageUses(64, -(-longest // PAGE), PAGE, shape.device_pages)
        self.device, self.timed = FakeDevice(), [Timed(scheduler)]
        self.scheduler, self.moves = cast(Scheduler, self.timed[0]), None
        if policy != "none":
            self.timed.append(Timed(Moves([scheduler])))
            self.moves = cast(Moves, self.timed[1])
        self.room = WaitingRoom({})
        self.room.started()
        self.computes, self.disk = Line(), Line()
        self.ways = {way: Line() for way in ("down", "late", "up")}
        self.stored: set[bytes] = set()
        self.flying: deque[StepDone] = deque()
        self.wanted: dict[int, float] = {}
        self.histories = [self.text(shape.first) for _ in range(shape.conversations)]
        self.asked: dict[str, tuple[int, float]] = {}  # by rid: whose turn, and since when
        self.idle, self.left = Idle(shape.conversations, self.random), list[int]()
        self.found, self.ended = Outcome(), 0.0

    def text(self, tokens: int) -> list[int]:
        return [self.random.randrange(128_000) for _ in range(tokens)]

    # ── clients ──────────────────────────────────────────────────────────────────────────────

    def run(self) -> Outcome:
        """The first turn of each conversation, in turn, then the others."""
        for number in range(self.shape.conversations):
            self.left = [number]
            self.ask()
            self.drain()
        before, began = self.counts(), self.now
        busy, spent = (self.computes.busy, self.disk.busy), self.spent()
        self.found, self.left = Outcome(), [-1] * self.shape.turns
        for _ in range(self.shape.together):
            self.ask()
        self.drain()
        found = self.found
        found.scheduling = self.spent() - spent
        self.scheduler.check_integrity()
        found.seconds = self.ended - began
        found.computing, found.reading = self.computes.busy - busy[0], self.disk.busy - busy[1]
        found.pages = {name: count - before[name] for name, count in self.counts().items()}
        up = found.pages["from_host"] + found.pages["from_store"]
        found.pages = {"device": found.cached - up, **found.pages, "missed": found.prompt - found.cached}
        return found

    def spent(self) -> float:
        return sum(each.seconds for each in self.timed)

    def counts(self) -> dict[str, int]:
        names = ("from_host", "from_store", "fetched", "computed", "down", "refused")
        return {name: 0 if self.moves is None else getattr(self.moves.stats(), name) for name in names}

    def ask(self) -> None:
        if not self.left:
            return
        number = self.idle.take(self.left.pop(0))
        self.histories[number] += self.text(self.shape.new)
        rid = str(next(self._count))
        self.asked[rid] = number, self.now
        admit = Admit(rid, array("i", self.histories[number]).tobytes(), GREEDY, (), self.shape.reply)
        if self.moves is None or not self.moves.seeks(admit):
            return self.let_in(self.room.admit(admit))
        admit = self.moves.named(admit)
        due = self.room.admit(replace(admit, needs=(Need(PAGES, rid.encode()),)))
        for make in due.makes:
            self.wait(make.number, patience(admit))
            self.moves.want(make.number, admit)
        return self.let_in(due)

    def let_in(self, due: Due) -> None:
        for admit, bound in due.ready:
            self.scheduler.admit(admit, bound)

    # ── time ─────────────────────────────────────────────────────────────────────────────────

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), what))

    def drain(self) -> None:
        """Until nothing happens any more."""
        self.pump()
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()
            self.pump()

    def wait(self, number: int, seconds: float) -> None:
        """A need is given up on after so long."""
        until = self.now + seconds
        if until < self.wanted.get(number, 1e9):
            self.wanted[number] = until
            self.at(until, lambda: self.give_up(number, until))

    def give_up(self, number: int, until: float) -> None:
        if self.wanted.get(number) == until and self.moves is not None:
            self.moves.give_up(number)

    def pump(self) -> None:
        """All that can begin now does, as in the scheduler's actor."""
        self.plan()
        if self.moves is None:
            return
        self.moves.tick(self.now)
        for number, seconds in self.moves.patience():
            if number in self.wanted:
                self.wait(number, seconds)
        while settled := self.moves.settled():
            for number in settled:
                self.let_in(self.room.settle(number))
            self.plan()
        for move in [*self.moves.before(), *self.moves.after()]:
            self.begin(move)

    def plan(self) -> None:
        while len(self.flying) < IN_FLIGHT and (plan := self.scheduler.plan(self.now)) is not None:
            lengths = array("i", plan.lengths)
            tokens = sum(length for length in lengths if length > 1)
            if self.moves is not None:
                self.moves.cost.planned(plan)
                for move in self.moves.before():
                    self.begin(move)
            shape = self.shape
            seconds = shape.step + len(lengths) * shape.row + shape.prompt * (tokens > 0)
            seconds += max(0, tokens - 100) * shape.token
            self.flying.append(replace(self.device.step(plan), seconds=seconds))
            end = self.computes.take(self.now, seconds)
            self.uses.launched(plan, End(self, end))
            self.at(end, self.commit)

    def commit(self) -> None:
        done = self.flying.popleft()
        if self.moves is not None:
            self.moves.cost.done(done.seconds)
        for told in self.scheduler.commit_each(done, self.now):
            for row, cached in told.cached:
                number, since = self.asked[told.rids[row]]
                self.found.first.append(self.now - since)
                self.found.cached += cached // PAGE
                self.found.prompt += len(self.histories[number]) // PAGE
            for finish in told.finishes:
                number, _ = self.asked.pop(told.rids[finish.row])
                last = self.histories[number][-1]
                self.histories[number] += [(last + 1 + index) % 256 for index in range(self.shape.reply)]
                self.idle.add(number)
                self.found.turns, self.ended = self.found.turns + 1, self.now
                self.ask()

    # ── moves ────────────────────────────────────────────────────────────────────────────────

    def begin(self, move: Move) -> None:
        began, end = self.now, self.now
        names = [move.names[at : at + NAME_BYTES] for at in range(0, len(move.names), NAME_BYTES)]
        done = b"\1" * move.count
        match move.way:
            case "down" | "up":
                waits = self.uses.busy(np.frombuffer(move.pages, "<i4"))  # for steps that are launched
                steps = self.computes.free if waits else self.now
                way = "late" if move.way == "down" and waits else move.way
                end = self.ways[way].take(max(self.now, steps), move.count * self.shape.bus)
                if move.holds:  # and the next one for it
                    self.computes.free = end
                    self.found.held += end - max(self.now, steps)
            case "find":
                done = bytes(name in self.stored for name in names)
            case "fetch" | "keep":
                new = len(names) if move.way == "fetch" else sum(name not in self.stored for name in names)
                end = self.disk.take(self.now, new * self.shape.disk)
                self.stored.update(names)

        def over() -> None:
            assert self.moves is not None
            self.moves.moved(Moved(move.number, done, self.now - began))

        self.at(end, over)


def added(runs: Sequence[Outcome]) -> Outcome:
    """Of all turns of several runs."""
    total = Outcome()
    for run in runs:
        for name in ("turns", "seconds", "first", "computing", "reading", "held", "scheduling"):
            setattr(total, name, getattr(total, name) + getattr(run, name))
        total.pages = {name: total.pages.get(name, 0) + count for name, count in run.pages.items()}
    return total


def line(policy: str, runs: Sequence[Outcome], without: Sequence[Outcome]) -> str:
    """Of runs with `policy`, and of those `without` tiers by the same seeds."""
    found, each = added(runs), [run.rate / none.rate for run, none in zip(runs, without, strict=True)]
    ratio = f"{statistics.median(each):5.2f}" + (f" ({min(each):.2f} - {max(each):.2f})" if len(each) > 1 else "")
    first = 1e3 * statistics.median(found.first), 1e3 * statistics.quantiles(found.first, n=10)[-1]
    return (
        f"{policy:7} {found.rate:6.2f} turns/s, {ratio} of none; first token {first[0]:5.0f} ms, "
        f"{first[1]:5.0f} in the slowest tenth; device busy {found.computing / found.seconds:4.0%}, "
        f"disk {found.reading / found.seconds:4.0%}, held {found.held / found.seconds:4.0%}; "
        f"scheduler {1e3 * found.scheduling / found.turns:4.1f} ms a turn; {found.pages}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", type=float, default=1.8, help="GB/s")
    parser.add_argument("--together", type=int, default=Shape.together)
    parser.add_argument("--turns", type=int, default=Shape.turns)
    parser.add_argument("--conversations", type=int, default=Shape.conversations)
    parser.add_argument("--seeds", type=int, default=1, help="so many runs: ratios are medians and ranges")
    given = parser.parse_args()
    shape = Shape(given.conversations, turns=given.turns, together=given.together, disk=(2 << 20) / given.disk / 1e9)
    found: dict[str, list[Outcome]] = {}
    policies: tuple[Policy, ...] = ("none", "never", "always", "sooner")
    for policy in policies:
        found[policy] = [Simulation(shape, policy, seed).run() for seed in range(given.seeds)]
        print(line(policy, found[policy], found["none"]), flush=True)


if __name__ == "__main__":
    main()
