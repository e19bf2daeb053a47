"""Gemma 3 against Hugging Face transformers on seeded tiny configurations, in float32 and bfloat16."""

import pytest
import torch
from oracle import tiny, tiny_model

from engine.errors import ConfigError
from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine_plugins.models.gemma import Gemma3

GEMMA = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 6}
SEVEN = {**GEMMA, "num_hidden_layers": 7, "query_pre_attn_scalar": 16}
ROPES = {"full_attention": {"rope_theta": 5000.0}, "sliding_attention": {"rope_theta": 300.0}}
CASES = {
    "seven layers, the sixth full": SEVEN,
    "own scale and ropes": {**SEVEN, "query_pre_attn_scalar": 40, "rope_parameters": ROPES},
    "windows only": {**GEMMA, "num_hidden_layers": 2},
    "no windows": {**GEMMA, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "a stretched global rope, a cap, a head of its own": {
        **SEVEN,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return tiny("Gemma3", **CASES[request.param])


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_gemma_is_transformers(case, scenario):
    config, tensors, reference = case
    check_model(Gemma3, config, tensors, reference, scenario)


def test_published_configurations_say_it_the_older_way():
    config, tensors, reference = tiny("Gemma3", **{**SEVEN, "rope_parameters": ROPES, "hidden_size": 40})
    for key in ("layer_types", "rope_parameters", "tie_word_embeddings", "final_logit_softcapping"):
        config.pop(key)
    config |= {"sliding_window_pattern": 6, "rope_theta": 5000.0, "rope_local_base_freq": 300.0, "rope_scaling": None}
    check_model(Gemma3, config, tensors, reference, "whole")


def test_bfloat16_rounds_as_transformers_does():
    """The embedding's scale is rounded, the norms' 1 + weight is not."""
    oracle = tiny_model("Gemma3", **SEVEN).bfloat16()
    harness = ModelHarness(Gemma3, oracle.config.to_dict(), oracle.state_dict(), dtype=torch.bfloat16)
    decoder, ids = harness.runner.model.model, torch.arange(96)
    with torch.inference_mode():
        hidden = oracle.model.embed_tokens(ids)
        assert torch.equal(decoder.embed_tokens(ids) * decoder.embedding_scale, hidden)
        assert torch.equal(decoder.norm(hidden), oracle.model.norm(hidden))
        wanted = oracle(torch.tensor([ids[:30].tolist()])).logits[0].float()
    harness.runner.apply(harness.admit([ids[:30].tolist()]))
    (got,) = harness.logits([(0, 0, 30)])
    assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()


@pytest.mark.parametrize("change", [{"attn_logit_softcapping": 50.0}, {"use_bidirectional_attention": True}])
def test_what_would_run_wrongly_is_refused(change):
    config, tensors, _ = tiny("Gemma3", **GEMMA)
    with pytest.raises(ConfigError, match="does not support"):
        ModelHarness(Gemma3, {**config, **change}, tensors)
