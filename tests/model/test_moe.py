"""Mixtures of experts against Hugging Face transformers on seeded tiny configurations, in float32."""

import pytest
import torch
from oracle import tiny

from engine.plugin.testing import MODEL_SCENARIOS, check_model
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
