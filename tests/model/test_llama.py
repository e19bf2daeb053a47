"""The llama family against Hugging Face transformers on seeded tiny configurations, in float32."""

import pytest
import torch
from oracle import TINY, tiny

from engine.errors import ConfigError
from engine.layers import Build
from engine.plugin.testing import MODEL_SCENARIOS, check_model
from engine_plugins.attention.torch.mha import TorchAttention
from engine_plugins.models.llama import Llama

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "grouped": ("Llama", {}),
    "odd heads, tied": (
        "Llama",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "no groups, biases": ("Llama", {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True}),
    "own head size": ("Llama", {"head_dim": 20}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama 3 rope": ("Llama", {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}}),
    "yarn": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 10000.0}}),
    "yarn, its own factor": (
        "Llama",
        {"rope_parameters": {**YARN, "rope_theta": 500.0, "attention_factor": 1.3, "truncate": False}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    family, changes = CASES[request.param]
    return tiny(family, **changes)


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_llama_is_transformers(case, scenario):
    config, tensors, reference = case
    check_model(Llama, config, tensors, reference, scenario)


def test_the_model_check_finds_a_wrong_model():
    config, tensors, reference = tiny("Llama")
    with pytest.raises(AssertionError, match="off by"):
        check_model(Llama, {**config, "rms_norm_eps": 1e-2}, tensors, reference, "whole")


def test_older_names_of_the_rope_options():
    config, tensors, reference = tiny("Llama", **CASES["llama 3 rope"][1])
    config.pop("rope_parameters")
    check_model(Llama, {**config, "rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}, tensors, reference, "whole")


def build(max_model_len=64):
    return Build(
        dtype=torch.float32,
        device=torch.device("cpu"),
        page_size=4,
        max_model_len=max_model_len,
        attention_backend=TorchAttention,
    )


def test_a_tied_head_in_the_checkpoint_and_old_buffers_are_passed_over():
    config, tensors, _ = tiny("Llama", **CASES["odd heads, tied"][1])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    model = Llama(config, build())
    model.load(tensors.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_missing_and_unknown_weights_are_named():
    config, tensors, _ = tiny("Llama")
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop("model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(ConfigError) as error:
        Llama(config, build()).load(tensors.items())
    assert "1 missing (model.layers.1.self_attn.k_proj.weight)" in str(error.value)
    assert "1 unknown (model.layers.7.mlp.up_proj.weight)" in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"],
)
def test_a_weight_of_another_shape_is_named(name):
    config, tensors, _ = tiny("Llama")
    tensors[name] = torch.zeros(7, *tensors[name].shape[1:])
    with pytest.raises(ConfigError, match=rf"{name} has shape \(7"):
        Llama(config, build()).load(tensors.items())


def test_a_window_that_holds_the_longest_sequence_is_none():
    config = {**TINY, "model_type": "mistral", "sliding_window": 32}
    assert [backend.shape.window for backend in Llama(config, build(max_model_len=64)).backends] == [32]
    assert [backend.shape.window for backend in Llama(config, build(max_model_len=32)).backends] == [None]


@pytest.mark.parametrize("change", [{"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"hidden_act": "gelu"}])
def test_what_would_run_wrongly_is_refused(change):
    with pytest.raises(ConfigError, match="not supported"):
        Llama({**TINY, **change}, build())
