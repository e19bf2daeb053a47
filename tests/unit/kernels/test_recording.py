"""Recorded C calls: replayed on other numbers, and refused where torch computed a part of the step."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels import KernelSet
from engine.kernels.cpu import calls as cpu
from engine.kernels.cpu.recording import Recording
from engine.worker.steps.graphs import Tables
from engine.worker.steps.recorded import MOST_ROWS, RecordedSteps
from engine.worker.steps.rows import Rows

KERNELS = cpu.kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="there is no C compiler here")


@torch.inference_mode()
def test_a_replay_computes_the_same_from_other_numbers() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)
    library = KERNELS.library
    with Recording(KERNELS) as recording:
        out = KERNELS.silu_and_mul(KERNELS.rms_norm(x.view(3, 64), weight, 1e-5))
    assert KERNELS.library is library and not recording.computed
    x.copy_(torch.randn(3, 64))
    recording.replay()
    assert torch.equal(out, KERNELS.silu_and_mul(KERNELS.rms_norm(x, weight, 1e-5)))


def test_a_recording_does_not_import_torchs_compiler() -> None:
    """A worker would wait a second for it, in its first step."""
    script = """
import sys, torch
from engine.kernels.cpu import calls
from engine.kernels.cpu.recording import Recording
with Recording(calls.kernels()):
    torch.empty(3)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x * 2,
        lambda x: x.add_(1),
        lambda x: x[:, :3].contiguous(),
        lambda x: x.to(torch.bfloat16),
        torch.zeros_like,
    ],
    ids=["multiplies", "in place", "copies", "converts", "fills"],
)
@torch.inference_mode()
def test_what_torch_computes_is_noticed(compute: Any) -> None:
    with Recording(KERNELS) as recording:
        compute(KERNELS.silu_and_mul(torch.empty(3, 64)))
    assert len(recording.computed) >= 1


class Backend:
    def __init__(self, captured: bool) -> None:
        self.captured = captured
        self.starts = np.empty(0)

    def capture(self, batch: Any) -> str | None:
        return "plan" if self.captured else None

    def refill(self, plan: str, slots: np.ndarray, starts: np.ndarray) -> None:
        self.starts = starts.copy()


class Counting:
    """A model whose hidden states are a token's row of a matrix: one call in C. It counts how often its Python runs."""

    def __init__(self, captured: bool = True, in_torch: bool = False) -> None:
        self.backends = (Backend(captured),)
        self.in_torch = in_torch
        self.kernels = KernelSet(dense=KERNELS)
        self.runs = 0
        numbers = torch.arange(32 * 32, dtype=torch.float32).view(32, 32)
        self.matrix = KERNELS.matrices([("F32", numbers.view(torch.uint8).numpy())])[0]

    def __call__(self, batch: Any, hidden: Tensor | None = None) -> Tensor:
        self.runs += 1
        hidden = self.matrix.select(batch.ids)
        return hidden * 2 if self.in_torch else hidden


def steps(model: Any) -> RecordedSteps:
    tokens = torch.arange(5 * 4, dtype=torch.int32).view(5, 4)
    return RecordedSteps(Tables(model, (), tokens, torch.zeros(5, 2, dtype=torch.int32), 2))


def rows(*pairs: tuple[int, int], length: int = 1) -> Rows:
    return Rows.of(np.array([(slot, start, length, 1) for slot, start in pairs]))


@torch.inference_mode()
def test_steps_are_recorded_once_for_each_number_of_rows() -> None:
    model = Counting()
    recorded = steps(model)
    for number, step in enumerate([rows((0, 1), (3, 2)), rows((4, 0), (1, 3)), rows((2, 2), (2, 3))]):
        assert recorded.fits(step)
        hidden, inputs = recorded.replay(step)
        assert hidden[:, 0].tolist() == ((step.slots * 4 + step.starts) * 32).tolist()
        assert torch.equal(inputs, torch.from_numpy(np.stack((step.slots, step.starts)))) and model.runs == 1, number
        assert model.backends[0].starts.tolist() == step.starts.tolist()
    assert recorded.fits(rows((0, 0))) and not recorded.fits(rows((0, 0), length=2))
    assert not recorded.fits(rows(*[(0, 0)] * (MOST_ROWS + 1)))
    recorded.replay(rows((1, 1)))
    assert model.runs == 2


@torch.inference_mode()
def test_a_model_that_computes_in_torch_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    recorded = steps(Counting(in_torch=True))
    assert recorded.fits(rows((1, 1)))
    hidden, _ = recorded.replay(rows((1, 1)))
    assert hidden[0, 0] == 5 * 32 * 2, "the step that was recorded counts"
    assert not recorded.fits(rows((1, 1))) and "aten.mul" in caplog.text


@torch.inference_mode()
def test_a_backend_that_cannot_be_captured_runs_as_it_is() -> None:
    assert not steps(Counting(captured=False)).fits(rows((1, 1)))
    assert not steps(SimpleNamespace(kernels=KernelSet(dense=KERNELS), backends=())).fits(rows((1, 1)))
