"""An executor without a device or a process: drives the scheduler in tests and benchmarks.

`FakeDevice` counts upwards from each row's last token, as the `echo` model does, so a lost, doubled or
reordered step shows as a gap in the count. It keeps tokens only: no KV memory is simulated, and no sampling
parameter but those that ask for log-probabilities is looked at: a token's is made up from its id and its place.
What requests need is loaded as soon as it is made, and not held to.
A vector is the sum of its prompt's ids and how many they are.
"""

from array import array
from collections.abc import Callable

import anyio
from msgspec.structs import replace

from engine.messages import FromExecutor, ToExecutor
from engine.messages.assets import Drop, Load, Loaded
from engine.messages.control import Answer, Ask, Reset, WorkerLost, WorkerReady
from engine.messages.step import VECTOR, Logprobs, SlotAdmit, StepDone, StepPlan
from engine.runtime.channel import Outbox, Receiver
from engine.testing.steps import rows_of

BYTES = 256


def made_up(row: int, start: int, tokens: "array[int]", top: int) -> Logprobs:
    """What a fake device says of `tokens` from position `start` on: the likeliest are the next ones in order."""
    logprobs = array("f", [-(token + start + index) / 1024 for index, token in enumerate(tokens)])
    likeliest = [(token + rank, logprob - rank) for token, logprob in zip(tokens, logprobs, strict=True)
                 for rank in range(top)]  # fmt: skip
    return Logprobs(
        row,
        logprobs.tobytes(),
        array("i", [1] * len(tokens)).tobytes(),
        array("i", [token % BYTES for token, _ in likeliest]).tobytes(),
        array("f", [logprob for _, logprob in likeliest]).tobytes(),
    )


class FakeDevice:
    """The device tables of a worker, on the host: `tokens[slot]` is a list indexed by position."""

    def __init__(self) -> None:
        self.tokens: dict[int, array[int]] = {}
        self.admits: dict[int, SlotAdmit] = {}

    def step(self, plan: StepPlan) -> StepDone:
        for admit in plan.admits:
            self.tokens[admit.slot] = array("i", admit.ids)
            self.admits[admit.slot] = admit
        sampled = array("i")
        logprobs: list[Logprobs] = []
        prompt_logprobs: list[Logprobs] = []
        vectors = array("f")
        for row, (slot, start, length, yields) in enumerate(rows_of(plan)):
            ids = self.tokens[slot]
            end = start + length
            assert end <= len(ids), f"slot {slot} is asked for position {end - 1} of {len(ids)} known tokens"
            admit = self.admits[slot]
            asked = admit.sampling
            first, last = max(start, admit.scored) + 1, min(end + 1, admit.prompt_len)
            if asked.prompt_logprobs >= 0 and first < last:
                prompt_logprobs.append(made_up(row, first, ids[first:last], asked.prompt_logprobs))
            if yields == VECTOR:
                assert (start, end) == (0, len(ids)), f"slot {slot} is to be made a vector, but not of all it holds"
                vectors.extend((sum(ids), len(ids)))
            elif yields:
                token = (ids[end - 1] + 1) % BYTES
                del ids[end:]
                ids.append(token)
                if asked.logprobs >= 0:
                    logprobs.append(made_up(len(sampled), end, ids[end:], asked.logprobs))
                sampled.append(token)
        counts = array("i", [1] * len(sampled)).tobytes()
        scores = (tuple(logprobs), tuple(prompt_logprobs))
        return StepDone(plan.step, counts, sampled.tobytes(), 0.0, *scores, vectors=vectors.tobytes())


class FakeExecutor:
    """Answers each StepPlan after `seconds`; `lose()` plays the death of the worker."""

    name = "executor"

    def __init__(
        self,
        ready: WorkerReady,
        inbox: Receiver[ToExecutor],
        scheduler: Outbox[FromExecutor],
        seconds: float = 0.0,
    ) -> None:
        self.ready = ready
        self.inbox = inbox
        self.scheduler = scheduler
        self.seconds = seconds
        self.restarted: anyio.Event | None = None  # a restart lasts until then
        self.device = FakeDevice()
        self.lost = False
        self.steps = 0
        self.answer: Callable[[Ask], Answer] = unanswered
        self.loaded: list[int] = []  # numbers of what requests need
        self.dropped: list[int] = []

    async def run(self) -> None:
        await self.scheduler.send(self.ready)
        async for message in self.inbox:
            if isinstance(message, Reset):
                if self.restarted is not None:
                    await self.restarted.wait()
                self.device, self.lost = FakeDevice(), False
                await self.scheduler.send(self.ready)
            elif isinstance(message, Ask) and not self.lost:
                await self.scheduler.send(self.answer(message))
            elif isinstance(message, Load):
                self.loaded.append(message.number)
                await self.scheduler.send(Loaded(message.kind, message.number))
            elif isinstance(message, Drop):
                self.dropped.append(message.number)
            elif isinstance(message, StepPlan) and not self.lost:
                self.steps += 1
                await anyio.sleep(self.seconds)
                if not self.lost:
                    await self.scheduler.send(replace(self.device.step(message), seconds=self.seconds))

    async def lose(self, cause: str) -> None:
        self.lost = True
        await self.scheduler.send(WorkerLost(cause))


def unanswered(ask: Ask) -> Answer:
    """What a fake device says to a question, unless a test lets it answer."""
    return Answer(ask.number, cause="a fake device answers no questions")
