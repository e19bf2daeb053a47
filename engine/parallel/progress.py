"""How far this rank has come: the step it has begun, the collective it is in and the step that its device is at, for
whoever watches it.

A process is one rank, and one of its threads calls collectives, so there is one `PROGRESS` in it. It costs the caller
three assignments. A GPU runs collectives later than they are called, those of a CUDA graph without a call: of these
only the step is seen here.
"""

import time
from typing import Self


class Progress:
    """`collective` names the one that is under way, the `number`-th of this process; "" if there is none. `on_device`
    is the oldest step that is not known to be over, since `device_since`; -1 if there is none."""

    def __init__(self) -> None:
        self.step = -1
        self.collective = ""
        self.number = 0
        self.since = 0.0
        self.on_device = -1
        self.device_since = 0.0

    def device_at(self, step: int) -> None:
        """The device is at a step, or with -1 at none."""
        if step != self.on_device:
            self.on_device, self.device_since = step, time.monotonic()

    def inside(self, collective: str) -> Self:
        """A context, for the length of a collective."""
        self.number += 1
        self.since = time.monotonic()
        self.collective = collective
        return self

    def __enter__(self) -> None:
        """`inside` has noted all there is."""

    def __exit__(self, *failure: object) -> None:
        self.collective = ""


PROGRESS = Progress()
