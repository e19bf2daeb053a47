"""A simulated device for each copy of attention, which get their parts of a plan and join their results as ranks do."""

from collections.abc import Sequence

from simulated_device import SimulatedDevice

from engine.messages.step import NOTHING, StepDone, StepPlan
from engine.sched.shares import gathered
from engine.testing.steps import rows_of
from engine.worker.steps.copies import Copy


class SimulatedCopies:
    """`copies` devices of `slots` / `copies` slots each, or those that are given."""

    def __init__(
        self,
        copies: int,
        pages: int,
        page_size: int,
        slots: int,
        max_step_tokens: int,
        devices: Sequence[SimulatedDevice] = (),
    ) -> None:
        each = slots // copies
        self.copies = [Copy(number, copies, each) for number in range(copies)]
        self.devices = devices or [SimulatedDevice(pages, page_size, each, max_step_tokens) for _ in self.copies]
        self.slots = each
        self.tokens: list[tuple[int, ...]] = []  # of each copy, in each step

    def run(self, plan: StepPlan) -> StepDone:
        parts = []
        for copy, device in zip(self.copies, self.devices, strict=True):
            own, among = copy.own(plan)
            if among.idle:
                assert list(rows_of(own)) == [(self.slots, 0, 1, NOTHING)] and not (own.admits or own.pages)
                assert not own.encodes and not own.forgets
                done = StepDone(plan.step, b"", b"", 0.0)
            else:
                done = device.run(own)
            parts.append(among.numbered(done))
        self.tokens.append(among.tokens)
        return gathered(parts)

    @property
    def computed(self) -> int:
        return sum(device.computed for device in self.devices)

    def clear(self) -> None:
        """All that was in the caches is lost."""
        for device in self.devices:
            device.clear()
