"""A plugin for the benchmark of the router: the echo model, called `paced-echo`, with steps of 50 ms.

So each event of a stream is written by itself, as behind a real model.
"""

import time
from typing import Any

from torch import Tensor

from bench.router.cost import PACE
from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register
from engine.plugin.layers import Batch
from engine_plugins.checkpoints.echo import EchoCheckpoint
from engine_plugins.models.echo import Echo

API = 1
NAME = "paced-echo"


class PacedEcho(Echo):
    """`PacedEcho`."""

    def run(self, hidden: Tensor, batch: Batch, first: int, last: int) -> Tensor:
        time.sleep(PACE)
        return super().run(hidden, batch, first, last)


class PacedCheckpoint(EchoCheckpoint):
    """Opens the name of this model."""

    @classmethod
    def open(cls, model: str) -> "PacedCheckpoint | None":
        return cls() if model == NAME else None

    def name(self) -> str:
        return NAME

    def config(self) -> dict[str, Any]:
        return super().config() | {"architectures": ["PacedEcho"]}


@hookimpl
def register_models(register: Register) -> None:
    register(NAME, f"{__name__}:PacedEcho", architectures=("PacedEcho",), description="slow echo")


@hookimpl
def register_checkpoints(register: Register) -> None:
    register(NAME, f"{__name__}:PacedCheckpoint", models={NAME: "slow echo"}, description="no weights")
