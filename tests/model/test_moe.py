"""Mixtures of experts against Hugging Face transformers on seeded tiny configurations, in float32."""

import numpy as np
import pytest
import torch
from oracle import tiny

from engine.errors import RequestError
from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine.worker.experts import ExpertWatch
from engine.worker.weights import fill_at_random
from engine_plugins.models.llama import Llama
from engine_plugins.models.mixtral import Mixtral
from engine_plugins.models.qwen3_moe import Qwen3Moe

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
CASES = {
    "qwen3": (Qwen3Moe, "Qwen3Moe", EXPERTS),
    "qwen3, weights that sum to one, some layers": (
        Qwen3Moe,
        "Qwen3Moe",
        {**EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ),
    "qwen3, one expert, dense layers": (
        Qwen3Moe,
        "Qwen3Moe",
        {**EXPERTS, "num_experts_per_tok": 1, "mlp_only_layers": [1]},
    ),
    "mixtral": (Mixtral, "Mixtral", {"num_local_experts": 4}),
    "mixtral, window": (Mixtral, "Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    model, family, changes = CASES[request.param]
    return model, *tiny(family, **changes)


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_mixtures_are_transformers(case, scenario):
    model, config, tensors, reference = case
    check_model(model, config, tensors, reference, scenario)


@pytest.mark.parametrize("name", ["experts.7.down_proj", "experts.5.up_proj", "experts.0.gate_proj", "gate"])
def test_each_expert_and_the_router_matter(name):
    config, tensors, reference = tiny("Qwen3Moe", **EXPERTS)
    name = f"model.layers.1.mlp.{name}.weight"
    tensors[name] = tensors[name] + 0.3 * torch.randn_like(tensors[name])
    with pytest.raises(AssertionError, match="off by"):
        check_model(Qwen3Moe, config, tensors, reference, "whole")


def test_choices_are_counted_while_they_are_asked_for():
    config, tensors, _ = tiny("Qwen3Moe", **EXPERTS, mlp_only_layers=[1])
    harness = ModelHarness(Qwen3Moe, config, tensors)
    model = harness.runner.model
    harness.runner.apply(harness.admit([list(range(20))]))
    watch = ExpertWatch(model)

    def count(action):
        counted = watch.count(action)
        assert counted.layers == (0, 2)
        return counted.counting, np.frombuffer(counted.counts, "<i8").reshape(2, 8)

    harness.logits([(0, 0, 4)])
    assert not count("look")[1].any()
    count("start")
    harness.logits([(0, 4, 6)])
    on, first = count("look")
    assert on and first.sum(axis=1).tolist() == [6 * 3, 6 * 3]
    harness.logits([(0, 10, 5)])
    on, second = count("stop")
    assert not on and second.sum(axis=1).tolist() == [11 * 3, 11 * 3] and (second >= first).all()
    harness.logits([(0, 15, 5)])
    assert (count("look")[1] == second).all()
    assert not count("start")[1].any()


def test_dummy_weights_with_ties_choose_the_same_experts_for_all_tokens():
    config, tensors, _ = tiny("Qwen3Moe", **EXPERTS)
    harness = ModelHarness(Qwen3Moe, config, tensors)
    model, tokens = harness.runner.model, list(range(20))
    chosen = []
    for ties in (False, True):
        fill_at_random(model, ties)
        watch = ExpertWatch(model)
        watch.count("start")
        harness.runner.apply(harness.admit([tokens]))
        harness.logits([(0, 0, len(tokens))])
        counts = np.frombuffer(watch.count("stop").counts, "<i8").reshape(-1, 8)
        chosen.append((counts > 0).sum(axis=1))
    even, tied = chosen
    assert (even > 3).all() and (tied == 3).all()


def test_a_model_without_experts_says_so():
    model = ModelHarness(Llama, *tiny("Llama")[:2]).runner.model
    with pytest.raises(RequestError, match="no experts"):
        ExpertWatch(model).count("start")
