"""What a rank of several replies, of a model in a file. It imports little, because each rank does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from plain_attention import PlainAttention, captured
from torch import Tensor

from engine.messages.step import VECTOR
from engine.parallel.groups import Groups
from engine.plugin.registry import resolve
from engine.testing.models import ModelHarness
from engine.testing.steps import step_plan
from engine.worker.experts import ExpertWatch
from engine.worker.steps import graphs
from engine.worker.steps.graphs import DecodeGraphs, PromptGraphs
from engine.worker.steps.rows import Rows
from engine_plugins.models.bert import Bert

COUNT = 24


def prompts(vocab_size: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab_size, length).tolist() for length in (21, 9, 14)]


def replies(
    groups: Groups | None, model: str, file: Path, slots: tuple[int, ...] | None, captures: bool = False
) -> list[list[int]]:
    """What the model of `file` says to prompts that have `slots`; of several copies, to those of this rank's. If it
    `captures`, no step is computed but by replaying a graph, or of prompts where these have none."""
    config, tensors = torch.load(file, weights_only=False)
    attention = PlainAttention if captures else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "captured", captured)
        harness = ModelHarness(resolve(model), config, tensors, groups=groups, attention=attention)
        if captures:
            replaying(harness)
        said = harness.greedy(prompts(config["vocab_size"]), COUNT, slots=slots)
    return said


def vectors(groups: Groups | None, file: Path, slots: tuple[int, ...] = (0, 1, 2)) -> NDArray[np.float32]:
    """What the encoder of `file` makes of each prompt; of several copies, of those in this rank's."""
    config, tensors = torch.load(file, weights_only=False)
    harness = ModelHarness(Bert, config, tensors, groups=groups)
    asked = prompts(config["vocab_size"])
    plan = harness.admit(asked, slots=slots)
    rows = [(slot, 0, len(ids), VECTOR) for slot, ids in zip(slots, asked, strict=True)]
    done = harness.runner.finish(harness.runner.launch(step_plan(1, rows, plan.admits)))
    return np.frombuffer(done.vectors, "<f4").reshape(-1, config["hidden_size"])


def written(groups: Groups, model: str, file: Path, slots: tuple[int, ...]) -> list[int]:
    """The pages that this rank's cache has something in, after replies to prompts that have `slots`."""
    config, tensors = torch.load(file, weights_only=False)
    harness = ModelHarness(resolve(model), config, tensors, groups=groups)
    harness.greedy(prompts(config["vocab_size"]), 3, slots=slots)
    (cache, *_), *_ = harness.runner.caches
    return cache.flatten(1).any(dim=1).nonzero()[:, 0].tolist()


def again(
    groups: Groups | None, model: str, file: Path, slots: tuple[int, ...]
) -> tuple[list[list[int]], dict[str, list[int]]]:
    """What the model of `file` says to prompts whose `slots` had others before, and for each kind of states the lines
    that hold something then."""
    config, tensors = torch.load(file, weights_only=False)
    harness = ModelHarness(resolve(model), config, tensors, groups=groups)
    asked = prompts(config["vocab_size"])
    harness.greedy(asked, 3, slots=slots)
    said = harness.greedy(asked[::-1], COUNT, slots=slots)
    states = harness.runner.states.layers
    return said, {name: layers[0].flatten(1).any(dim=1).nonzero()[:, 0].tolist() for name, layers in states.items()}


def choices(groups: Groups | None, model: str, file: Path, slots: tuple[int, ...] | None) -> list[int]:
    """How often each expert of each layer is chosen meanwhile, where no step is computed but by replaying a graph."""
    config, tensors = torch.load(file, weights_only=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "captured", captured)
        harness = ModelHarness(resolve(model), config, tensors, groups=groups, attention=PlainAttention)
        replaying(harness)
        watch = ExpertWatch(harness.runner.model)
        watch.count("start")
        harness.greedy(prompts(config["vocab_size"]), COUNT, slots=slots)
    return np.frombuffer(watch.count("look").counts, "<i8").tolist()


def replaying(harness: ModelHarness) -> None:
    """Makes graphs of decode steps and of steps with prompts, and has the runner replay them."""
    runner = harness.runner
    tables = runner.shared_graphs._tables
    decode, some = DecodeGraphs(tables), PromptGraphs(tables, 4, (16, 32, 64))
    assert decode.capture(harness.slots, pool=None)
    runner.decode_graphs = decode
    if prompts_too := graphs.most_prompt_tokens(runner.model) > 0:
        assert some.capture(64, pool=None)
        runner.prompt_graphs = (some, some)
    as_it_is = runner.compute

    def compute(rows: Rows, entering: Tensor | None = None) -> Any:
        if prompts_too or rows.decode:
            raise AssertionError("a step is computed as it is")
        return as_it_is(rows, entering)

    runner.compute = compute  # type: ignore[method-assign]
