"""The llama family against Hugging Face transformers on seeded tiny configurations, in float32."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

from engine.errors import ConfigError
from engine.layers import Build
from engine.plugin.testing import MODEL_SCENARIOS, check_model
from engine_plugins.attention.torch import TorchAttention
from engine_plugins.models.llama import Llama

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "grouped": {},
    "odd heads, tied": {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "no groups, biases": {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
    "own head size": {"head_dim": 20},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama 3 rope": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}},
    "mistral": {"architecture": "mistral", "sliding_window": None},
}


def tiny(name):
    """(config.json's terms, weights, the oracle) of one of CONFIGS."""
    changes = {**TINY, **CONFIGS[name]}
    if changes.pop("architecture", "llama") == "mistral":
        config, kind = transformers.MistralConfig(**changes), transformers.MistralForCausalLM
    else:
        config, kind = transformers.LlamaConfig(**changes), transformers.LlamaForCausalLM
    torch.manual_seed(0)
    oracle = kind(config).eval()
    for parameter in oracle.parameters():  # biases and norms too, and large enough for decided answers
        parameter.data.normal_(mean=0.0 if parameter.ndim > 1 else 0.5, std=0.2)
    tensors = {key: value.detach() for key, value in oracle.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)

    @torch.inference_mode()
    def reference(ids):
        return oracle(torch.tensor([ids])).logits[0].float()

    return config.to_dict(), tensors, reference


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    return tiny(request.param)


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_llama_is_transformers(case, scenario):
    config, tensors, reference = case
    check_model(Llama, config, tensors, reference, scenario)


def test_the_model_check_finds_a_wrong_model():
    config, tensors, reference = tiny("grouped")
    with pytest.raises(AssertionError, match="off by"):
        check_model(Llama, {**config, "rms_norm_eps": 1e-2}, tensors, reference, "whole")


def test_older_names_of_the_rope_options():
    config, tensors, reference = tiny("llama 3 rope")
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
    config, tensors, _ = tiny("odd heads, tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    model = Llama(config, build())
    model.load(tensors.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_missing_and_unknown_weights_are_named():
    config, tensors, _ = tiny("grouped")
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
    config, tensors, _ = tiny("grouped")
    tensors[name] = torch.zeros(7, *tensors[name].shape[1:])
    with pytest.raises(ConfigError, match=rf"{name} has shape \(7"):
        Llama(config, build()).load(tensors.items())


def test_a_sliding_window_is_refused_only_where_it_would_matter():
    config = {**TINY, "sliding_window": 32}
    with pytest.raises(ConfigError, match="--max-model-len 32"):
        Llama(config, build(max_model_len=64))
    Llama(config, build(max_model_len=32))


@pytest.mark.parametrize("change", [{"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"hidden_act": "gelu"}])
def test_what_would_run_wrongly_is_refused(change):
    with pytest.raises(ConfigError, match="not supported"):
        Llama({**TINY, **change}, build())
