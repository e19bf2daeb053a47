"""What context adds to a token's work is computed from the shapes of a model's layers."""

from typing import Any

import pytest
import torch

from engine.layers import Build
from engine.parallel.mesh import Mesh
from engine.plugin import Terms
from engine.plugin.registry import resolve
from engine.worker.work import attention_work
from engine_plugins.attention.torch.mha import TorchAttention
from engine_plugins.attention.torch.mla import TorchLatentAttention

LLAMA_8B = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"num_hidden_layers": 4, "vocab_size": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 1 << 17},
}
MIXTURE = {
    **{"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    **{"num_hidden_layers": 2, "vocab_size": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 1 << 15},
    **{"norm_topk_prob": True, "model_type": "qwen3_moe"},
}
MATRICES_8B = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)  # a layer's
MATRICES_MIXTURE = 2048 * (2 * 4096 + 2 * 512 + 8 * 3 * 768)  # that a token passes
LATENT = {
    **{"model_type": "deepseek_v2", "intermediate_size": 10944, "num_attention_heads": 16, "kv_lora_rank": 512},
    "hidden_size": 2048,
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_lora_rank": None, "n_routed_experts": 64},
    **{"num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_shared_experts": 2, "first_k_dense_replace": 1},
    **{"num_hidden_layers": 1, "vocab_size": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 1 << 15},
}
MATRICES_LATENT = 2048 * (16 * 192 + 576 + 16 * 128 + 3 * 10944) + 512 * 16 * 256
CASES: dict[str, tuple[str, dict[str, Any], Any, float]] = {
    "dense": ("llama:Llama", LLAMA_8B, TorchAttention, 2 * 4096 / MATRICES_8B),
    "experts": ("qwen3_moe:Qwen3Moe", MIXTURE, TorchAttention, 2 * 4096 / MATRICES_MIXTURE),
    "latent": ("deepseek:Deepseek", LATENT, TorchLatentAttention, 16 * 320 / MATRICES_LATENT),
}


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(1, tp=2)], ids=["one rank", "a rank of two"])
@pytest.mark.parametrize("case", CASES)
def test_the_work_of_attention(case: str, mesh: Mesh) -> None:
    model, config, attention, wanted = CASES[case]
    build = Build(
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        page_size=16,
        max_model_len=1024,
        attention_backend=attention,
        mesh=mesh,
        deferred=True,
    )
    built = resolve(f"engine_plugins.models.{model}")(Terms(config), build)
    assert attention_work(built) == pytest.approx(
        wanted, rel=0.02 if case == "latent" else 1e-6
    )  # latents are made by all ranks
