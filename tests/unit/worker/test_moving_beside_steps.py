"""A scheduler's moves on the streams of a simulated GPU, in any order that a GPU may do them in.

Copies are those of the real Transfers, and steps those of a SimulatedDevice, which sees at once what is not its own.
"""

import random
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, get_args

import pytest
import torch
from simulated_cuda import simulate
from simulated_device import VOCABULARY
from test_batcher import Bench, request

from engine.cache.tiers import TierOptions, WritePolicy
from engine.messages.tiers import Moved
from engine.sched.moves import Moves
from engine.worker.steps.uses import PageUses
from engine.worker.transfers import Transfers
from engine_plugins.tiers.host import HostMemory

UNKNOWN = 7  # no hash


class Memory:
    """The cache of a SimulatedDevice, as a tensor of hashes [pages, page size]."""

    def __init__(self, hashes: torch.Tensor) -> None:
        self.hashes = hashes

    def get(self, place: tuple[int, int]) -> int:
        return int(self.hashes[place])

    def __ior__(self, written: dict[tuple[int, int], int]) -> "Memory":
        for place, value in written.items():
            self.hashes[place] = value
        return self


class GpuBench(Bench):
    """As Bench: steps and copies are put on streams, which go on as `draw` says."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, draw: random.Random, host: int, write: WritePolicy, **options: Any
    ) -> None:
        more = {"cold": draw.choice([1, 2, 6]), "least_part": draw.choice([1, 2, 16])}
        super().__init__(**options, tiers=TierOptions(host, write, False, 1, 1, **more))
        self.draw, size = draw, self.device.page_size
        self.cuda = simulate(monkeypatch, COPY_BYTES=8 * size, AHEAD_BYTES=8 * size, IDLE_AHEAD_BYTES=16 * size)
        memory = Memory(torch.full((self.device.pages, size), UNKNOWN, dtype=torch.int64))
        self.device.store = memory  # type: ignore[assignment]
        each = -(-self.scheduler.max_model_len // size)
        self.uses = PageUses(len(self.scheduler.slots), each, size, self.device.pages)
        pool = HostMemory(capacity_bytes=8 * size * host, argument="", page_bytes=8 * size, manifest={})
        self.transfers = Transfers([[memory.hashes]], torch.device("cuda"), pool, None, {}, 0, self.uses)
        self.streams = [self.cuda.main, *self.transfers._streams.values()]
        self.speeds = [draw.choice([1, 1, 5, 20]) for _ in self.streams]
        self.answers: SimpleQueue[Moved] = SimpleQueue()
        self.moves = Moves([self.scheduler])
        self.begun = self.told_of = 0

    def begin(self, moves: Sequence[Any]) -> None:
        for move in moves:
            self.begun += 1
            self.transfers.begin(move, self.answers.put)

    def plan(self) -> Any:
        plan = self.scheduler.plan(self.now)
        self.begin(self.moves.before())
        if plan is not None:
            self.transfers.follow(plan)
            done: list[Any] = []
            end = self.cuda.Event()
            self.cuda.main.put(lambda: done.append(self.device.run(plan)))
            end.record(self.cuda.main)
            self.transfers.launched(plan, end)
            self.flying.append(done)
        self.begin(self.moves.after())
        return plan

    def commit(self) -> Any:
        done = self.flying.popleft()
        while not done:
            self.go_on()
        return self.told(self.scheduler.commit(done[0], self.now))

    def go_on(self) -> None:
        """A stream does some jobs, and answers come."""
        self.draw.choices(self.streams, self.speeds)[0].go_on(self.draw.choice([1, 1, 2, 9]))
        if self.draw.random() < 0.3:
            time.sleep(1e-5)  # the copiers' turn
        while not self.answers.empty():
            self.told_of += 1
            assert self.moves.moved(self.answers.get()) == ""
            self.begin(self.moves.after())

    def step(self) -> bool:
        super().step()
        self.begin(self.moves.after())
        for _ in range(self.draw.randrange(6)):
            self.go_on()
        return bool(self.flying) or self.begun > self.told_of

    def settle(self) -> None:
        """All that is under way ends."""
        deadline = time.monotonic() + 30
        while self.live or self.step():
            self.step()
            assert time.monotonic() < deadline, "no progress"
        self.scheduler.check_integrity()


def converse(
    monkeypatch: pytest.MonkeyPatch, draw: random.Random, write: WritePolicy, host: int, turns: int
) -> GpuBench:
    """Conversations that come back, some of whose requests are aborted, and a flush now and then."""
    depth, slots, burst = draw.choice([1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([1, 1, 3])
    options = {"page_size": 2, "slots": slots, "max_step_tokens": 9, "depth": depth, "burst": burst, "pages": 16}
    bench = GpuBench(monkeypatch, draw, host, write, max_model_len=24, **options)
    histories: list[list[int]] = [[] for _ in range(5)]
    for turn in range(turns):
        number = draw.randrange(5)
        if len(histories[number]) > 14:
            histories[number] = []
        histories[number] = [*histories[number], *(draw.randrange(VOCABULARY) for _ in range(3))]
        bench.admit(request(f"r{turn}", histories[number], max_new=draw.randint(1, 4)))
        for _ in range(draw.randrange(8)):
            bench.step()
        if bench.live and draw.random() < 0.2:
            rid = draw.choice(bench.live)
            bench.scheduler.stop(rid)
            bench.ends[rid] = "abort"
        if draw.random() < 0.03:
            bench.scheduler.flush()
    bench.settle()
    return bench


@pytest.mark.parametrize("write", get_args(WritePolicy))
def test_no_step_sees_what_is_not_its_own_in_whatever_order_streams_go_on(
    write: WritePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    risen = 0
    for seed, host in enumerate((8, 14, 30)):
        with monkeypatch.context() as patch:
            bench = converse(patch, random.Random(f"{seed} {write}"), write, host, 60)
        assert bench.scheduler.tiers is not None
        risen += bench.scheduler.tiers.counts.from_host
    assert risen > 5
