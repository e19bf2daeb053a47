"""Each architecture out of a GGUF that the test writes as llama.cpp's converter does, against transformers on the same
weights: names by the gguf package's own table, rows of llama's queries and keys reordered, 1 added to Gemma's norms."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from oracle import tiny_model

from engine.errors import ConfigError
from engine.plugin.registry import Plugins, resolve
from engine.plugin.testing import check_model
from engine.worker.choices import model_for
from engine_plugins.checkpoints.gguf.checkpoint import GGUFCheckpoint

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 700.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 700.0, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 700.0}
LONG |= {"long_factor": [1.0 + i for i in range(6)], "short_factor": [1.0 + i / 8 for i in range(6)]}
GEMMA_ROPES = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
GEMMA = {**SIZES, "head_dim": 32, "num_hidden_layers": 7, "sliding_window": 6, "rope_parameters": GEMMA_ROPES}
CASES = {
    "llama": ("Llama", {**SIZES, "rope_parameters": ROPE}),
    "llama, tied, linear rope": ("Llama", {**SIZES, "tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "llama 3.1": ("Llama", {**SIZES, "head_dim": 32, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {**SIZES, "rope_parameters": ROPE}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 32, "tie_word_embeddings": True, "rope_parameters": ROPE}),
    "gemma3": ("Gemma3", {**GEMMA, "query_pre_attn_scalar": 32}),
    "gemma3, a cap": ("Gemma3", {**GEMMA, "query_pre_attn_scalar": 32, "final_logit_softcapping": 4.0}),
    "phi3": ("Phi3", {**SIZES, "rope_parameters": ROPE}),
    "phi3, window": ("Phi3", {**SIZES, "sliding_window": 5, "rope_parameters": ROPE}),
    "phi3, longrope, part rotates": (
        "Phi3",
        {**SIZES, "original_max_position_embeddings": 16, "rope_parameters": {**LONG, "partial_rotary_factor": 0.75}},
    ),
}
PREFIXES = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma3": "gemma3", "Phi3": "phi3"}


# ── what llama.cpp's converter does ──────────────────────────────────────────────────────────


def side_by_side(weight, heads):
    """Rows i and i + head_dim / 2 of each head side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_terms(writer, family, config):
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family in ("Llama", "Qwen3", "Gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family in ("Gemma3", "Phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if family == "Gemma3" and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    write_rope(writer, family, config)


def write_rope(writer, family, config):
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_freq_base(rope["rope_theta"])
    if family in ("Llama", "Phi3"):
        writer.add_rope_dimension_count(size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        trained = rope["original_max_position_embeddings"]
        stretch = config.max_position_embeddings / trained
        writer.add_rope_scaling_orig_ctx_len(trained)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(trained))))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
    if rope["rope_type"] == "llama3":
        waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32))


def write_gguf(path, family, model, quantized):
    """Writes `model`, and leaves in it what its weights are once `quantized`, (name, array) to (bytes, type), is
    undone."""
    config, prefix = model.config, PREFIXES[family]
    (architecture,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == prefix)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, prefix)
    write_terms(writer, family, config)
    for name, weight in model.named_parameters():  # a tied head is not among them
        array = weight.detach().numpy()
        if family == "Gemma3" and name.endswith("norm.weight"):
            array = array + 1
        stored, kind = (array, Kind.F32) if array.ndim == 1 else quantized(name, array)
        if array.ndim > 1:
            weight.data = torch.from_numpy(gguf.dequantize(stored, kind))
        if family == "Llama" and ".q_proj." in name:
            stored = side_by_side(stored, config.num_attention_heads)
        if family == "Llama" and ".k_proj." in name:
            stored = side_by_side(stored, config.num_key_value_heads)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, np.ascontiguousarray(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path):
    """(model class, config.json's terms, weights) of a GGUF."""
    checkpoint = GGUFCheckpoint.open(str(path))
    config = checkpoint.config()
    entry = model_for(Plugins.load(), config["architectures"])
    return resolve(entry.target), config, dict(checkpoint.tensors())


def oracle(model):
    @torch.inference_mode()
    def reference(ids):  # padded, so that one with factors for long sequences always uses those
        return model(torch.tensor([ids + [0] * (40 - len(ids))])).logits[0, : len(ids)].float()

    return reference


def as_type(kind):
    return lambda name, array: (gguf.quantize(array, kind), kind)


# ── tests ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    family, changes = CASES[request.param]
    model = tiny_model(family, **changes)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, family, model, as_type(Kind.F32))
    return path, model


