"""CPU time of a step's plan, commit and frames, with one front and with several, a step of each in turn.

    python -m bench.engine.fronts [--running 256] [--fronts 4] [--steps 1500]

`steady`, all requests run throughout; `churn`, each has 256 tokens, and another takes the place of one that ends, so
rows join and leave in most steps. What a step says is packed as it is sent: to one front by channel.pack, to each of
several by the hub. Figures are CPU time of this process, without the fake device; sockets are left out.
"""

import argparse
import random
import time
from array import array

import msgspec

from engine.messages.request import Admit
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.runtime.channel import pack
from engine.sched import Scheduler
from engine.sched.policies import make_policy
from engine.testing.fake import FakeDevice

LONGEST = 16384
REPLY = 256
NUMBERS = 256  # by which keys of one front follow each other


class Run:
    """A scheduler for so many `fronts`, two steps ahead of its device."""

    def __init__(self, fronts: int, running: int, of: int, *, churn: bool) -> None:
        self.seconds: list[float] = []
        self._running, self._churn, self._fronts = running, churn, of
        self._random = random.Random(0)
        self._number = 0
        policy = make_policy(Plugins.load(()), "fcfs")
        self._scheduler = Scheduler(
            pages=1 << 16, page_size=16, slots=running, max_model_len=LONGEST, max_step_tokens=8192, policy=policy,
            prefix_cache=True, max_waiting=running, fronts=fronts,
        )  # fmt: skip
        self._device = FakeDevice()
        self._flying: list[msgspec.Struct] = []
        self._encoder = msgspec.msgpack.Encoder()
        for _ in range(running):
            self._admit(self._random.randint(1, REPLY) if churn else LONGEST - 40)

    def _admit(self, length: int) -> None:
        rid = format(NUMBERS * self._number + self._random.randrange(self._fronts), "x")
        self._number += 1
        ids = array("i", [self._random.randrange(50_000) for _ in range(32)]).tobytes()
        self._scheduler.admit(Admit(rid, ids, Sampling(0.0, 0, 1.0, 0.0, 0), (), length))

    def step(self) -> None:
        counts = self._scheduler.counts()
        while self._churn and counts["running"] + counts["waiting"] < self._running:
            self._admit(REPLY)
            counts = self._scheduler.counts()
        began = time.process_time()
        plan = self._scheduler.plan()
        planned = time.process_time()
        assert plan is not None
        self._flying.append(self._device.step(plan))
        if len(self._flying) < 2:
            return
        done = self._flying.pop(0)
        again = time.process_time()
        for message in self._scheduler.commit_each(done):  # type: ignore[arg-type]
            pack(self._encoder, message)
        self.seconds.append(planned - began + time.process_time() - again)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--fronts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    print(f"us of CPU time a step, {options.running} running requests, 1 front and {options.fronts}")
    for churn in (False, True):
        runs = [Run(fronts, options.running, options.fronts, churn=churn) for fronts in (1, options.fronts)]
        for _ in range(options.steps):
            for run in runs:
                run.step()
        alone, several = (sorted(run.seconds) for run in runs)
        said = []
        for share in (0.1, 0.5):
            one, many = (times[int(len(times) * share)] * 1e6 for times in (alone, several))
            said.append(f"p{share * 100:.0f} {one:.0f} and {many:.0f}, ratio {many / one:.3f}")
        print(f"  {'churn' if churn else 'steady':8s} {'   '.join(said)}")


if __name__ == "__main__":
    main()
