"""A whole engine without a device: the real actors around a FakeExecutor and the echo model's text."""

from array import array
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio
import msgspec

from engine.actors.compiler import CompilerActor
from engine.actors.opening import Maker
from engine.actors.scheduler import SchedulerActor
from engine.config import Config, resolve
from engine.messages import FromFront, ToFront
from engine.messages.control import Answer, Ask, WorkerReady
from engine.messages.grammars import GRAMMAR
from engine.messages.questions import (
    CountExperts,
    Echo,
    ExpertCounts,
    ExpertMap,
    ExpertWindow,
    LookAtExperts,
    Profile,
    RebalanceExperts,
)
from engine.messages.request import Generate
from engine.params.sampling import SamplingParams
from engine.plugin.registry import Plugins
from engine.runtime.actor import Actor
from engine.runtime.channel import Outbox, channel, open_channel
from engine.runtime.front import Front
from engine.runtime.launch import open_front
from engine.runtime.process import Start
from engine.sched.policies import make_policy
from engine.testing.fake import FakeExecutor

GREEDY = {"temperature": 0.0}


def prompt(text: str, rid: str = "r", **params: Any) -> Generate:
    return Generate(rid, SamplingParams(**{**GREEDY, **params}), text=text)


def counted(start: str, count: int) -> str:
    """What the echo model says after a prompt that ends in `start`."""
    return bytes((ord(start) + 1 + index) % 256 for index in range(count)).decode(errors="replace")


# Layers 1 and 3 of three experts, of which two groups hold two each: expert 0 is on both.
EXPERT_MAP = ExpertMap(
    layers=(1, 3),
    ranks=2,
    placement=array("i", [0, 1, 2, 0, 0, 1, 0, 2]).tobytes(),
    counts=array("q", [40, 10, 10, 0, 0, 0]).tobytes(),
    loads=array("d", [30, 30, 0, 0]).tobytes(),
    windows=(ExpertWindow(256, 50, 1.5, 0.0), ExpertWindow(512, 10, 1.25, 0.125)),
    moved=2,
    waiting=1,
)


class Answers:
    """What the fake device answers: where a trace would be, and made-up counts of layers 1 and 3 with three experts
    each. The first of the counts is how many steps there were since the start."""

    def __init__(self, executor: FakeExecutor) -> None:
        self.executor = executor
        self.since = 0
        self.counting = False

    def __call__(self, ask: Ask) -> Answer:
        value: Any
        match msgspec.msgpack.decode(
            ask.question, type=Profile | CountExperts | LookAtExperts | RebalanceExperts | Echo
        ):
            case Profile(folder):
                value = folder
            case Echo(value):
                pass
            case LookAtExperts():
                value = EXPERT_MAP
            case RebalanceExperts():
                value = 2
            case CountExperts(action):
                if action == "start":
                    self.since = self.executor.steps
                self.counting = action == "start" or (self.counting and action != "stop")
                counts = array("q", [self.executor.steps - self.since, 1, 2, 3, 4, 5])
                value = ExpertCounts(self.counting, (1, 3), counts.tobytes())
        return Answer(ask.number, msgspec.msgpack.encode(value))


class House:
    """`front`, and the parts behind it that a test may look into or break."""

    front: Front
    scheduler: SchedulerActor
    executor: FakeExecutor
    compiler: CompilerActor

    async def settled(self) -> None:
        """Wait until nothing runs, waits or is in flight; then everything must add up."""
        with anyio.fail_after(60):
            logic = self.scheduler.scheduler
            assert logic is not None
            while (counts := logic.counts())["running"] or counts["waiting"] or self.scheduler.in_flight:
                await anyio.sleep(0.002)
        logic.check_integrity()
        assert counts["pages_free"] + counts["pages_cached"] == counts["pages"]

    async def text(self, request: Generate) -> str:
        async with aclosing(self.front.generate(request)) as stream:
            return "".join([chunk.text async for chunk in stream])


@asynccontextmanager
async def open_house(
    *,
    pages: int = 1024,
    seconds: float = 0.0,
    vocab_size: int = 257,
    embedding_size: int = 0,
    recurrent: bool = False,
    encoder_tokens: int = 0,
    compiler: Start | None = None,
    **options: Any,
) -> AsyncIterator[House]:
    """Options as those of the engine; the others are the fake device's, which has no pages if it makes vectors, but for
    `compiler`, which starts another process in the place of the compiler of grammars."""
    config = resolve({"model": "echo", "page_size": 4, "max_running": 16, "max_step_tokens": 64, **options})
    house = House()

    def core(config: Config, front: Outbox[ToFront]) -> tuple[list[Actor], Outbox[FromFront]]:
        to_scheduler, scheduler_inbox = open_channel()
        to_executor, executor_inbox = channel(4)
        to_compiler, compiler_inbox = open_channel()
        policy = make_policy(Plugins.load(()), config.schedule.policy)
        size = config.cache.page_size
        slots, step_tokens = config.schedule.max_running, config.schedule.max_step_tokens
        held, longest = 0 if embedding_size else pages, pages * size
        sizes = (held, size, slots, step_tokens, longest, vocab_size)
        sees = {"encoder_tokens": encoder_tokens, "embeddings": 4 * encoder_tokens}
        ready = WorkerReady(*sizes, 4, "none", "none", {}, embedding_size, recurrent=recurrent, **sees)
        makers = {GRAMMAR: Maker(to_compiler, kept=config.grammar.grammar_cache)}
        house.scheduler = SchedulerActor(
            config, policy, scheduler_inbox, executor=to_executor, makers=makers, front=front
        )
        house.executor = FakeExecutor(ready, executor_inbox, to_scheduler, seconds)
        house.executor.answer = Answers(house.executor)
        started = {"start": compiler} if compiler else {}
        house.compiler = CompilerActor(config, compiler_inbox, to_scheduler, **started)
        return [house.scheduler, house.executor, house.compiler], to_scheduler

    async with open_front(config, core) as house.front:
        await house.front.ready()
        yield house
