"""CPU time that tiers cost the scheduler for each page of a prompt and each turn, beside no tiers, without a device.

    python -m bench.engine.tier_pages [--prompts 30] [--pages 512] [--repeat 6]

Prompts come one by one, are computed and end; moves are answered at once. `new`: nothing of them was there before, so
each page goes down. `again`: the device has all of them, as in a conversation. `turns`: eight conversations at a time
that fit the device, with a store below; each turn brings about 128 tokens and gets about 32. A move takes as long as a
step there, and messages are packed and unpacked. Figures are the least of so many runs, less what the same run takes
without tiers; the garbage collector is off. Left out: a worker's copies.
"""

import argparse
import gc
import random
import time
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from engine.cache.tiers import TierOptions
from engine.messages.request import Admit
from engine.messages.step import StepDone
from engine.messages.tiers import Move, Moved
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.sched import Scheduler
from engine.sched.moves import Moves
from engine.sched.policies import make_policy
from engine.testing.fake import FakeDevice

PAGE = 16
LONGEST = 40_000
GREEDY = Sampling(0.0, 0, 1.0, 0.0, 0)
CONVERSATIONS, TOGETHER, TURNS = 16, 8, 160


@dataclass
class Run:
    """A scheduler, its device, and its moves, where there are tiers."""

    scheduler: Scheduler
    device: FakeDevice
    moves: Moves | None

    @classmethod
    def of(cls, pages: int, tiers: bool, *, stores: bool = False) -> "Run":
        options = TierOptions(pages, "write-through", stores) if tiers else None
        policy = make_policy(Plugins.load(()), "fcfs")
        scheduler = Scheduler(
            pages,
            PAGE,
            16,
            max_model_len=LONGEST,
            max_step_tokens=8192,
            policy=policy,
            prefix_cache=True,
            max_waiting=1000,
            tiers=options,
        )
        return cls(scheduler, FakeDevice(), Moves([scheduler]) if tiers else None)

    def ask(self, texts: Sequence[bytes], turn: int) -> float:
        """Seconds of CPU time for one request of each text, without what the device takes."""
        seconds, flying = 0.0, deque[StepDone]()
        for number, ids in enumerate(texts):
            began = time.process_time()
            self.scheduler.admit(Admit(f"{turn}.{number}", ids, GREEDY, (), 2))
            while self.scheduler.live.by_rid or flying:
                plan = self.scheduler.plan()
                seconds += time.process_time() - began
                if plan is not None:
                    flying.append(self.device.step(plan))
                began = time.process_time()
                for move in [] if self.moves is None else [*self.moves.before(), *self.moves.after()]:
                    assert self.moves is not None
                    self.moves.moved(Moved(move.number, b"\1" * move.count))
                if flying and (plan is None or len(flying) > 1):
                    self.scheduler.commit_each(flying.popleft())
            seconds += time.process_time() - began
        return seconds


@dataclass
class Talks:
    """Conversations on `run`, whose moves take as long as a step. `moves` are those made, by way."""

    run: Run
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    moves: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # of CPU time

    def __post_init__(self) -> None:
        self.texts = [self.some(1_024) for _ in range(CONVERSATIONS)]
        self.whose, self.asked = dict[str, int](), 0

    def some(self, tokens: int) -> list[int]:
        return [self.draw.randrange(32_000) for _ in range(tokens)]

    def ask(self) -> None:
        if self.asked == TURNS:
            return
        self.asked += 1
        number = self.draw.choice(sorted(set(range(CONVERSATIONS)) - set(self.whose.values())))
        self.texts[number] += self.some(self.draw.randint(96, 160))
        rid, ids = str(self.asked), array("i", self.texts[number]).tobytes()
        self.whose[rid] = number
        self.run.scheduler.admit(Admit(rid, ids, GREEDY, (), self.draw.randint(16, 48)))

    def go(self) -> None:
        """All turns, one after the other in each conversation."""
        run, flying, moving = self.run, deque[StepDone](), list[Move]()
        for _ in range(TOGETHER):
            self.ask()
        while run.scheduler.live.by_rid or moving:
            began = time.process_time()
            plan = run.scheduler.plan()
            due = [] if run.moves is None else [*run.moves.before(), *run.moves.after()]
            packed = [msgspec.msgpack.encode(move) for move in due]
            self.seconds += time.process_time() - began
            self.moves.update(move.way for move in due)
            if plan is not None:
                flying.append(run.device.step(plan))
            answers = [msgspec.msgpack.encode(Moved(move.number, b"\1" * move.count)) for move in moving]
            began = time.process_time()
            for answer in answers:
                assert run.moves is not None
                run.moves.moved(msgspec.msgpack.decode(answer, type=Moved))
            told = run.scheduler.commit_each(flying.popleft()) if flying and (plan is None or len(flying) > 1) else []
            self.seconds += time.process_time() - began
            moving = [msgspec.msgpack.decode(each, type=Move) for each in packed]
            for each in told:
                for finish in each.finishes:
                    del self.whose[each.rids[finish.row]]
                    self.ask()
        run.scheduler.check_integrity()


def talked(*, tiers: bool) -> tuple[float, Counter[str]]:
    """Seconds a turn, and the moves of all."""
    talks = Talks(Run.of(4_096, tiers, stores=True))
    talks.go()
    return talks.seconds / TURNS, talks.moves


def measure(prompts: int, pages: int, *, tiers: bool) -> tuple[float, float]:
    """Seconds a page, of new prompts and of the same ones again."""
    draw = random.Random(0)
    texts = [array("i", [draw.randrange(32_000) for _ in range(pages * PAGE)]).tobytes() for _ in range(prompts)]
    run = Run.of(prompts * (pages + 4) + 64, tiers)
    found = run.ask(texts, 0) / prompts / pages, min(run.ask(texts, turn) for turn in (1, 2, 3)) / prompts / pages
    run.scheduler.check_integrity()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--pages", type=int, default=512, help="of each prompt")
    parser.add_argument("--repeat", type=int, default=6)
    given = parser.parse_args()
    gc.disable()
    runs = {
        tiers: [measure(given.prompts, given.pages, tiers=tiers) for _ in range(given.repeat)]
        for tiers in (False, True)
    }
    for place, name in enumerate(("new", "again")):
        none, some = (1e6 * min(run[place] for run in runs[tiers]) for tiers in (False, True))
        print(f"{name:6} {none:.2f} microseconds a page, with tiers {some - none:.2f} more")
    talks = {tiers: [talked(tiers=tiers) for _ in range(given.repeat)] for tiers in (False, True)}
    none, some = (1e6 * min(seconds for seconds, _ in talks[tiers]) for tiers in (False, True))
    ways = ", ".join(f"{count / TURNS:.2f} {way}" for way, count in talks[True][0][1].items())
    print(f"turns  {none:.0f} microseconds a turn, with tiers {some - none:.0f} more; moves a turn: {ways}")


if __name__ == "__main__":
    main()
