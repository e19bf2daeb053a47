"""A worker of the simulation: the engine's own scheduler, radix tree and page pool, on a device that only counts time.

A token is four characters of ASCII, so a prompt's ids and its text are the same bytes, and a page of 32 tokens is a
block of the router's index. Left out: steps in flight; the reply's blocks in what it publishes.
"""

from array import array
from typing import Any

from msgspec import Struct

from bench.router.costs import step_seconds
from engine.cache.pages import CachePages
from engine.messages.request import Admit
from engine.messages.step import StepDone, StepPlan
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.sched import Scheduler
from engine.sched.policies import make_policy
from engine.sched.request import Request
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


class Publishing(Scheduler):
    """Notes which blocks enter and leave the tree."""

    def __init__(self, calls: dict[str, Call], **options: Any) -> None:
        self.calls = calls  # by rid
        self.names: dict[int, int] = {}  # of the blocks in pages
        self.stored: list[int] = []
        self.evicted: list[int] = []
        super().__init__(**options)

    def _start_afresh(self, pages: CachePages) -> None:
        super()._start_afresh(pages)
        evict = self._tree.evict

        def noted(count: int) -> list[int]:
            freed = evict(count)
            self.evicted += [self.names.pop(page) for page in freed if page in self.names]
            return freed

        self._tree.evict = noted  # type: ignore[method-assign]

    def _share(self, request: Request, end: int) -> range:
        first = request.shared
        changed = super()._share(request, end)
        blocks = self.calls[request.rid].blocks
        for index in range(max(first, changed.stop), min(request.shared, len(blocks))):
            self.names[request.pages[index]] = blocks[index]
            self.stored.append(blocks[index])
        return changed


class Worker:
    """One engine with `kv_tokens` of cache; its clock is the sum of its steps."""

    def __init__(self, kv_tokens: int = KV_TOKENS) -> None:
        self.prompt_tokens = self.cached_tokens = self.steps = 0
        self._calls: dict[str, Call] = {}
        self._in_slot: dict[int, Call] = {}
        self._scheduler = Publishing(
            self._calls,
            pages=kv_tokens // PAGE,
            page_size=PAGE,
            slots=ROWS,
            max_model_len=kv_tokens,
            max_step_tokens=STEP_TOKENS,
            policy=make_policy(Plugins.load(()), "fcfs"),
            prefix_cache=True,
            max_waiting=1 << 30,
        )

    def admit(self, call: Call) -> None:
        self._calls[str(call.number)] = call
        sampling = Sampling(0.0, 0, 1.0, 0.0, call.number)  # the seed says to the device whose slot it is
        self._scheduler.admit(Admit(str(call.number), call.prompt.tobytes(), sampling, (), len(call.reply)))

    def step(self) -> Step | None:
        """Plan, compute and commit a step; None if there is nothing to do."""
        scheduler = self._scheduler
        if (plan := scheduler.plan()) is None:
            return None
        self.steps += 1
        seconds, tokens = self._run(plan)
        counts = array("i", [1]) * len(tokens)
        reply = scheduler.commit(StepDone(plan.step, counts.tobytes(), tokens.tobytes(), 0.0))
        stored, scheduler.stored = scheduler.stored, []
        evicted, scheduler.evicted = scheduler.evicted, []
        step = Step(seconds, [], [], stored, evicted)
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
