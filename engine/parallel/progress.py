"""How far this rank has come: the step it has begun and the collective it is in, for whoever watches it.

A process is one rank, and one of its threads calls collectives, so there is one `PROGRESS` in it. It costs the caller
three assignments. What a CUDA graph does once it is replayed is not seen here.
"""

import time
from typing import Self


class Progress:
    """`collective` names the one that is under way, the `number`-th of this process; "" if there is none."""

    def __init__(self) -> None:
        self.step = -1
        self.collective = ""
        self.number = 0
        self.since = 0.0

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
