"""DeepSeek against Hugging Face transformers on seeded tiny configurations, in float32; and its two ways to attend
against each other."""

import dataclasses

import pytest
import torch
from oracle import tiny, tiny_model

from engine.errors import ConfigError
from engine.layers import Build
from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine_plugins.attention.torch_latent import TorchLatentAttention
from engine_plugins.models.deepseek import Deepseek, latent_shape, routing

LATENT = {
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "num_key_value_heads": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
V2 = {**LATENT, "q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
LITE = {**LATENT, "q_lora_rank": None, "topk_method": "greedy", "rope_parameters": YARN}
V3 = {**LATENT, "q_lora_rank": 20, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0}
CASES = {
    "v2, groups": ("DeepseekV2", {**V2, "routed_scaling_factor": 4.0}),
    "v2 lite, yarn": ("DeepseekV2", LITE),
    "v3, yarn": ("DeepseekV3", {**V3, "rope_parameters": YARN}),
    "v3, dense, halves turn together": (
        "DeepseekV3",
        {**V3, "first_k_dense_replace": 3, "rope_interleave": False, "q_lora_rank": None},
    ),
}


class Expanding(TorchLatentAttention):
    """Expands every row of more than one token, and the cache by a few tokens at a time."""

    expanded_from = 2
    chunk_bytes = 7 * 4 * 6 * (2 * 8 + 6 + 10)


def made(family, **changes):
    """As `tiny`, with a bias for choosing experts that is not zero."""
    config, tensors, _ = tiny(family, **changes)
    model = tiny_model(family, **changes)
    for name, tensor in model.state_dict().items():
        if name.endswith("correction_bias"):
            tensor.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
            tensors[name] = tensor.clone()

    @torch.inference_mode()
    def reference(ids):
        return model(torch.tensor([ids])).logits[0].float()

    return config, tensors, reference


@pytest.fixture(scope="module", params=CASES)
def case(request):
    family, changes = CASES[request.param]
    return made(family, **changes)


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
@pytest.mark.parametrize("attention", [TorchLatentAttention, Expanding])
def test_deepseek_is_transformers(case, attention, scenario):
    config, tensors, reference = case
    check_model(Deepseek, config, tensors, reference, scenario, attention=attention)
