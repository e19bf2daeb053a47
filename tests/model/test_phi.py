"""Phi-3 against Hugging Face transformers on seeded tiny configurations, in float32."""

import pytest
import torch
from oracle import described, tiny, tiny_model
from test_fp8 import BLOCKS, FORMS, quantized, through_fp8

from engine.errors import ConfigError
from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine_plugins.models.phi import Phi3
from engine_plugins.quantization import fp8
from engine_plugins.quantization.fp8 import Fp8

LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "long_factor": [1.5, 2.0, 4.0, 6.0],
    "short_factor": [1.0, 1.25, 1.5, 3.0],
}
CASES = {
    "plain": {},
    "window": {"sliding_window": 5},
    "part of each head rotates": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "beyond the trained length": {"original_max_position_embeddings": 16, "rope_parameters": LONG},
    "within the trained length": {"original_max_position_embeddings": 64, "rope_parameters": LONG},
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    # the oracle takes the long factors for a batch that is long; we, for a model that may become so
    return tiny("Phi3", pad_to=40, **CASES[request.param])


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_phi_is_transformers(case, scenario):
    config, tensors, reference = case
    check_model(Phi3, config, tensors, reference, scenario)


def test_published_configurations_say_it_the_older_way():
    config, tensors, reference = tiny("Phi3", pad_to=40, **CASES["beyond the trained length"])
    config.pop("rope_parameters")
    scaling = {"type": "longrope", "long_factor": LONG["long_factor"], "short_factor": LONG["short_factor"]}
    config |= {"rope_theta": 500.0, "rope_scaling": scaling}
    check_model(Phi3, config, tensors, reference, "whole")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.qkv_proj.weight", "model.layers.2.mlp.gate_up_proj.weight"])
def test_a_fused_weight_of_another_shape_is_named(name):
    config, tensors, _ = tiny("Phi3")
    tensors[name] = torch.zeros(7, 48)
    with pytest.raises(ConfigError, match=rf"{name} has shape \(7"):
        ModelHarness(Phi3, config, tensors)


def test_a_fused_weight_that_is_missing_is_named_by_its_parts():
    config, tensors, _ = tiny("Phi3")
    del tensors["model.layers.1.self_attn.qkv_proj.weight"]
    with pytest.raises(ConfigError, match=r"3 missing \(model.layers.1.self_attn.q_proj.weight"):
        ModelHarness(Phi3, config, tensors)


@pytest.mark.parametrize("form", ["deepseek", "one a tensor", "compressed-tensors, channels"])
def test_fused_weights_in_fp8_are_what_they_stand_for(form, monkeypatch):
    monkeypatch.setattr(fp8, "dense_instead", lambda build: False)
    sizes = {"hidden_size": 144, "intermediate_size": 256, "head_dim": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    way, end, terms = FORMS[form]
    config, tensors, reference = described(through_fp8(tiny_model("Phi3", **sizes), way))
    check_model(Phi3, config, quantized(tensors, way, end), reference, "whole", quantization=Fp8(terms))


def test_a_fused_module_that_is_left_is_named_as_the_checkpoint_has_it():
    config, tensors, reference = tiny("Phi3")
    scheme = Fp8(BLOCKS | {"modules_to_not_convert": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]})
    check_model(Phi3, config, tensors, reference, "whole", quantization=scheme)
