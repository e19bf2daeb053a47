"""A worker of the simulation: the engine's own scheduler, radix tree and page pool, on a device that only counts time.

A token is four characters of ASCII, so a prompt's ids and its text are the same bytes, and a page of 32 tokens is a
block of the router's index. Left out: steps in flight; the reply's blocks in what it publishes.
"""

from array import array
from collections.abc import Sequence

from msgspec import Struct

from bench.router.costs import step_seconds
from engine.cache.blocks import HeldBlocks
from engine.messages.cache import Blocks
from engine.messages.request import Admit
from engine.messages.step import StepDone, StepPlan
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.sched import Scheduler
from engine.sched.policies import make_policy
from engine.testing.steps import rows_of

PAGE = 32
KV_TOKENS = 800_000  # (140 GiB * 0.9 - 16 GB of weights) / 131,072 bytes, less what steps need
STEP_TOKENS = 8192
ROWS = 256


class Call(Struct):
    """One request: its prompt and its reply (int32), and the names of the prompt's blocks."""

    number: int
    prompt: "array[int]"
    reply: "array[int]"
    blocks: "array[int]"


class Step(Struct):
    """What a step brought: its time, who got a first token and how many cached tokens it had, who ended, and what
    entered and left the cache when it was planned."""

    seconds: float
    firsts: list[tuple[int, int]]
    ended: list[int]
    stored: list[int]
    evicted: list[int]


class Changes:
    """Blocks that entered and left a cache since they were last taken."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._stored: list[int] = []
        self._evicted: list[int] = []

    def stored(self, space: bytes, hashes: Sequence[int]) -> None:
        self._stored += hashes

    def evicted(self, hashes: Sequence[int]) -> None:
        self._evicted += hashes

    def taken(self) -> tuple[list[int], list[int]]:
        """What entered, and what left."""
        found = self._stored, self._evicted
        self.reset()
        return found


class Worker:
    """One engine with `kv_tokens` of cache; its clock is the sum of its steps."""

    def __init__(self, kv_tokens: int = KV_TOKENS) -> None:
        self.prompt_tokens = self.cached_tokens = self.steps = 0
        self._calls: dict[str, Call] = {}
        self._in_slot: dict[int, Call] = {}
        self._changes = Changes()
        self._scheduler = Scheduler(
            pages=kv_tokens // PAGE,
            page_size=PAGE,
            slots=ROWS,
            max_model_len=kv_tokens,
            max_step_tokens=STEP_TOKENS,
            policy=make_policy(Plugins.load(()), "fcfs"),
            prefix_cache=True,
            max_waiting=1 << 30,
            held=HeldBlocks(self._changes),
        )

    def admit(self, call: Call) -> None:
        self._calls[str(call.number)] = call
        sampling = Sampling(0.0, 0, 1.0, 0.0, call.number)  # the seed says to the device whose slot it is
        ends = array("i", range(PAGE, len(call.prompt) + 1, PAGE))[: len(call.blocks)]
        blocks = Blocks(b"", call.blocks[: len(ends)].tobytes(), ends.tobytes())
        admit = Admit(str(call.number), call.prompt.tobytes(), sampling, (), len(call.reply), blocks=blocks)
        self._scheduler.admit(admit)

    def step(self) -> Step | None:
        """Plan, compute and commit a step; None if there is nothing to do."""
        scheduler = self._scheduler
        if (plan := scheduler.plan()) is None:
            return None
        self.steps += 1
        seconds, tokens = self._run(plan)
        counts = array("i", [1]) * len(tokens)
        reply = scheduler.commit(StepDone(plan.step, counts.tobytes(), tokens.tobytes(), 0.0))
        step = Step(seconds, [], [], *self._changes.taken())
        if reply is not None:
            for row, cached in reply.cached:
                call = self._calls[reply.rids[row]]
                self.prompt_tokens += len(call.prompt)
                self.cached_tokens += cached
                step.firsts.append((call.number, cached))
            for finish in reply.finishes:
                step.ended.append(self._calls.pop(reply.rids[finish.row]).number)
        return step

    def _run(self, plan: StepPlan) -> tuple[float, "array[int]"]:
        """How long the step takes, and the tokens it yields."""
        for admit in plan.admits:
            self._in_slot[admit.slot] = self._calls[str(admit.sampling.seed)]
        tokens = array("i")
        computed = context = pairs = 0
        for slot, start, length, yields in rows_of(plan):
            computed += length
            if length == 1:
                context += start
            else:
                pairs += length * (2 * start + length) // 2
            if yields:
                call = self._in_slot[slot]
                tokens.append(call.reply[start + length - len(call.prompt)])
        return step_seconds(computed, context, pairs), tokens
