"""Each stage captures or records its own layers: what comes in and goes out stays outside of its graphs.

The stages are runners of this process, joined by queues; a stand-in for a graph computes anew from what the replay put
in place."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from oracle import tiny
from plain_attention import PlainAttention, captured
from rank_replies import prompts
from test_pipeline_ranks import plans
from torch import Tensor

from engine.messages.step import TOKEN, StepPlan, steps_in_flight
from engine.parallel.collectives import Group
from engine.parallel.groups import Groups
from engine.parallel.mesh import Mesh
from engine.plugin.testing import ModelHarness
from engine.testing.steps import step_plan
from engine.worker.steps import graphs
from engine.worker.steps.graphs import DecodeGraphs, PromptGraphs
from engine_plugins.models.llama import Llama


@dataclass
class Wires:
    """What is on its way to each stage."""

    hidden: dict[int, deque[Tensor]] = field(default_factory=dict)
    tokens: dict[int, deque[Tensor]] = field(default_factory=dict)


@dataclass
class Later:
    """What is taken from a wire where it is waited for."""

    take: Callable[[], Tensor]
    like: Tensor

    def wait(self) -> Tensor:
        found = self.take()
        assert (found.shape, found.dtype) == (self.like.shape, self.like.dtype)
        return found


class End:
    """In the place of a Pipeline."""

    def __init__(self, place: int, stages: int, wires: Wires) -> None:
        self.group = Group(tuple(range(stages)), place)
        self.first, self.last = place == 0, place == stages - 1
        self._wires, self._place = wires, place
        wires.hidden[place], wires.tokens[place] = deque(), deque()

    def send_hidden(self, hidden: Tensor) -> None:
        self._wires.hidden[self._place + 1].append(hidden)

    def hidden(self, like: Tensor) -> Later:
        return Later(self._wires.hidden[self._place].popleft, like)

    def send_tokens(self, tokens: Tensor) -> None:
        for place in self.group.ranks[:-1]:
            self._wires.tokens[place].append(tokens)

    def tokens(self, like: Tensor) -> Later:
        return Later(self._wires.tokens[self._place].popleft, like)


def stage(place: int, stages: int, wires: Wires, config: dict[str, Any], tensors: Any) -> ModelHarness:
    groups, end = Groups.apart(Mesh(place, pp=stages)), End(place, stages, wires)
    pipeline: Any = end
    return ModelHarness(Llama, config, tensors, attention=PlainAttention, groups=groups, pipeline=pipeline)


def capture(harness: ModelHarness) -> list[int]:
    """Makes graphs of decode steps and of steps with prompts, and has the runner replay them; how many there are."""
    runner = harness.runner
    tables = runner.shared_graphs._tables
    decode, some = DecodeGraphs(tables), PromptGraphs(tables, 5, (32, 64))
    assert decode.capture(4, pool=None) and some.capture(64, pool=None)
    runner.decode_graphs, runner.prompt_graphs = decode, (some, some)
    return [len(decode._graphs), len(some._graphs)]


def given(harness: ModelHarness, plan: StepPlan, asked: list[list[int]]) -> StepPlan:
    admitted = harness.admit(asked)
    return replace(plan, admits=admitted.admits, pages=admitted.pages) if plan.step == 0 else plan


@pytest.mark.parametrize("captures", [False, True], ids=["as it is", "captured"])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_that_replay_reply_as_one(stages: int, captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "captured", captured)
    config, tensors, _ = tiny("Llama")
    asked = prompts(config["vocab_size"])
    steps = [plan for plan in plans(asked) if plan.step < 13]
    whole = ModelHarness(Llama, config, tensors, attention=PlainAttention)
    wanted = [whole.runner.finish(whole.runner.launch(given(whole, plan, asked))).tokens for plan in steps]
    assert len(set(wanted)) > 6
    wires = Wires()
    pipeline = [stage(place, stages, wires, config, tensors) for place in range(stages)]
    if captures:
        assert all(capture(harness) == [3, 2] for harness in pipeline)
    said: list[bytes] = []
    for plan in steps:
        for harness in pipeline:
            done = harness.runner.finish(harness.runner.launch(given(harness, plan, asked)))
        said.append(done.tokens)
    assert said == wanted
    if captures:
        assert all(harness.runner.decode_graphs._last is not None for harness in pipeline)  # they were replayed
    for harness in pipeline[:-1]:
        assert harness.runner.stage is not None
        harness.runner.stage.settle()
        assert torch.equal(harness.runner.tokens, pipeline[-1].runner.tokens)
        assert torch.equal(harness.runner.lengths, pipeline[-1].runner.lengths)


def test_tokens_that_nobody_reads_are_taken_in_all_the_same() -> None:
    """Steps of prompts with one token to come: each slot is another request's before its token could be read."""
    config, tensors, _ = tiny("Llama")
    wires = Wires()
    first, last = (stage(place, 2, wires, config, tensors) for place in range(2))
    assert first.runner.stage is not None
    for number in range(10):
        plan = replace(first.admit([[number + 1, 2, 3]]), step=number)
        plan = replace(step_plan(number, [(0, 0, 3, TOKEN)]), admits=plan.admits, pages=plan.pages)
        for harness in (first, last):
            harness.runner.finish(harness.runner.launch(plan))
        assert len(wires.tokens[0]) == min(number + 1, steps_in_flight(2))  # the others have been received
    first.runner.stage.settle()
    assert not wires.tokens[0]
    assert first.runner.tokens[0, :4].tolist() == last.runner.tokens[0, :4].tolist()


def test_the_first_stage_is_ahead_by_a_step_of_each_lane() -> None:
    """It launches step k + stages - 1 before the last stage has run step k: nothing it reads comes from there."""
    config, tensors, _ = tiny("Llama")
    asked = prompts(config["vocab_size"])
    lanes = len(asked)
    rows = [
        (lane, len(asked[lane]) + turn - 1, 1, TOKEN) if turn else (lane, 0, len(asked[lane]), TOKEN)
        for turn in range(6)
        for lane in range(lanes)
    ]
    steps = [step_plan(number, [row]) for number, row in enumerate(rows)]
    whole = ModelHarness(Llama, config, tensors, attention=PlainAttention)
    wanted = [whole.runner.finish(whole.runner.launch(given(whole, plan, asked))).tokens for plan in steps]
    wires = Wires()
    pipeline = [stage(place, lanes, wires, config, tensors) for place in range(lanes)]
    said: list[bytes] = []
    for turn in range(len(steps) + lanes - 1):
        for place, harness in enumerate(pipeline):  # all are at work in a turn, and none has what others do in it
            if 0 <= turn - place < len(steps):
                plan = given(harness, steps[turn - place], asked)
                done = harness.runner.finish(harness.runner.launch(plan))
                said += [done.tokens] if place == lanes - 1 else []
    assert said == wanted
