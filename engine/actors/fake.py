"""An executor without a device or a process: drives the scheduler in tests and benchmarks.

`FakeDevice` counts upwards from each row's last token, as the `echo` model does, so a lost, doubled or
reordered step shows as a gap in the count. It keeps tokens only: no KV memory is simulated.
"""

from array import array

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from engine.channel import Outbox
from engine.messages import FromExecutor, Reset, StepDone, StepPlan, ToExecutor, WorkerLost, WorkerReady

BYTES = 256


class FakeDevice:
    """The device tables of a worker, on the host: `tokens[slot]` is a list indexed by position."""

    def __init__(self) -> None:
        self.tokens: dict[int, array[int]] = {}

    def step(self, plan: StepPlan) -> StepDone:
        for admit in plan.admits:
            self.tokens[admit.slot] = array("i", admit.ids)
        rows = array("i", plan.rows)
        sampled = array("i")
        for slot, start, length, sample in zip(rows[0::4], rows[1::4], rows[2::4], rows[3::4], strict=True):
            ids = self.tokens[slot]
            end = start + length
            assert end <= len(ids), f"slot {slot} is asked for position {end - 1} of {len(ids)} known tokens"
            if sample:
                token = (ids[end - 1] + 1) % BYTES
                del ids[end:]
                ids.append(token)
                sampled.append(token)
        return StepDone(plan.step, array("i", [1] * len(sampled)).tobytes(), sampled.tobytes(), 0.0)


class FakeExecutor:
    """Answers each StepPlan after `seconds`; `lose()` plays the death of the worker."""

    name = "executor"

    def __init__(
        self,
        ready: WorkerReady,
        inbox: MemoryObjectReceiveStream[ToExecutor],
        scheduler: Outbox[FromExecutor],
        seconds: float = 0.0,
    ) -> None:
        self.ready = ready
        self.inbox = inbox
        self.scheduler = scheduler
        self.seconds = seconds
        self.device = FakeDevice()
        self.lost = False

    async def run(self) -> None:
        await self.scheduler.send(self.ready)
        async for message in self.inbox:
            if isinstance(message, Reset):
                self.device, self.lost = FakeDevice(), False
                await self.scheduler.send(self.ready)
            elif isinstance(message, StepPlan) and not self.lost:
                await anyio.sleep(self.seconds)
                if not self.lost:
                    await self.scheduler.send(self.device.step(message))

    async def lose(self, cause: str) -> None:
        self.lost = True
        await self.scheduler.send(WorkerLost(cause))
