"""A model in ranges of its layers is the whole model, and a stage holds, reads and caches its range alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from oracle import TINY, tiny
from test_deepseek import further
from torch import Tensor

from engine.errors import ConfigError
from engine.layers import Batch, Build, Model
from engine.parallel.mesh import Mesh
from engine.plugin import Terms
from engine.plugin.testing import ModelHarness
from engine.worker.memory import allocate
from engine.worker.steps.rows import Rows
from engine_plugins.attention.torch.mha import TorchAttention
from engine_plugins.attention.torch.mla import TorchLatentAttention
from engine_plugins.models.deepseek import Deepseek
from engine_plugins.models.echo import Echo
from engine_plugins.models.gemma import Gemma3
from engine_plugins.models.llama import Llama
from engine_plugins.models.qwen3_moe import Qwen3Moe

LATENT = {
    **{"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "num_key_value_heads": 6},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "q_lora_rank": 20, "n_group": 4, "topk_group": 2},
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
WINDOWS = {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2}
CASES: dict[str, tuple[type[Model], str, dict[str, Any], Any]] = {
    "llama": (Llama, "Llama", {}, TorchAttention),
    "tied": (Llama, "Llama", {"tie_word_embeddings": True}, TorchAttention),
    "mixture": (Qwen3Moe, "Qwen3Moe", EXPERTS, TorchAttention),
    "two kinds of layers": (Gemma3, "Gemma3", {**WINDOWS, "num_hidden_layers": 4}, TorchAttention),
    "latent attention": (Deepseek, "DeepseekV3", LATENT, TorchLatentAttention),
}
ROWS = Rows.of(np.array([[0, 0, 21, 1], [1, 0, 9, 1]]))


def stage(model: type[Model], config: dict[str, Any], tensors: Any, rank: int, pp: int, attention: Any) -> Model:
    built = model(
        Terms(config),
        Build(
            dtype=torch.float32,
            device=torch.device("cpu"),
            page_size=ModelHarness.page_size,
            max_model_len=64,
            attention_backend=attention,
            mesh=Mesh(rank, pp=pp),
            deferred=True,
        ),
    )
    with torch.inference_mode():
        built.load(tensors.items())
    return built


def own(batch: Batch, stage: Model, caches: tuple[tuple[Tensor, ...], ...]) -> Batch:
    """The step as a stage sees it, with caches and plans of its own."""
    mine = dataclasses.replace(batch, caches=caches)
    return dataclasses.replace(mine, plans=stage.prepare(mine))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    model, family, changes, attention = CASES[request.param]
    return model, *tiny(family, **changes)[:2], attention


@pytest.fixture
def whole(case: tuple[Any, ...]) -> ModelHarness:
    model, config, tensors, attention = case
    harness = ModelHarness(model, config, tensors, attention=attention)
    generator = np.random.default_rng(1)
    harness.runner.apply(harness.admit([generator.integers(0, 96, length).tolist() for length in ROWS.lengths]))
    return harness


@torch.inference_mode()
def test_two_ranges_are_the_whole(whole: ModelHarness) -> None:
    model = whole.runner.model
    hidden, batch = whole.runner.compute(ROWS)
    for cut in range(1, len(model.held)):
        between = model.run(model.embed(batch), batch, 0, cut)
        assert between.shape == hidden.shape
        torch.testing.assert_close(model.run(between, batch, cut, len(model.held)), hidden, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_two_stages_are_the_whole(case: tuple[Any, ...], whole: ModelHarness) -> None:
    model, config, tensors, attention = case
    stages = [stage(model, config, tensors, rank, 2, attention) for rank in range(2)]
    assert [*stages[0].held, *stages[1].held] == list(whole.runner.model.held)
    caches = [allocate(each.kv_spec(), whole.each * whole.slots, torch.device("cpu")) for each in stages]
    for rows in ([[0, 0, 15, 1], [1, 0, 4, 1]], [[1, 4, 1, 1], [0, 15, 6, 1]]):
        hidden, batch = whole.runner.compute(Rows.of(np.array(rows)))
        passed = None
        for each, cache in zip(stages, caches, strict=True):
            mine = own(batch, each, cache)
            passed = each.embed(mine) if passed is None else passed
            passed = each.run(passed, mine, each.held.start, each.held.stop)
        wanted = whole.runner.model.logits(hidden)
        torch.testing.assert_close(stages[1].logits(passed), wanted, atol=1e-5, rtol=1e-5)


def test_a_stage_holds_and_caches_its_layers_alone(case: tuple[Any, ...], whole: ModelHarness) -> None:
    model, config, tensors, attention = case
    stages = [stage(model, config, tensors, rank, 2, attention) for rank in range(2)]
    shared = "model.embed_tokens.weight" if config["tie_word_embeddings"] else None  # by both ends
    names = [{name for name, _ in each.named_parameters()} for each in stages]
    assert names[0] & names[1] <= {shared} and len(names[0]) > 3
    assert names[0] | names[1] == {name for name, _ in whole.runner.model.named_parameters()}
    counts = [sum(group.layers for group in each.kv_spec().groups) for each in stages]
    assert counts == [len(each.held) for each in stages] and all(counts)


def test_weights_that_no_stage_has_are_unknown_all_the_same() -> None:
    config, tensors, _ = tiny("Llama")
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConfigError, match=r"1 unknown \(model.layers.7.mlp.up_proj.weight\)"):
        stage(Llama, config, tensors, 0, 2, TorchAttention)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "left out"])
def test_blocks_that_predict_further_tokens_are_the_last_stages_alone(rank: int, stored: bool) -> None:
    config, tensors = tiny("DeepseekV3", **LATENT, num_mtp_layers=0)[:2]
    more = further(tensors, config) if stored else tensors
    own = stage(Deepseek, {**config, "num_nextn_predict_layers": 1}, more, rank, 3, TorchLatentAttention)
    names = {name for name, _ in own.named_parameters()}
    assert own.held == range(rank, rank + 1) and any(name.startswith(f"model.layers.{rank}.") for name in names)
    assert any(name.startswith("model.layers.3.") for name in names) == (stored and rank == 2)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 layers do not reach for 4 stages"):
        stage(Llama, TINY, {}, 0, 4, TorchAttention)


def test_a_model_that_knows_no_stages_is_refused_on_several() -> None:
    with pytest.raises(ConfigError, match=r"Echo runs on one stage, and there are 2"):
        stage(Echo, {}, {}, 0, 2, TorchAttention)
