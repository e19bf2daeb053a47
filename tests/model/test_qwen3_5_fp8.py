"""Qwen3.5 and Qwen3-Next in FP8, as published checkpoints have it: scales of projections that stack what layers hold
apart, and modules that are left as they are.

The oracles are transformers' models whose matrices have been through FP8 and back.
"""

import re

import pytest
import torch
from oracle import described, tiny_model
from seeing import TURNING, Seen, gemma3, llava_onevision, qwen2_5_vl, qwen3_5, qwen3_vl
from test_fp8 import BLOCKS, PLAIN, TENSORS, groups, matrices, quantized, through_fp8
from test_vision_qwen import ONE, PROCESSORS, assert_near, prompt, their_logits

from engine.errors import ConfigError
from engine.kernels.fp8.reference import E4M3
from engine.layers.build import Build, Scheme
from engine.parallel.mesh import Mesh
from engine.plugin import Terms
from engine.plugin.testing import ModelHarness, check_model
from engine_plugins.attention.torch.mha import TorchAttention
from engine_plugins.media.gemma3 import Gemma3
from engine_plugins.media.llava_onevision import LlavaOnevision as Llava
from engine_plugins.media.qwen2_5_vl import Qwen25VL as Qwen25
from engine_plugins.media.qwen3_vl import Qwen3VL
from engine_plugins.models.gemma3_vl import Gemma3VL
from engine_plugins.models.llava_onevision import LlavaOnevision
from engine_plugins.models.qwen2_5_vl import Qwen25VL
from engine_plugins.models.qwen3_5 import Qwen35, Qwen35VL
from engine_plugins.models.qwen3_vl import Qwen3VL as Qwen3
from engine_plugins.quantization import fp8
from engine_plugins.quantization.fp8 import Fp8

CONV = rf"{PLAIN}|conv1d"  # what is no matrix, beside what is never quantized
PUBLISHED = rf"{CONV}|in_proj_(a|b|ba)\.|shared_expert_gate"  # as Qwen's checkpoints leave them
# A layer of each kind. Heads have whole blocks of 128 numbers, as published; no other size is a multiple of 128.
DELTA = {
    **{"hidden_size": 144, "intermediate_size": 200, "num_hidden_layers": 2, "full_attention_interval": 2},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "head_dim": 128},
    **{"num_attention_heads": 3, "num_key_value_heads": 1, "linear_value_head_dim": 128},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 72}
EXPERTS |= {"shared_expert_intermediate_size": 136, "norm_topk_prob": True}
FAMILIES = {"Qwen3_5": DELTA, "Qwen3_5Moe": DELTA | EXPERTS, "Qwen3Next": DELTA | EXPERTS}


def leaving(terms, tensors, plain):
    """`terms` that name each module of a checkpoint with `tensors` that is not quantized, as Qwen's do."""
    kept = [name.removesuffix(".weight") for name in tensors if re.search(plain, name) and name.endswith(".weight")]
    return {**terms, "ignore" if terms["quant_method"] == "compressed-tensors" else "modules_to_not_convert": kept}


def checkpoint(family, way="blocks", end="weight_scale_inv", terms=BLOCKS, plain=PUBLISHED):
    """(config.json's terms, weights as they are stored, quantization, the oracle)."""
    config, tensors, reference = described(through_fp8(tiny_model(family, **FAMILIES[family]), way, plain))
    stored = quantized(tensors, way, end, plain)
    return config, stored, Fp8(leaving(terms, tensors, plain)), reference


@pytest.fixture
def kept(monkeypatch):
    """The numbers stay FP8, as on a GPU, and every product is made of them and their scales."""
    monkeypatch.setattr(fp8, "dense_instead", lambda build: False)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_checkpoints_are_what_they_stand_for(family, kept):
    config, stored, scheme, reference = checkpoint(family)
    check_model(Qwen35, config, stored, reference, "batched", tolerance=3e-4, quantization=scheme)
    harness = ModelHarness(Qwen35, config, stored, quantization=scheme)
    weights = {name: weight.dtype for name, weight in harness.runner.model.named_parameters()}
    delta, attention = "model.layers.0.linear_attn", "model.layers.1.self_attn"
    projections = [f"{delta}.in_proj", f"{delta}.out_proj", f"{attention}.qkv_proj", f"{attention}.gates"]
    assert {weights[f"{path}.weight"] for path in projections} == {E4M3}
    assert {weights[f"{delta}.{left}.weight"] for left in ("gates_proj", "conv1d")} == {torch.float32}
    if family != "Qwen3_5":
        assert (
            weights["model.layers.0.mlp.experts.down"] == weights["model.layers.1.mlp.shared_expert.down_proj.weight"]
        )
        assert weights["model.layers.1.mlp.shared_expert_gate.weight"] == torch.float32


FORMS = {
    "blocks, all of them": ("blocks", "weight_scale_inv", BLOCKS, CONV),
    "channels, all of them": ("rows", "weight_scale", groups("channel"), CONV),
    "channels, no delta nets": ("rows", "weight_scale", groups("channel"), rf"{CONV}|linear_attn"),
    "channels, no queries and gates": ("rows", "weight_scale", groups("channel"), rf"{CONV}|[qkv]_proj\."),
    "one a tensor": ("tensors", "weight_scale", TENSORS, PUBLISHED),
}


