"""FP8 checkpoints and models quantized as they are loaded, against what their weights stand for.

The oracles are transformers' models whose matrices have been through FP8 and back, so that ours, which reads the FP8
numbers and their scales, must agree with them to 1e-4. On a CPU weights are kept as what they stand for; the products
that a GPU would make are held against their definition in tests/lib/triton_fp8.py.
"""

import json
import re

import pytest
import torch
from oracle import described, tiny, tiny_model
from safetensors.torch import save_file
from transformers.quantizers.quantizers_utils import should_convert_module

from engine.errors import ConfigError, PluginError
from engine.kernels import choose
from engine.kernels.fp8.reference import E4M3, dequantize, quantize_blocks, quantize_rows
from engine.layers import Build, ColumnLinear, Experts
from engine.layers.linear import Linear
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine.worker.backends import quantization
from engine.worker.weights import fill_at_random
from engine_plugins.attention.torch.mha import TorchAttention
from engine_plugins.models.deepseek import Deepseek
from engine_plugins.models.llama import Llama
from engine_plugins.models.mixtral import Mixtral
from engine_plugins.models.qwen3_moe import Qwen3Moe
from engine_plugins.quantization import fp8
from engine_plugins.quantization.fp8 import Fp8

# as DeepSeek-V3 and Qwen's FP8 checkpoints say it
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TENSORS = {"quant_method": "fp8", "activation_scheme": "static"}


def groups(strategy, **more):
    """As llm-compressor says it."""
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


# None of the sizes is a multiple of 128; query, key and value end within blocks.
LLAMA = {"hidden_size": 160, "intermediate_size": 200, "num_attention_heads": 5, "head_dim": 40, "num_hidden_layers": 2}
LLAMA |= {"num_key_value_heads": 5}
MIXTURE = {"hidden_size": 144, "moe_intermediate_size": 72, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}
LATENT = {"hidden_size": 144, "kv_lora_rank": 136, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 6, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 72}
LATENT |= {"n_shared_experts": 2, "first_k_dense_replace": 1}
FAMILIES = {
    "llama": (Llama, "Llama", LLAMA),
    "qwen3_moe": (Qwen3Moe, "Qwen3Moe", MIXTURE),
    "mixtral": (Mixtral, "Mixtral", {"hidden_size": 48, "intermediate_size": 136, "num_local_experts": 4}),
    "deepseek v2 lite": (Deepseek, "DeepseekV2", LATENT | {"q_lora_rank": None}),
    "deepseek v3": (
        Deepseek,
        "DeepseekV3",
        LATENT | {"q_lora_rank": 130, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0},
    ),
}


PLAIN = r"(embed_tokens|lm_head|\.gate)\.weight"


def matrices(tensors, plain=PLAIN):
    """Those that FP8 checkpoints quantize: all but what is `plain`."""
    return [name for name, tensor in tensors.items() if tensor.dim() == 2 and not re.search(plain, name)]


def quantize_tensor(weight):
    scale = weight.abs().amax() / 448
    return (weight / scale).to(E4M3), scale


WAYS = {"blocks": quantize_blocks, "rows": quantize_rows, "tensors": quantize_tensor}


def through_fp8(model, way, plain=PLAIN):
    """`model` of transformers with its matrices as what FP8 makes of them."""
    for name, parameter in model.named_parameters():
        if re.search(plain, name) or parameter.dim() not in (2, 3):
            continue
        stack = parameter.data if parameter.dim() == 3 else parameter.data[None]
        for matrix in stack:
            for half in matrix.chunk(2) if name.endswith("gate_up_proj") else (matrix,):
                half.copy_(back(*WAYS[way](half)))
    return model


def back(numbers, scale):
    return numbers.float() * scale if scale.dim() == 0 else dequantize(numbers, scale)


def quantized(tensors, way, end, plain=PLAIN):
    """As an FP8 checkpoint has them, with names of scales that end so."""
    found = dict(tensors)
    for name in matrices(tensors, plain):
        numbers, scale = WAYS[way](tensors[name])
        found[name] = numbers
        found[name.removesuffix("weight") + end] = scale[:, None] if way == "rows" else scale
    return found