@pytest.mark.parametrize("scenario", ["whole", "batched", "greedy"])
def test_each_family_is_transformers(case, scenario):
    path, model = case
    check_model(*load(path), oracle(model), scenario)


def test_each_weight_comes_back_as_it_was(case):
    path, model = case
    _, _, tensors = load(path)
    expected = dict(model.named_parameters())
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape, name
        assert torch.allclose(tensor[:], expected[name].detach(), rtol=0, atol=2e-7), name


@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.MXFP4]
)
@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_quantized_models_are_transformers_on_the_dequantized_weights(tmp_path, family, kind):
    model = tiny_model(family, **SIZES, rope_parameters=ROPE)
    write_gguf(tmp_path / "tiny.gguf", family, model, as_type(kind))
    check_model(*load(tmp_path / "tiny.gguf"), oracle(model), "batched")


# bytes of a block of 256 weights, and where the float16 scales are in it
K_BLOCKS = {
    Kind.Q2_K: (84, (80, 82)),
    Kind.Q3_K: (110, (108,)),
    Kind.Q4_K: (144, (0, 2)),
    Kind.Q5_K: (176, (0, 2)),
    Kind.Q6_K: (210, (208,)),
}


def k_blocks(kind, shape, seed):
    """Rows of random blocks with small scales."""
    size, scales = K_BLOCKS[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (shape[0], shape[1] // 256, size), np.uint8)
    for offset in scales:
        values = generator.uniform(1e-4, 4e-4, blocks.shape[:2]).astype(np.float16)
        blocks[..., offset : offset + 2] = values[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3"])
def test_a_mixture_of_k_quants_as_published_files_have_it(tmp_path, family):
    mixture = {"embed": Kind.Q6_K, "v_proj": Kind.Q6_K, "down": Kind.Q3_K, "gate": Kind.Q2_K, "up_proj": Kind.Q5_K}

    def quantized(name, array):
        kind = next((kind for part, kind in mixture.items() if part in name), Kind.Q4_K)
        return k_blocks(kind, array.shape, seed=len(name)), kind

    changes = {**WIDE, "head_dim": 64, "rope_parameters": ROPE}
    if family == "Gemma3":
        changes |= {
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 64,
            "sliding_window": 6,
            "rope_parameters": GEMMA_ROPES,
        }
    model = tiny_model(family, **changes)
    write_gguf(tmp_path / "tiny.gguf", family, model, quantized)
    check_model(*load(tmp_path / "tiny.gguf"), oracle(model), "batched")


READABLE = [kind for kind in Kind if kind in gguf.quants._type_traits or kind in (Kind.F32, Kind.F16)]


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_that_the_gguf_package_reads(tmp_path, kind):
    generator = np.random.default_rng(0)
    shape = gguf.quant_shape_to_byte_shape((33, 512), kind)
    stored = generator.integers(0, 256, shape, np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    write_terms(writer, "Qwen2", tiny_model("Qwen2", **SIZES, rope_parameters=ROPE).config)
    writer.add_tensor("token_embd.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ((name, tensor),) = GGUFCheckpoint.open(str(tmp_path / "tiny.gguf")).tensors()
    with np.errstate(all="ignore"):  # random scales may be infinite
        expected = gguf.dequantize(stored, kind)
        assert name == "model.embed_tokens.weight"
        assert np.array_equal(tensor[:].numpy(), expected, equal_nan=True)
        assert np.array_equal(tensor[5:30, 32:64].numpy(), expected[5:30, 32:64], equal_nan=True)


def test_a_type_that_it_does_not_read_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    write_terms(writer, "Qwen2", tiny_model("Qwen2", **SIZES, rope_parameters=ROPE).config)
    writer.add_tensor("token_embd.weight", np.zeros((4, 292), np.uint8), raw_dtype=Kind.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ((_, tensor),) = GGUFCheckpoint.open(str(tmp_path / "tiny.gguf")).tensors()
    with pytest.raises(ConfigError, match="type Q8_K"):
        tensor[:]


def test_the_largest_gemma_scales_by_the_size_of_its_stream():
    from engine_plugins.checkpoints.gguf.families import gemma_terms

    sizes = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128, "sliding_window_pattern": 6}
    assert gemma_terms({**sizes, "num_hidden_layers": 62, "sliding_window": 1024})["query_pre_attn_scalar"] == 168
    smaller = gemma_terms({**sizes, "num_hidden_layers": 48})
    assert (smaller["query_pre_attn_scalar"], smaller["sliding_window_pattern"]) == (128, 1)
