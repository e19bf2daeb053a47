"""The plan of a GPU's memory has what media take there: the peak of encoding, what a step shows, and what is held."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_dummy import TERMS
from torch import Tensor

from engine.config import resolve
from engine.errors import PluginError
from engine.messages.control import Boot
from engine.messages.media import Pixels
from engine.worker import memory, start
from engine.worker.sight import Sight, encoder_bytes
from engine.worker.start import Sizes, activation_bytes, shown_lines

CPU = torch.device("cpu")
BESIDE, WIDTH = 4000, 32  # bytes of a token while it is encoded, and of its embedding
MIB = 1 << 20


class Memory:
    """A GPU's, as torch tells of it: the bytes that are taken, and the most since it was asked to forget."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
        self.taken = self.peak = taken
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.taken)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.forget)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def forget(self, device: torch.device) -> None:
        self.peak = self.taken

    def take(self, size: int) -> None:
        self.taken += size
        self.peak = max(self.peak, self.taken)


class Tower:
    """Encodes a picture of n tokens in n * BESIDE bytes, which are there beside the embeddings."""

    held = range(1)

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = memory

    def largest_medium(self, tokens: int) -> Pixels:
        return Pixels(b"", (tokens,), (tokens,), 1.0, (), ())

    def encode(self, media: Sequence[Pixels]) -> list[Tensor]:
        assert self.memory is not None, "it has nothing to encode"
        (tokens,) = media[0].shape
        self.memory.take(tokens * BESIDE)
        self.memory.take(tokens * WIDTH)
        self.memory.take(-tokens * BESIDE)
        return [torch.empty(0)]


def test_the_peak_of_encoding_is_measured_and_what_is_shown_and_held_added(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "engine.worker")
    memory = Memory(monkeypatch, 70 * MIB)  # weights
    memory.take(9 * MIB)  # a step before
    memory.take(-9 * MIB)
    tower: Any = Tower(memory)
    found = encoder_bytes(tower, CPU, Sight(3000, held=100_000, token_bytes=WIDTH, lines=40_000), step_tokens=70_000)
    assert found == 3000 * (BESIDE + WIDTH) + (70_000 + 40_000 + 100_000) * WIDTH
    taken = "takes 11 MiB, a step that shows them 2 MiB, its graphs 1 MiB, and what is held 3 MiB"
    assert [record.getMessage() for record in caplog.records] == [f"encoding 3000 tokens of media {taken}"]


def test_a_stage_that_encodes_nothing_takes_nothing() -> None:
    later: Any = Tower()
    later.held = range(1, 2)
    assert encoder_bytes(later, CPU, Sight(3000, 100_000, WIDTH), 70_000) == 0
    reads_text_alone: Any = None
    assert encoder_bytes(reads_text_alone, CPU, Sight(), 70_000) == 0


def test_lines_of_captured_steps_are_counted_as_many_as_there_will_be() -> None:
    def lines(slots: int, most: int, **options: Any) -> int:
        return shown_lines(resolve({"model": "m", **options}, {}), Sizes(slots, 8192), most, 512)

    assert lines(256, 8192) == 8192 and lines(256, 700) == 700
    assert lines(32, 1100) == 1024, "of few rows, beyond which graphs begin at 1,280"
    assert lines(2, 8192) == 1024, "two rows of 512 tokens"
    assert lines(256, 20) == 0 and lines(256, 8192, cuda_graphs=False) == 0
    assert lines(256, 8192, tp=2, dp_attention=2) == 0


def test_the_log_says_what_capturing_took_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "engine.worker")
    free = iter([900 * MIB, 600 * MIB])
    monkeypatch.setattr(start, "available_memory", lambda device: next(free))
    runner: Any = SimpleNamespace(device=torch.device("cuda"), grammars=None, capture=lambda *_: True)
    start.warm_up(runner, resolve({"model": "m"}, {}), pages=1, step_tokens=1, dtype=torch.float32, attention="torch")
    assert "capturing took 300 MiB of memory, and 600 MiB are left" in caplog.messages


def test_what_steps_take_is_the_largest_one_and_media(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "peak_bytes", lambda *_: 3 * MIB)
    monkeypatch.setattr(start, "encoder_bytes", lambda *_: 5 * MIB)
    model: Any = None
    for device, taken, timed in (("cuda", 8 * MIB, ["largest step"]), ("cpu", 0, [])):
        phases: dict[str, float] = {}
        assert activation_bytes(model, torch.device(device), Sizes(4, 64), Sight(), 64, phases) == taken
        assert list(phases) == timed


def test_pages_leave_room_for_what_steps_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of half of the memory: 100 MiB of pages fewer where steps take 200 MiB."""
    (tmp_path / "config.json").write_text(json.dumps(TERMS))
    monkeypatch.setattr(memory, "available_memory", lambda device: 512 * MIB)
    pages = []
    for taken in (0, 200 * MIB):
        monkeypatch.setattr(start, "activation_bytes", lambda *_, taken=taken: taken)
        options = {"model": str(tmp_path), "load": "dummy", "device": "cpu", "memory_fraction": 0.5, "page_size": 64}
        runner, ready = start.start(Boot(resolve(options, {})), 0.0)
        pages.append(ready.pages)
    assert (pages[0] - pages[1]) * runner.model.kv_spec().page_bytes == 100 * MIB


BLIND = """
from engine.plugin import hookimpl

API = 1

@hookimpl
def register_media(register):
    register("eyes", "eyes:Eyes", architectures=("LlamaForCausalLM",))
"""


def test_a_processor_of_a_model_that_sees_nothing_is_refused(tmp_path: Path) -> None:
    """Where it is named, so that a model of its architecture may still read text alone beside a built-in one."""
    (tmp_path / "config.json").write_text(json.dumps(TERMS))
    (tmp_path / "eyes.py").write_text(BLIND)
    options = {"model": str(tmp_path), "load": "dummy", "device": "cpu", "threads": 1, "kv_tokens": 64}
    start.start(Boot(resolve(options, {})), 0.0)
    with pytest.raises(PluginError) as caught:
        start.start(Boot(resolve({**options, "plugins": [f"{tmp_path}/eyes.py"]}, {})), 0.0)
    told = str(caught.value)
    assert told.startswith(
        f"'eyes' of {tmp_path}/eyes.py prepares media for LlamaForCausalLM, and the model 'llama' of "
    )
    assert told.endswith("does not take them; give the model encode and sees = True, or leave 'eyes' out")
