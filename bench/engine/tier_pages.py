"""CPU time that tiers cost the scheduler for each page of a prompt, beside no tiers, without a device.

    python -m bench.engine.tier_pages [--prompts 30] [--pages 512] [--repeat 6]

Prompts come one by one, are computed and end; moves are answered at once. `new`: nothing of them was there before, so
each page goes down. `again`: the device has all of them, as in a conversation. Figures are the least of so many runs,
less what the same run takes without tiers; the garbage collector is off. Left out: a worker's copies.
"""

import argparse
import gc
import random
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engine.cache.tiers import TierOptions
from engine.messages.request import Admit
from engine.messages.step import StepDone
from engine.messages.tiers import Moved
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.sched import Scheduler
from engine.sched.moves import Moves
from engine.sched.policies import make_policy
from engine.testing.fake import FakeDevice

PAGE = 16
LONGEST = 40_000


@dataclass
class Run:
    """A scheduler, its device, and its moves, where there are tiers."""

    scheduler: Scheduler
    device: FakeDevice
    moves: Moves | None

    @classmethod
    def of(cls, pages: int, tiers: bool) -> "Run":
        options = TierOptions(pages, "write-through") if tiers else None
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
            self.scheduler.admit(Admit(f"{turn}.{number}", ids, Sampling(0.0, 0, 1.0, 0.0, 0), (), 2))
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


if __name__ == "__main__":
    main()