@pytest.mark.parametrize("family", ["Qwen3_5", "Qwen3Next"])
@pytest.mark.parametrize("form", FORMS)
def test_other_checkpoints_are_what_they_stand_for(family, form, kept):
    """Each names the modules that it leaves as it has them, which the layers hold by other names."""
    way, end, terms, plain = FORMS[form]
    config, stored, scheme, reference = checkpoint(family, way, end, terms, plain)
    if terms is TENSORS:  # scales of activations, which are not needed
        names = matrices(stored, plain)
        stored |= {name.replace("weight", "input_scale"): torch.tensor(0.1) for name in names}
    check_model(Qwen35, config, stored, reference, "whole", tolerance=3e-4, quantization=scheme)


@pytest.mark.parametrize("family", ["Qwen3_5Moe", "Qwen3Next"])
def test_quantized_as_they_are_loaded_gates_stay_as_they_are(family, kept):
    config, tensors, _ = described(tiny_model(family, **FAMILIES[family]))
    _, _, _, reference = checkpoint(family)
    check_model(Qwen35, config, tensors, reference, "whole", tolerance=3e-4, quantization=Fp8(None))


@pytest.mark.parametrize("left", [True, False])
@torch.inference_mode()
def test_towers_are_quantized_as_the_checkpoint_says(left, kept):
    plain = rf"{PUBLISHED}|pos_embed" + ("|visual" if left else "")
    sizes = DELTA | {"hidden_size": 48, "rope_parameters": {**TURNING, "partial_rotary_factor": 1 / 16}}
    theirs = through_fp8(qwen3_5(**sizes), "blocks", plain)

    def stored(tensors):
        return quantized(tensors, "blocks", "weight_scale_inv", plain), Fp8(leaving(BLOCKS, tensors, plain))

    seen = Seen(theirs, Qwen35VL, Qwen3VL, stored=stored, **PROCESSORS)
    weights = {name: weight.dtype for name, weight in seen.model.named_parameters()}
    assert weights["model.layers.0.linear_attn.in_proj.weight"] == E4M3
    assert weights["visual.blocks.1.attn.qkv.weight"] == (torch.float32 if left else E4M3)
    family = type("Family", (), {"theirs": theirs, "seen": seen, "name": "3"})
    asked = prompt(family, ONE)
    (placed,) = seen.admit([asked])
    assert_near(seen.cut(placed), their_logits(family, placed.ids, asked[1]))


TOWERS = {
    "qwen2.5": (qwen2_5_vl, Qwen25VL, Qwen25, {}),
    "qwen3": (qwen3_vl, Qwen3, Qwen3VL, PROCESSORS),
    "gemma3": (gemma3, Gemma3VL, Gemma3, {}),
    "llava": (llava_onevision, LlavaOnevision, Llava, {}),
}


@pytest.mark.parametrize("family", TOWERS)
def test_of_a_checkpoint_that_is_not_quantized_the_decoder_is_and_what_encodes_pictures_is_not(family):
    make, ours, processor, described = TOWERS[family]
    theirs = make()
    plain, made = (
        Seen(theirs, ours, processor, stored=lambda tensors, scheme=scheme: (tensors, scheme), **described).model
        for scheme in (None, Fp8(None))
    )
    weights, its = plain.state_dict(), made.state_dict()
    changed = {name for name, weight in weights.items() if not torch.equal(weight, its[name])}
    projections = {name for name in weights if re.match(r"model\.layers\..*(?:proj|qkv)\.weight", name)}
    assert changed == projections and projections
    assert any(name.startswith(("visual.", "vision_tower.")) for name in weights.keys() - changed)


# ── what is refused ──────────────────────────────────────────────────────────────────────────


def build(**terms):
    usual = {"dtype": torch.float32, "device": torch.device("cpu"), "page_size": 4, "max_model_len": 64}
    return Build(**usual, attention_backend=TorchAttention, **terms)


def test_a_block_that_heads_share_is_refused():
    """Of heads of 96 numbers the keys begin within a block of the queries. A matrix of one block has one scale."""
    model = tiny_model("Qwen3_5", **DELTA | {"linear_key_head_dim": 96})
    config, tensors, _ = described(model)
    with pytest.raises(
        ConfigError,
        match=r"in_proj_qkv.weight_scale_inv has one scale for each 128 rows, and rows 0 to "
        r"127 of in_proj_k, .* lie in the blocks 1 to 2; take",
    ):
        ModelHarness(
            Qwen35, config, quantized(tensors, "blocks", "weight_scale_inv", PUBLISHED), quantization=Fp8(BLOCKS)
        )


def test_scales_of_other_rows_are_refused():
    config, stored, scheme, _ = checkpoint("Qwen3Next")
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight_scale_inv"
    with pytest.raises(ConfigError, match=rf"{name} has shape \(11, 2\) in the checkpoint, .* calls for \(12, 2\)"):
        ModelHarness(Qwen35, config, stored | {name: stored[name][:-1]}, quantization=scheme)


def test_a_cut_between_ranks_within_a_block_is_refused():
    config = described(tiny_model("Qwen3_5", **DELTA | {"linear_key_head_dim": 192, "num_attention_heads": 2}))[0]
    model = Qwen35(Terms(config), build(quantization=Fp8(BLOCKS), mesh=Mesh(0, tp=2)))
    with pytest.raises(ConfigError, match="an FP8 matrix of 384 rows or columns divides into parts of 192, which cut"):
        model.name_layers()


def test_a_quantization_that_does_not_divide_says_so():
    parts = {"in_proj_q": [(0, 4)], "in_proj_k": [(4, 4)]}
    with pytest.raises(
        ConfigError, match=r"a.in_proj_qk.qweight .* stacks in_proj_q, in_proj_k, .* Fp8 does not divide"
    ):
        Scheme.divided(Fp8(BLOCKS), "a.in_proj_qk.qweight", torch.ones(8, 1), parts)
