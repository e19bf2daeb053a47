"""Qwen2 and Qwen3 against Hugging Face transformers on seeded tiny configurations, in float32."""

import pytest
from oracle import tiny

from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine_plugins.models.qwen import Qwen

WINDOWED = {"use_sliding_window": True, "sliding_window": 5}
CASES = {
    "qwen2": ("Qwen2", {}),
    "qwen2, tied, theta": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2, windows in the last two layers": ("Qwen2", {**WINDOWED, "max_window_layers": 1}),
    "qwen2, windows in all layers": ("Qwen2", {**WINDOWED, "max_window_layers": 0}),
    "qwen2, windows that are switched off": ("Qwen2", {"sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3, one kv head, tied": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3, biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3, windows": ("Qwen3", {"head_dim": 8, **WINDOWED, "max_window_layers": 2}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    family, changes = CASES[request.param]
    return tiny(family, **changes)


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_qwen_is_transformers(case, scenario):
    config, tensors, reference = case
    check_model(Qwen, config, tensors, reference, scenario)


def test_published_configurations_of_qwen2_do_not_list_their_layers():
    config, tensors, reference = tiny("Qwen2", **WINDOWED, max_window_layers=1)
    del config["layer_types"]
    check_model(Qwen, config, tensors, reference, "whole")


def test_one_kv_group_for_each_kind_of_attention():
    config, tensors, _ = tiny("Qwen2", **WINDOWED, max_window_layers=1)
    harness = ModelHarness(Qwen, config, tensors)
    spec = harness.runner.model.kv_spec()
    assert [group.layers for group in spec.groups] == [1, 2]
    config["use_sliding_window"] = False
    (group,) = ModelHarness(Qwen, config, tensors).runner.model.kv_spec().groups
    assert group.layers == 3


def test_the_norms_of_the_heads_matter():
    config, tensors, reference = tiny("Qwen3", head_dim=8)
    tensors["model.layers.1.self_attn.k_norm.weight"] = tensors["model.layers.1.self_attn.k_norm.weight"] * 1.5
    with pytest.raises(AssertionError, match="off by"):
        check_model(Qwen, config, tensors, reference, "whole")
