"""DeepSeek against Hugging Face transformers on seeded tiny configurations, in float32; and its two ways to attend
against each other."""

import dataclasses

import pytest
import torch
from oracle import tiny, tiny_model

from engine.errors import ConfigError
from engine.layers import Build
from engine.plugin import Terms
from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine_plugins.attention.torch.mla import TorchLatentAttention
from engine_plugins.models.deepseek import Deepseek, latent_shape

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

    chunk_bytes = 7 * 4 * 6 * (2 * 8 + 6 + 10)

    def expands(self, starts, lengths):
        return lengths > 1


class Absorbing(TorchLatentAttention):
    """Absorbs every row."""

    def expands(self, starts, lengths):
        return lengths < 1


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
@pytest.mark.parametrize("attention", [Absorbing, Expanding])
def test_deepseek_is_transformers(case, attention, scenario):
    config, tensors, reference = case
    check_model(Deepseek, config, tensors, reference, scenario, attention=attention)


def build(**terms):
    usual = {"dtype": torch.float32, "device": torch.device("cpu"), "page_size": 4, "max_model_len": 64}
    return Build(**{**usual, "attention_backend": TorchLatentAttention, **terms})


def test_absorbed_and_expanded_prompts_agree():
    config, tensors, _ = made("DeepseekV3", **V3)
    logits = []
    for attention in (Absorbing, Expanding):
        harness = ModelHarness(Deepseek, config, tensors, attention=attention)
        harness.runner.apply(harness.admit([list(range(40)), list(range(40, 60))]))
        harness.logits([(0, 0, 17), (1, 0, 20)])
        logits.append(harness.logits([(0, 17, 23)])[0])
    assert not torch.equal(*logits)
    assert (logits[0] - logits[1]).abs().max() < 2e-5


@pytest.mark.parametrize(
    "name",
    [
        *("layers.1.self_attn.kv_a_proj_with_mqa", "layers.1.self_attn.kv_b_proj", "layers.2.self_attn.q_b_proj"),
        *("layers.0.self_attn.q_a_layernorm", "layers.0.self_attn.kv_a_layernorm", "layers.2.mlp.experts.7.up_proj"),
        *("layers.1.mlp.shared_experts.down_proj", "layers.0.mlp.gate_proj", "layers.1.mlp.gate"),
    ],
)
def test_each_weight_matters(name):
    config, tensors, reference = made("DeepseekV3", **V3)
    weight = tensors[f"model.{name}.weight"]
    tensors[f"model.{name}.weight"] = weight + 0.3 * torch.randn_like(weight)
    with pytest.raises(AssertionError, match="off by"):
        check_model(Deepseek, config, tensors, reference, "whole")


def test_the_bias_chooses_experts():
    config, tensors, reference = made("DeepseekV3", **V3)
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.zeros(8)
    with pytest.raises(AssertionError, match="off by"):
        check_model(Deepseek, config, tensors, reference, "whole")


def test_terms_as_published_configurations_have_them():
    """Before transformers 5: rope_scaling with a type, rope_theta beside it, and no word on interleaving."""
    config, tensors, reference = made("DeepseekV2", **LITE)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config |= {"scoring_func": "softmax", "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "ep_size": 1}
    check_model(Deepseek, config, tensors, reference, "whole")


def further(tensors, config):
    """`tensors` with a block that predicts a further token, as V3's checkpoints end with: a copy of the last one."""
    last, count = (f"model.layers.{config['num_hidden_layers'] - more}." for more in (1, 0))
    size = config["hidden_size"]
    copied = {count + name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    vectors = dict.fromkeys(
        (f"{count}{name}.weight" for name in ("enorm", "hnorm", "shared_head.norm")), torch.ones(size)
    )
    shared = {
        f"{count}embed_tokens.weight": tensors["model.embed_tokens.weight"],
        f"{count}shared_head.head.weight": tensors["lm_head.weight"],
    }
    return {**tensors, **copied, **vectors, **shared, f"{count}eh_proj.weight": torch.ones(size, 2 * size)}


def test_blocks_that_predict_further_tokens_are_loaded_and_not_run():
    config, tensors, reference = made("DeepseekV3", **V3)
    config["num_nextn_predict_layers"] = 1
    more = further(tensors, config)
    check_model(Deepseek, config, more, reference, "chunked")
    model = Deepseek(config, build())
    model.load(more.items())
    held = model.model.layers[3]
    assert len(model.model.layers) == 4 and model.kv_spec().groups[0].layers == 3
    assert torch.equal(held.mlp.experts.down[5], more["model.layers.3.mlp.experts.5.down_proj.weight"])
    assert torch.equal(held.eh_proj.weight, torch.ones(48, 96))
    del more["model.layers.3.enorm.weight"]
    with pytest.raises(ConfigError, match=r"1 missing \(model.layers.3.enorm.weight\)"):
        Deepseek(config, build()).load(more.items())


def test_a_checkpoint_without_these_blocks_loads():
    config, tensors, reference = made("DeepseekV3", **V3)
    check_model(Deepseek, {**config, "num_nextn_predict_layers": 1}, tensors, reference, "whole")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"topk_method": "sorted"}, "topk_method 'sorted'.*known are greedy, group_limited_greedy, noaux_tc"),
        ({"scoring_func": "relu"}, "scoring_func 'relu'.*softmax or sigmoid"),
        ({"norm_topk_prob": True}, "norm_topk_prob with topk_method 'group_limited_greedy'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"index_topk": 2048}, "index_topk is 2048"),
    ],
)
def test_what_would_run_wrongly_is_refused(change, said):
    config, _, _ = tiny("DeepseekV2", **V2)
    with pytest.raises(ConfigError, match=said):
        Deepseek({**config, **change}, build())


def test_the_scale_of_scores_grows_with_what_positions_are_stretched_by():
    terms = {"num_hidden_layers": 1, "num_attention_heads": 16, "kv_lora_rank": 512, "v_head_dim": 128}
    terms |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    assert latent_shape(Terms(terms)).scale == 192**-0.5
    rope = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    assert latent_shape(Terms({**terms, "rope_scaling": rope})).scale == pytest.approx(0.11472138679, rel=1e-6)


def test_memory_of_v2_lite_for_a_token():
    shape = dataclasses.replace(latent_shape(Terms({
        "num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512, "v_head_dim": 128,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    })), kv_dtype=torch.bfloat16)  # fmt: skip
    group = TorchLatentAttention(shape, 64, torch.device("cpu"), torch.bfloat16).kv_group()
    assert group.page_bytes == 64 * 27 * (512 + 64) * 2
