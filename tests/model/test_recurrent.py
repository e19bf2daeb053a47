"""Models that keep states of requests: a toy of gated recurrences and attention, against its definition in float64."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_attention import PlainAttention, captured
from recurrent import CONFIG, KINDS, ToyRecurrent, reference, weights

from engine.layers.build import Build
from engine.parallel.mesh import Mesh
from engine.plugin import StateGroup, Terms
from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine.worker.runner import Runner
from engine.worker.steps import graphs
from engine.worker.steps.graphs import DecodeGraphs, PromptGraphs, Tables, most_prompt_tokens
from engine.worker.steps.rows import Rows
from engine_plugins.attention.torch.mha import TorchAttention

MIXES: dict[str, tuple[str, ...]] = {
    "mixed": KINDS,
    "recurrent alone": ("recurrent", "recurrent"),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_recurrent_models_keep_the_contract_of_models(scenario: str, mix: str) -> None:
    kinds = MIXES[mix]
    config = CONFIG | {"layer_types": list(kinds)}
    check_model(ToyRecurrent, config, weights(kinds), partial(reference, kinds=kinds), scenario)


GUIDE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_the_recurrent_model_of_the_guide(scenario: str) -> None:
    (source,) = re.findall(r"```python\n(from engine\.plugin import StateGroup\n.*?)```", GUIDE, re.DOTALL)
    names: dict[str, type] = {}
    exec(source, names)
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens": (16, 8), "value_proj": (8, 8), "out_proj": (8, 8), "lm_head": (16, 8)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def reference(ids: list[int]) -> torch.Tensor:
        weight = {name: tensors[f"{name}.weight"].double() for name in shapes}
        hidden = weight["embed_tokens"][ids]
        ago = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        averages = (0.1 * 0.9 ** ago.clamp(min=0).double()).tril() @ (hidden @ weight["value_proj"].T)
        return ((hidden + averages @ weight["out_proj"].T) @ weight["lm_head"].T).float()

    check_model(names["Averages"], {"hidden_size": 8, "vocab_size": 16}, tensors, reference, scenario)


class Forgetful(ToyRecurrent):
    """Puts its states where they do not belong: in the lines of other rows."""

    def run(self, hidden: Any, batch: Any, first: int, last: int) -> Any:
        out = super().run(hidden, batch, first, last)
        for group in batch.states.values():
            for layer in group:
                layer.copy_(layer.roll(1, 0))
        return out


@pytest.mark.parametrize("scenario", ["chunked", "batched", "padded", "greedy"])
def test_the_contract_notices_states_in_the_wrong_slot(scenario: str) -> None:
    with pytest.raises(AssertionError):
        check_model(Forgetful, CONFIG, weights(), reference, scenario)


class Hoarder(ToyRecurrent):
    """Takes up states that nobody clears."""

    def run(self, hidden: Any, batch: Any, first: int, last: int) -> Any:
        if not hasattr(self, "kept"):
            self.kept = {name: tuple(layer.clone() for layer in group) for name, group in batch.states.items()}
        object.__setattr__(batch, "states", self.kept)
        return super().run(hidden, batch, first, last)


def test_the_contract_notices_what_the_request_before_left() -> None:
    check_model(Hoarder, CONFIG, weights(), reference, "batched")
    with pytest.raises(AssertionError, match="slot 1, which had another request"):
        check_model(Hoarder, CONFIG, weights(), reference, "reused")


# ── ranks and stages ─────────────────────────────────────────────────────────────────────────


def built(mesh: Mesh) -> ToyRecurrent:
    return ToyRecurrent(
        Terms(CONFIG),
        Build(
            dtype=torch.float32,
            device=torch.device("cpu"),
            page_size=4,
            max_model_len=64,
            attention_backend=TorchAttention,
            mesh=mesh,
            deferred=True,
        ),
    )


def test_a_rank_holds_its_share_of_the_states_and_a_stage_its_own_layers() -> None:
    whole = built(Mesh(0)).kv_spec()
    assert whole.states == (StateGroup("window", 2, (2, 12), "float32"), StateGroup("state", 2, (12,), "float32"))
    assert whole.slot_bytes == 2 * (2 * 12 + 12) * 4
    for rank in range(2):
        half = built(Mesh(rank, tp=2)).kv_spec()
        assert [group.shape for group in half.states] == [(2, 6), (6,)] and half.slot_bytes == whole.slot_bytes // 2
    stages = [built(Mesh(rank, pp=3)).kv_spec() for rank in range(3)]
    assert [[group.layers for group in stage.states] for stage in stages] == [[1, 1], [], [1, 1]]
    assert [len(stage.groups) for stage in stages] == [0, 1, 0]
    assert {stage.page_size for stage in stages} == {4}


# ── captured steps ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=list(MIXES))
def harness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModelHarness:
    """Three prompts, and stand-ins for graphs that compute anew from what a replay put in place."""
    monkeypatch.setattr(graphs, "captured", captured)
    kinds = MIXES[request.param]
    config = CONFIG | {"layer_types": list(kinds)}
    made = ModelHarness(ToyRecurrent, config, weights(kinds), attention=PlainAttention)
    made.kinds = kinds  # type: ignore[attr-defined]
    return made


def tables(runner: Runner) -> Tables:
    """What the runner captures its steps over."""
    return runner.shared_graphs._tables


PROMPTS = [np.random.default_rng(slot).integers(0, CONFIG["vocab_size"], 30).tolist() for slot in range(3)]


@torch.inference_mode()
def test_captured_steps_go_on_from_the_states_and_padding_touches_none(harness: ModelHarness) -> None:
    """Rows in turn, by graphs of prompts and of decode steps with padding, and now and then without a graph."""
    runner, kinds = harness.runner, harness.kinds  # type: ignore[attr-defined]
    prompts, decode = PromptGraphs(tables(runner), 5, (32, 64)), DecodeGraphs(tables(runner))
    assert prompts.capture(64, pool=None) and decode.capture(4, pool=None)
    runner.apply(harness.admit(PROMPTS))
    steps = [[(0, 0, 11)], [(1, 0, 1)], [(0, 11, 1), (2, 0, 20), (1, 1, 6)], [(2, 20, 1), (0, 12, 1), (1, 7, 1)]]
    steps += [[(0, 13, 1)], [(1, 8, 22), (2, 21, 2)], [(2, 23, 1)], [(0, 14, 16), (2, 24, 6)]]
    got: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    idle = {name: [layer[3].clone() for layer in group] for name, group in runner.states.layers.items()}
    for number, step in enumerate(steps):
        rows = Rows.of(np.array([(*row, 1) for row in step]))
        if number == 5:
            hidden = runner.compute(rows)[0]
        else:
            hidden = decode.replay(rows)[0] if decode.fits(rows) else prompts.replay(rows)[0]
        parts = runner.model.logits(hidden).split([length for _, _, length in step])
        for (slot, _, _), part in zip(step, parts, strict=True):
            got[slot].append(part.clone())
    for slot, parts in got.items():
        assert torch.allclose(torch.cat(parts), reference(PROMPTS[slot], kinds), atol=1e-4), f"slot {slot}"
    for name, group in idle.items():
        assert not any(before.any() for before in group)
        assert all(
            torch.equal(layer[3], before) for layer, before in zip(runner.states.layers[name], group, strict=True)
        )
        assert all(layer[4].any() for layer in runner.states.layers[name]), "padding has had a line of its own"


@torch.inference_mode()
def test_a_batch_says_which_rows_begin_and_whose_its_tokens_are(harness: ModelHarness) -> None:
    runner = harness.runner
    runner.apply(harness.admit(PROMPTS))
    _, batch = runner.compute(Rows.of(np.array([(2, 0, 3, 0), (0, 0, 1, 1), (1, 0, 2, 0)])))
    assert batch.begins.tolist() == [True, True, True] and batch.token_rows().tolist() == [0, 0, 0, 1, 2, 2]
    _, batch = runner.compute(Rows.of(np.array([(2, 3, 2, 0), (3, 0, 1, 0), (1, 2, 1, 0)])))
    assert batch.begins.tolist() == [False, True, False] and batch.token_rows().tolist() == [0, 0, 1, 2]
    prompts = PromptGraphs(tables(runner), 5, (8,))
    numbers = np.zeros(2 * 8 + 3 * 5 + 1, np.int64)
    prompts._fill(numbers, 8, Rows.of(np.array([(2, 5, 2, 0), (0, 1, 3, 1)])))
    padded = prompts._batch(torch.from_numpy(numbers), 8, ())
    assert padded.slots[padded.token_rows()].tolist() == [2, 2, 0, 0, 0, 4, 4, 4]
    assert padded.begins.tolist() == [False, False, True, True, True]


def test_a_runner_captures_recurrent_steps_but_no_shared_prefixes(
    harness: ModelHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("engine.worker.runner.LEAST_ROWS", 2)
    runner = harness.runner
    runner.decode_graphs = DecodeGraphs(tables(runner))
    assert runner.capture(harness.each * harness.slots)
    assert (runner.prompt_graphs[0].most, runner.decode_graphs.most) == (256, 4)
    assert runner.prefixes is None and runner.shared_graphs.most == 0
    monkeypatch.setattr(ToyRecurrent, "most_graph_tokens", 0)
    assert most_prompt_tokens(runner.model) == 0