FORMS = {
    "deepseek": ("blocks", "weight_scale_inv", BLOCKS),
    "one a tensor": ("tensors", "weight_scale", TENSORS),
    "one a tensor, in transformers' words": ("tensors", "weight_scale_inv", TENSORS | {"weight_block_size": None}),
    "compressed-tensors, channels": ("rows", "weight_scale", groups("channel")),
    "compressed-tensors, tensors": ("tensors", "weight_scale", groups("tensor")),
    "compressed-tensors, blocks": ("blocks", "weight_scale", groups("block", block_structure=[128, 128])),
    "fbgemm": ("rows", "weight_scale", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_fp8_checkpoints_are_what_they_stand_for(family, form):
    model, name, changes = FAMILIES[family]
    way, end, terms = FORMS[form]
    config, tensors, reference = described(through_fp8(tiny_model(name, **changes), way))
    stored = quantized(tensors, way, end)
    if terms is TENSORS:  # scales of activations, which are not needed
        stored |= {each.replace("weight", "input_scale"): torch.tensor(0.1) for each in matrices(tensors)}
    check_model(model, config, stored, reference, "whole", quantization=Fp8(terms))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_as_a_gpu_stores_them(family, scenario, monkeypatch):
    """The numbers stay FP8, and every product is made of them and their scales."""
    monkeypatch.setattr(fp8, "dense_instead", lambda build: False)
    model, name, changes = FAMILIES[family]
    config, tensors, reference = described(through_fp8(tiny_model(name, **changes), "blocks"))
    stored = quantized(tensors, "blocks", "weight_scale_inv")
    check_model(model, config, stored, reference, scenario, quantization=Fp8(BLOCKS))


def test_a_directory_in_the_hugging_face_layout(tmp_path, caplog):
    """config.json chooses the plugin; BF16 and FP8 lie side by side in the file."""
    caplog.set_level("INFO")
    config, tensors, reference = described(through_fp8(tiny_model("Qwen3Moe", **MIXTURE), "blocks"))
    described_as = {**config, "quantization_config": BLOCKS, "architectures": ["Qwen3MoeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(described_as))
    save_file(quantized(tensors, "blocks", "weight_scale_inv"), tmp_path / "model.safetensors")
    plugins = Plugins.load()
    checkpoint = open_checkpoint(plugins, str(tmp_path))
    terms = checkpoint.config()
    scheme = quantization(plugins, terms)
    assert isinstance(scheme, Fp8) and "quantization fp8 (the checkpoint's quant_method is fp8)" in caplog.text
    check_model(Qwen3Moe, terms, dict(checkpoint.tensors()), reference, "greedy", quantization=scheme)


# ── quantized as it is loaded ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_other_checkpoints_are_quantized_as_they_are_loaded(family, monkeypatch):
    """What comes of it is what transformers makes of the weights after FP8; nothing but matrices changes, and of those
    DeepSeek's kv_b_proj is kept as what it stands for."""
    monkeypatch.setattr(fp8, "dense_instead", lambda build: False)
    model, name, changes = FAMILIES[family]
    config, tensors, _ = tiny(name, **changes)
    _, _, reference = described(through_fp8(tiny_model(name, **changes), "blocks"))
    check_model(model, config, tensors, reference, "whole", quantization=Fp8(None))
    harness = ModelHarness(model, config, tensors, quantization=Fp8(None))
    for path, parameter in harness.runner.model.named_parameters():
        is_matrix = "embed" not in path and "lm_head" not in path and ".gate." not in path and parameter.dim() > 1
        is_matrix &= "scale" not in path and "kv_b_proj" not in path
        assert (parameter.dtype == E4M3) == is_matrix, path


def test_the_error_of_fp8_weights():
    """It is 2.6 % of one matrix, and comes to an eighth of the spread of an untrained tiny model's logits."""
    matrix = torch.randn(256, 256)
    assert 0.02 < (dequantize(*quantize_blocks(matrix)) - matrix).std() < 0.03
    config, tensors, reference = tiny("Llama", **LLAMA)
    harness = ModelHarness(Llama, config, tensors, quantization=Fp8(None))
    ids = list(range(1, 22))
    harness.runner.apply(harness.admit([ids]))
    (got,) = harness.logits([(0, 0, len(ids))])
    error = (got - reference(ids)).square().mean().sqrt() / reference(ids).std()
    assert 0.05 < error < 0.2


# ── layers ───────────────────────────────────────────────────────────────────────────────────


def build(scheme):
    return Build(
        dtype=torch.float32,
        device=torch.device("cpu"),
        page_size=4,
        max_model_len=64,
        attention_backend=TorchAttention,
        quantization=scheme,
    )


def loaded(layer, tensors, path="mlp.own"):
    layer.named(path)
    for parameter in dict(layer.named_parameters(recurse=False)):
        for name, part in layer.names(path, parameter):
            if name in tensors:
                layer.load(name, parameter, part, tensors[name])
    layer.loaded()
    return layer


@pytest.mark.parametrize("sizes", [(128, 64), (64, 128), (200, 72, 128), (256, 128, 1), (72,)], ids=str)
@pytest.mark.parametrize("way", ["blocks", "rows"])
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_parts_end_where_they_end(sizes, way, bias, monkeypatch):
    monkeypatch.setattr(fp8, "dense_instead", lambda build: False)
    generator = torch.Generator().manual_seed(0)
    parts = {f"p{index}": size for index, size in enumerate(sizes)}
    tensors, dense = {}, []
    for index, (part, size) in enumerate(parts.items()):
        numbers, scale = WAYS[way]((index + 1) * torch.randn(size, 150, generator=generator))
        tensors |= {f"mlp.{part}.weight": numbers, f"mlp.{part}.weight_scale": scale}
        tensors[f"mlp.{part}.bias"] = torch.randn(size, generator=generator)
        dense.append(dequantize(numbers, scale))
    layer = loaded(ColumnLinear(build(Fp8(BLOCKS if way == "blocks" else TENSORS)), 150, parts, bias), tensors)
    assert layer.weight.dtype == E4M3
    inputs = torch.randn(3, 150, generator=generator)
    biases = torch.cat([tensors[f"mlp.{part}.bias"] for part in parts]) if bias else None
    wanted = torch.nn.functional.linear(inputs, torch.cat(dense), biases)
    torch.testing.assert_close(layer(inputs), wanted)
    torch.testing.assert_close(layer.dense_weight(), torch.cat(dense))
    assert layer.dense_weight(torch.bfloat16).dtype == torch.bfloat16


def test_where_there_are_no_fp8_products_weights_are_what_they_stand_for():
    assert not choose(torch.device("cpu"), torch.float32).fp8.pays
    numbers, scale = quantize_blocks(torch.randn(200, 150))
    layer = loaded(
        ColumnLinear(build(Fp8(BLOCKS)), 150, 200), {"mlp.own.weight": numbers, "mlp.own.weight_scale": scale}
    )
    assert [name for name, _ in layer.named_parameters()] == ["weight"] and layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer.weight.data, dequantize(numbers, scale))


def test_what_the_checkpoint_leaves_out_stays_as_it_is():
    terms = BLOCKS | {"modules_to_not_convert": ["lm_head", "model.layers.0.self_attn", "experts"]}
    scheme = Fp8(terms)
    assert not scheme.takes("model.layers.0.self_attn.q_proj") and not scheme.takes("lm_head")
    assert scheme.takes("model.layers.10.self_attn.q_proj") and scheme.takes("model.layers.0.mlp.up_proj")
    assert not Fp8(groups("channel")).takes("model.layers.3.mlp.gate") and Fp8(groups("channel")).takes(
        "a.mlp.gate_proj"
    )
    layer = ColumnLinear(build(scheme), 8, {"q_proj": 4, "k_proj": 4})
    layer.named("model.layers.0.self_attn.qkv_proj")
    assert layer.quantized is None and layer.weight.dtype == torch.float32 and not layer.weight.is_meta


LAYERS = ["model.layers.1.mlp.gate_proj", "model.layers.11.mlp.gate", "model.layers.1.self_attn.q_proj", "lm_head"]
PATTERNS = ["lm_head", "model.layers.1", "layers.1", "gate", "q_proj", "model.layers.*", "model.layers.1.", ".*mlp"]
PATTERNS += [r"model\.layers\.\d+\.mlp\.gate", "self_attn|mlp", "model.layers.(1|2)", "_proj", "visual"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_modules_to_not_convert_are_those_of_transformers(pattern):
    scheme = Fp8(BLOCKS | {"modules_to_not_convert": [pattern]})
    for name in LAYERS:
        assert scheme.takes(name) == should_convert_module(name, [pattern]), name


def test_experts_are_left_by_the_name_of_all():
    scheme = Fp8(BLOCKS | {"modules_to_not_convert": ["mlp.experts"]})
    assert not scheme.takes("model.layers.0.mlp.experts.3.up_proj") and scheme.takes("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("targets", "ignored", "taken"),
    [
        (["Linear"], [], [True, True, True, True]),
        (["Linear"], ["lm_head"], [True, True, True, False]),
        (["re:.*self_attn.*"], [], [False, False, True, False]),
        ([r"re:model\.layers\.1\."], ["re:.*q_proj"], [True, False, False, False]),
        (["model.layers.1.mlp.gate_proj"], [], [True, False, False, False]),
        (["Linear"], ["gate", "layers.1", "mlp"], [True, True, True, True]),  # names are whole
        (["Linear"], [r"re:.*gate$"], [True, False, True, True]),
        (["LlamaMLP"], [], [False, False, False, False]),
    ],
)
def test_targets_and_ignore_are_those_of_compressed_tensors(targets, ignored, taken):
    terms = groups("channel") | {"ignore": ignored}
    terms["config_groups"]["group_0"]["targets"] = targets
    assert [Fp8(terms).takes(name) for name in LAYERS] == taken


def test_a_layer_that_is_no_target_keeps_its_own_weights():
    """Attention alone is FP8 in the checkpoint; the MLPs' weights come through as they are."""
    config, tensors, _ = described(tiny_model("Llama", **LLAMA))
    attention = {name for name in matrices(tensors) if "self_attn" in name}
    stored = dict(tensors)
    for name in attention:
        numbers, scale = quantize_rows(tensors[name])
        stored |= {name: numbers, name.replace("weight", "weight_scale"): scale[:, None]}
    terms = groups("channel")
    terms["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*_proj"]
    harness = ModelHarness(Llama, config, stored, quantization=Fp8(terms))
    weights = dict(harness.runner.model.named_parameters())
    down, out = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(weights[down], tensors[down])
    assert not torch.equal(weights[out], tensors[out])
    assert torch.equal(weights[out], dequantize(*quantize_rows(tensors[out])))


@pytest.mark.parametrize(
    "terms", [BLOCKS | {"modules_to_not_convert": ["*.mlp"]}, groups("channel") | {"ignore": ["re:["]}]
)
def test_names_that_are_no_regular_expressions_are_refused(terms):
    with pytest.raises(ConfigError, match="is no regular expression"):
        Fp8(terms)


def test_one_stacked_layer_is_not_quantized_in_part():
    layer = ColumnLinear(build(Fp8(BLOCKS | {"ignored_layers": ["q_proj"]})), 8, {"q_proj": 4, "k_proj": 4})
    with pytest.raises(ConfigError, match=r"quantizes a.k_proj and not a.q_proj"):
        layer.named("a.qkv_proj")
    experts = Experts(build(Fp8(BLOCKS | {"ignored_layers": ["experts.1.up_proj"]})), 2, 8, 8)
    with pytest.raises(ConfigError, match=r"quantizes 5 of the 6 matrices of a.experts"):
        experts.named("a.experts")


def test_dummy_weights():
    config, _, _ = tiny("Qwen3Moe", **MIXTURE)
    model = Qwen3Moe(config, build(Fp8(None)))
    fill_at_random(model)
    for path, layer in model.named_modules():
        if isinstance(layer, Linear) and "lm_head" not in path:
            assert 0.019 < layer.dense_weight().std() < 0.021
        if isinstance(layer, Experts):
            assert 0.019 < layer.gate_up.std() < 0.021 and 0.018 < layer.down.std() < 0.022


# ── what is refused ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        (BLOCKS | {"fmt": "e5m2"}, "'e5m2'; the fp8 quantization knows e4m3"),
        (BLOCKS | {"weight_block_size": [64, 128]}, r"blocks are \[64, 128\]"),
        (groups("group"), "strategy 'group'"),
        (groups("channel", num_bits=4), "weights of 4 bits"),
        (groups("channel", type="int"), "type 'int'"),
        ({"quant_method": "compressed-tensors"}, "groups of nothing"),
    ],
)
def test_other_kinds_of_fp8_are_refused(terms, said):
    with pytest.raises(ConfigError, match=said):
        Fp8(terms)


def test_numbers_without_a_scale_are_refused():
    numbers, _ = quantize_blocks(torch.randn(8, 8))
    with pytest.raises(ConfigError, match=r"mlp.own.weight is FP8, but the checkpoint has no weight_scale_inv or"):
        loaded(ColumnLinear(build(Fp8(BLOCKS)), 8, 8), {"mlp.own.weight": numbers})


def test_scales_of_another_shape_are_refused():
    numbers, scale = quantize_blocks(torch.randn(200, 8))
    with pytest.raises(ConfigError, match=r"mlp.own.weight_scale has shape \(1, 1\)"):
        tensors = {"mlp.own.weight": numbers, "mlp.own.weight_scale": scale[:1]}
        loaded(ColumnLinear(build(Fp8(BLOCKS)), 8, 200), tensors)


def test_integers_are_refused():
    with pytest.raises(ConfigError, match=r"mlp.own.weight is torch.int8; .* takes float8_e4m3fn"):
        tensors = {"mlp.own.weight": torch.zeros(8, 8, dtype=torch.int8)}
        loaded(ColumnLinear(build(Fp8(BLOCKS)), 8, 8), tensors)


def test_which_quantization_a_checkpoint_gets():
    plugins, named = Plugins.load(), Plugins.load(["fp8"])
    assert quantization(plugins, {}) is None
    assert isinstance(quantization(named, {}), Fp8)
    assert isinstance(quantization(plugins, {"quantization_config": TENSORS}), Fp8)
    with pytest.raises(PluginError, match="quant_method is 'awq', which no quantization reads; known: fp8 reads fp8, "):
        quantization(plugins, {"quantization_config": {"quant_method": "awq"}})
