"""Decode steps on a CPU as recorded C calls (engine/kernels/cpu/recording.py): a third of a small model's step is
Python.

The first step of so many rows runs as any other and is recorded on the way; later ones write their slots, ids,
positions, turns and places where it read them, and repeat its calls. A model that computes something in torch, one with
recurrent layers, copies of attention, and an attention backend that cannot `capture`, are left to run as they are.
Left out: steps of many rows, where Python is a small part and what a recording holds (the activations of all layers) is
large; steps with prompts.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu.calls import Kernels
from engine.kernels.cpu.recording import Recording
from engine.layers.attention import Prefix
from engine.layers.batch import Batch
from engine.worker.steps.graphs import Tables
from engine.worker.steps.rows import Rows

log = logging.getLogger("engine.worker")

MOST_ROWS = 8


class RecordedStep:
    """A decode step of `rows` rows. The tensors of its batch stay where they are."""

    def __init__(self, rows: int, tables: Tables) -> None:
        self._tables = tables
        self.inputs = torch.zeros(2, rows, dtype=torch.int64)  # slots, positions
        self._offsets = torch.arange(rows + 1)
        self.plans = tuple(backend.capture(self._batch()) for backend in tables.model.backends)
        self._static = self._batch()
        self._recording: Recording | None = None
        self._hidden = torch.empty(0)
        self._entering = tables.entering(rows)

    def _batch(self, plans: tuple[object, ...] = ()) -> Batch:
        slots, positions = self.inputs.unbind(0)
        return self._tables.batch(slots, positions, slots, positions, self._offsets, plans)

    def run(self, recording: Recording, rows: Rows, entering: Tensor | None) -> Tensor:
        """The step of `rows` for the first time: hidden states [R, H]."""
        self._fill(rows, entering)
        self._static = self._batch(self.plans)
        with recording:
            self._hidden = self._tables.model(self._static, self._entering)
        self._recording = recording
        return self._hidden

    def replay(self, rows: Rows, entering: Tensor | None) -> Tensor | None:
        """The same step of other `rows`; None where it has not run yet."""
        if self._recording is None:
            return None
        self._fill(rows, entering)
        now = self._batch()
        self._static.ids.copy_(now.ids)
        self._static.places.copy_(now.places)
        if self._static.turns is not None:
            assert now.turns is not None
            self._static.turns.copy_(now.turns)
        self._recording.replay()
        return self._hidden

    def _fill(self, rows: Rows, entering: Tensor | None) -> None:
        if self._entering is not None:
            assert entering is not None
            self._entering.copy_(entering)
        self.inputs.numpy()[:] = rows.slots, rows.starts
        for backend, plan in zip(self._tables.model.backends, self.plans, strict=True):
            backend.refill(plan, rows.slots, rows.starts)


class RecordedSteps:
    """The recorded steps of one model, one for each number of rows; used as DecodeGraphs are."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._steps: dict[int, RecordedStep] = {}
        dense = tables.model.kernels.dense
        self._kernels = dense if isinstance(dense, Kernels) else None
        self._possible = self._kernels is not None and bool(tables.model.backends) and not tables.states
        self._possible = self._possible and not tables.copies

    draws = False  # tokens are drawn from logits

    def capture(self, most: int, pool: object) -> bool:
        """Whether steps can be recorded: each is, when it first runs."""
        return self._possible

    def fits(self, rows: Rows) -> bool:
        """Whether the step of `rows` is recorded, or is to be."""
        count = len(rows)
        if not self._possible or count > MOST_ROWS or not rows.decode:
            return False
        if count not in self._steps:
            step = RecordedStep(count, self._tables)
            if any(plan is None for plan in step.plans):
                return self._impossible("the attention backend cannot be captured")
            self._steps[count] = step
        return True

    def replay(
        self, rows: Rows, prefixes: Sequence[Prefix] = (), entering: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the step: hidden states [R, H], and slots and positions [2, R]; good until the next replay. `entering`
        are the hidden states that the stage before has passed on. Nothing is made of `prefixes`."""
        step = self._steps[len(rows)]
        hidden = step.replay(rows, entering)
        if hidden is None:
            assert self._kernels is not None
            recording = Recording(self._kernels)
            hidden = step.run(recording, rows, entering)
            if recording.computed:
                self._impossible(f"the model computes {', '.join(sorted(recording.computed))} in torch")
        return hidden, step.inputs

    def draw(self, count: int, lines: np.ndarray | None) -> Tensor:
        raise AssertionError("a recorded step draws no tokens")

    def _impossible(self, why: str) -> bool:
        log.info("decode steps are not recorded: %s", why)
        self._possible = False
        self._steps.clear()
        return False
