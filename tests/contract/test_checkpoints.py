"""Every checkpoint format against one tiny seeded llama: its configuration, text and weights come back the same.

And, format by format, that what is missing or broken is refused by name.
"""

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.conversation.parts import read_messages
from engine.errors import ConfigError
from engine.text.tokenizer import Text
from engine_plugins.checkpoints.gguf.checkpoint import GGUFCheckpoint, GGUFLazyTensor
from engine_plugins.checkpoints.safetensors.checkpoint import SafetensorsCheckpoint

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-6,
}


# ── one model, written in each format ────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges), "<s>", "</s>"]
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return made


@pytest.fixture(scope="module")
def model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), bos_token_id=bos, eos_token_id=eos, tie_word_embeddings=False, **SIZES
    )
    return LlamaForCausalLM(config).float()


def write_safetensors(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + head_dim / 2 of each head side by side, as llama.cpp's converter leaves them."""
    rows, half = [], weight.shape[0] // heads // 2
    for head in range(heads):
        for i in range(half):
            rows += [head * 2 * half + i, head * 2 * half + i + half]
    return weight[rows]


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, **changed: object) -> Path:
    """The model as llama.cpp's converter writes it; `changed` are string fields, dots as two underscores."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(SIZES["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    texts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    texts |= {key.replace("__", "."): value for key, value in changed.items()}
    for key, value in texts.items():
        writer.add_string(key, value)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        for kind, heads in [("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)]:
            if kind in name:
                array = llama_cpp_rows(array, heads)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory, model, tokenizer) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "gguf": write_gguf(folder / "tiny.gguf", model, tokenizer),
        "safetensors": write_safetensors(folder / "tiny", model, tokenizer),
        "sharded": write_safetensors(folder / "tiny-sharded", model, tokenizer, shard="100KB"),
    }


FORMATS = {"gguf": GGUFCheckpoint, "safetensors": SafetensorsCheckpoint, "sharded": SafetensorsCheckpoint}


@pytest.fixture(params=FORMATS)
def checkpoint(request, paths):
    opened = FORMATS[request.param].open(str(paths[request.param]))
    assert opened is not None
    return opened


# ── what every format does ───────────────────────────────────────────────────────────────────


PARTS = [(slice(0, 32), slice(0, 64)), (slice(16, 48), slice(32, 64)), (slice(32, 64), slice(7, 33))]


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("index", PARTS, ids=str)
def test_a_part_of_a_matrix_is_a_part_of_the_whole(checkpoint, name, index):
    tensor = dict(checkpoint.tensors())[name]
    assert torch.equal(tensor[index], tensor[:][index])


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_a_part_of_packed_blocks_is_a_part_of_the_whole(tmp_path, kind):
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    if kind == "BF16":
        save_file({"x.weight": weight.bfloat16()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
        ((_, tensor),) = SafetensorsCheckpoint.open(str(tmp_path)).tensors()
        weights = 32
    else:
        type_ = gguf.GGMLQuantizationType[kind]
        blocks = gguf.quantize(weight.numpy(), type_)
        tensor = GGUFLazyTensor(SimpleNamespace(bytes=blocks, kind=type_, shape=(16, 128)))
        weights = gguf.GGML_QUANT_SIZES[type_][0]
    rows, columns = slice(4, 12), slice(weights, 3 * weights)
    found, blocks = tensor.packed(rows, columns)
    unpacked = gguf.dequantize(blocks, gguf.GGMLQuantizationType[found]).reshape(8, -1)
    assert found == kind and np.array_equal(unpacked, tensor[:].float().numpy()[rows, columns])
    assert tensor.packed(rows, slice(0, weights - 1)) is None and tensor.packed(rows, slice(5, 5 + weights - 1)) is None


def test_config_says_what_the_model_is(checkpoint, model):
    config = checkpoint.config()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is False
    read = LlamaConfig(**config)  # takes the older spelling of the rotary base for the newer
    assert read.rope_parameters["rope_theta"] == SIZES["rope_theta"]
    for key in [*(key for key in SIZES if key != "rope_theta"), "vocab_size", "bos_token_id", "eos_token_id"]:
        assert getattr(read, key) == getattr(model.config, key), key


def test_weights_come_back_under_their_hugging_face_names(checkpoint, model):
    expected = model.state_dict()
    tensors = dict(checkpoint.tensors())
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == tuple(expected[name].shape)
        assert torch.equal(tensor[:], expected[name]), name


@pytest.mark.parametrize("rows", [slice(0, 0), slice(3, 21), slice(16, 32), slice(30, None), slice(None)])
def test_a_slice_is_that_part_of_the_whole(checkpoint, model, rows):
    expected, tensors = model.state_dict(), dict(checkpoint.tensors())
    for name in ["q_proj", "k_proj", "o_proj"]:
        name = f"model.layers.1.self_attn.{name}.weight"
        assert torch.equal(tensors[name][rows], expected[name][rows])
        assert torch.equal(tensors[name][rows, 8:40], expected[name][rows, 8:40])
        assert torch.equal(tensors[name][:, rows], expected[name][:, rows])
    assert torch.equal(tensors["model.norm.weight"][rows], expected["model.norm.weight"][rows])


def test_tensors_may_be_read_after_the_checkpoint_is_gone(checkpoint, model):
    name, tensor = next(iter(checkpoint.tensors()))
    checkpoint.__dict__.clear()
    weight = tensor[:]
    del tensor
    weight += 1  # its own memory, not the file's
    assert torch.equal(weight, model.state_dict()[name] + 1)


def test_text(checkpoint, tokenizer):
    spec = checkpoint.text()
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    assert (spec.eos_ids, spec.bos_id, spec.bos_token, spec.eos_token) == ((eos,), bos, "<s>", "</s>")
    prompt = "hello hello 10é</s>"
    assert spec.tokenizer.encode(prompt).ids == tokenizer.encode(prompt).ids
    text = Text(spec)
    assert text.decode(text.encode(prompt)) == "hello hello 10é"
    assert text.render_chat(read_messages([{"role": "user", "content": "hello"}])) == "<s>[user]hello</s>"


@pytest.mark.parametrize("format", [GGUFCheckpoint, SafetensorsCheckpoint])
def test_what_is_of_another_format_is_left_to_others(format):
    assert format.open("somebody/some-model") is None


def test_formats_leave_each_others_files_alone(paths):
    assert GGUFCheckpoint.open(str(paths["safetensors"])) is None
    assert SafetensorsCheckpoint.open(str(paths["gguf"])) is None


def test_names(paths, tmp_path, model, tokenizer):
    assert GGUFCheckpoint.open(str(paths["gguf"])).name() == "tiny"
    assert SafetensorsCheckpoint.open(f"{paths['safetensors']}/").name() == "tiny"
    snapshot = tmp_path / "models--owner--tiny-model" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert SafetensorsCheckpoint.open(str(snapshot)).name() == "owner/tiny-model"


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────


def test_gguf_first_token_is_added(paths, tokenizer):
    text = Text(GGUFCheckpoint.open(str(paths["gguf"])).text())
    assert text.encode("hello") == [tokenizer.token_to_id("<s>"), tokenizer.token_to_id("hello")]


def test_gguf_templates_with_names(tmp_path, model, tokenizer):
    path = write_gguf(tmp_path / "a.gguf", model, tokenizer, tokenizer__chat_template__tool_use="{{ tools }}")
    text = Text(GGUFCheckpoint.open(str(path)).text())
    assert text.render_chat(read_messages([{"role": "user", "content": "hello"}])) == "<s>[user]hello</s>"
    assert "'name': 'f'" in text.render_chat(read_messages([{"role": "user", "content": "hello"}]), tools=[TOOL])


def test_gguf_quantized_rows(tmp_path):
    """Eight-bit and bfloat16 rows, of a count that no fold divides."""
    weight = np.random.default_rng(0).standard_normal((33, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    stored = {}
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F16):
        stored[kind] = gguf.quantize(weight, kind)
        writer.add_tensor(f"blk.{kind.value}.attn_v.weight", stored[kind], raw_dtype=kind)
    for key in ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]:
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = dict(GGUFCheckpoint.open(str(tmp_path / "model.gguf")).tensors())
    for kind, rows in stored.items():
        read = tensors[f"model.layers.{kind.value}.self_attn.v_proj.weight"]
        assert read.shape == (33, 64)
        assert np.array_equal(read[:].numpy(), gguf.dequantize(rows, kind))
        assert np.abs(read[5:9].numpy() - weight[5:9]).max() < 0.05


@pytest.mark.parametrize(
    ("changed", "read", "says"),
    [
        ({"tokenizer__ggml__pre": "tekken"}, "text", "pre-tokenizer 'tekken'; .* can read: .*llama-bpe, .*smollm"),
        ({"tokenizer__ggml__model": "t5"}, "text", "'t5' vocabulary; .* can read: gpt2 .*, llama"),
        ({"llama__rope__scaling__type": "yarn"}, "config", "'yarn'.*use the model's safetensors"),
        (
            {"llama__attention__key_length": "16"},
            "config",
            "key_length is '16' in .*; it must be an integer",
        ),
    ],
)
def test_gguf_refuses_by_name_what_it_cannot_translate(tmp_path, model, tokenizer, changed, read, says):
    opened = GGUFCheckpoint.open(str(write_gguf(tmp_path / "a.gguf", model, tokenizer, **changed)))
    with pytest.raises(ConfigError, match=says):
        getattr(opened, read)()


def test_gguf_of_an_unknown_architecture_or_tensor(tmp_path):
    for architecture, says in [
        ("mamba", "architecture 'mamba'; .* can read: gemma3, llama"),
        ("llama", "tensor blk.0.ssm_a "),
    ]:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
        writer.add_tensor("blk.0.ssm_a", np.zeros(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ConfigError, match=says):
            GGUFCheckpoint.open(str(tmp_path / "model.gguf")).config()


def test_gguf_that_is_missing_cut_short_or_no_gguf(tmp_path, paths):
    whole = paths["gguf"].read_bytes()
    broken = tmp_path / "broken.gguf"
    with pytest.raises(ConfigError, match="there is no file"):
        GGUFCheckpoint.open(str(broken))
    for content, says in [
        (b"", "no GGUF file: it begins with b''"),
        (b"version https://git-lfs", "it begins with b'vers'"),
        (whole[:4] + struct.pack(">I", 3) + whole[8:], "version 0x3000000"),
        (whole[:2000], "damaged near byte"),
        (whole[:8] + b"\xff" * 16 + whole[24:], "damaged near byte"),
        (whole[:-100], "is cut short: .* ends at byte"),
    ]:
        broken.write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            GGUFCheckpoint.open(str(broken))


# ── safetensors ──────────────────────────────────────────────────────────────────────────────


def test_sharded_files_are_several(paths):
    assert len(list(paths["sharded"].glob("*.safetensors"))) > 2


BESIDE = {
    "consolidated.safetensors": {"layers.0.attention.wq.weight": torch.zeros(4, 4)},
    "adapter_model.safetensors": {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 4)},
    "model.fp16.safetensors": {"model.norm.weight": torch.zeros(4)},
    "model-00001-of-00009.safetensors": {"model.norm.weight": torch.zeros(4)},
    "model.safetensors.index.json": {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}},
}


@pytest.mark.parametrize("beside", [*([name] for name in BESIDE), list(BESIDE)], ids=lambda names: names[-1])
def test_a_whole_weight_file_is_read_alone(tmp_path, model, tokenizer, beside):
    folder = write_safetensors(tmp_path, model, tokenizer)
    for name in beside:
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(BESIDE[name]))
        else:
            save_file(BESIDE[name], folder / name)
    expected = LlamaForCausalLM.from_pretrained(folder).state_dict()  # as transformers has it
    tensors = dict(SafetensorsCheckpoint.open(str(folder)).tensors())
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor[:], expected[name]) for name, tensor in tensors.items())


def test_adapters_and_other_formats_are_not_weights(tmp_path, model, tokenizer):
    folder = write_safetensors(tmp_path, model, tokenizer, shard="100KB")
    (folder / "model.safetensors.index.json").unlink()
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file(BESIDE[name], folder / name)
    assert dict(SafetensorsCheckpoint.open(str(folder)).tensors()).keys() == model.state_dict().keys()
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"has no \.safetensors files"):
        list(SafetensorsCheckpoint.open(str(folder)).tensors())


@pytest.mark.parametrize(
    ("gone", "read", "says"),
    [
        ("tokenizer.json", "text", "has no tokenizer.json; transformers writes it"),
        ("model-00002-of-*.safetensors", "tensors", "has no model-00002-of-.*, which model.safetensors.index.json"),
        ("model*", "tensors", "has no .safetensors files"),
    ],
)
def test_safetensors_names_the_file_that_is_missing(tmp_path, model, tokenizer, gone, read, says):
    folder = write_safetensors(tmp_path, model, tokenizer, shard="100KB")
    for path in folder.glob(gone):
        path.unlink()
    opened = SafetensorsCheckpoint.open(str(folder))
    with pytest.raises(ConfigError, match=says):
        list(getattr(opened, read)())


def test_safetensors_names_the_file_that_is_broken(tmp_path, model, tokenizer):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        SafetensorsCheckpoint.open(str(tmp_path))
    opened = SafetensorsCheckpoint.open(str(write_safetensors(tmp_path, model, tokenizer)))
    for name, read in [("config.json", "config"), ("tokenizer.json", "text"), ("model.safetensors", "tensors")]:
        (tmp_path / name).write_text("{")
        with pytest.raises(ConfigError, match=name):
            list(getattr(opened, read)())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no architectures"):
        opened.config()


def edit(path: Path, **changed: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changed))


@pytest.mark.parametrize(("kind", "size"), [("F4", 16), ("F6_E2M3", 24), ("F8_E4M3", 32)])
def test_safetensors_says_that_numbers_of_under_a_byte_are_not_read(tmp_path, kind, size):
    entry = {"a": {"dtype": kind, "shape": [4, 8], "data_offsets": [0, size]}}
    head = json.dumps(entry).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"8" * size)
    ((name, tensor),) = SafetensorsCheckpoint(tmp_path).tensors()
    assert (name, tensor.shape) == ("a", (4, 8))
    for index, shape in ((slice(None), (4, 8)), (slice(1, 2), (1, 8)), ((slice(None), slice(0, 4)), (4, 4))):
        if kind == "F8_E4M3":
            assert tensor[index].shape == shape and tensor[index].float().unique().tolist() == [1.0]
        else:
            with pytest.raises(ConfigError, match=rf"weight a has the type {kind}, .* use a checkpoint in BF16"):
                tensor[index]


def test_safetensors_text_settings(tmp_path, model, tokenizer):
    folder = write_safetensors(tmp_path, model, tokenizer)
    opened = SafetensorsCheckpoint.open(str(folder))
    bos, eos, hello = (tokenizer.token_to_id(token) for token in ("<s>", "</s>", "hello"))

    edit(folder / "generation_config.json", eos_token_id=[7, 9], temperature=0.6, do_sample=True)
    assert opened.text().eos_ids == (7, 9, eos)
    assert opened.text().generation.items() >= {"temperature": 0.6, "do_sample": True}.items()
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[8])
    assert opened.text().eos_ids == (8, eos)
    assert opened.text().generation == {}

    edit(folder / "tokenizer_config.json", bos_token={"content": "<s>", "lstrip": False}, add_bos_token=True)
    assert (opened.text().bos_token, opened.text().bos_id) == ("<s>", bos)
    assert Text(opened.text()).encode("hello") == [hello]  # the post-processor alone adds it, as in transformers

    (folder / "chat_template.jinja").unlink()
    assert opened.text().chat_template is None
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": "A"}])
    assert opened.text().chat_template == "A"
    (folder / "chat_template.jinja").write_text("B")
    assert opened.text().chat_template == "B"

    copy = Tokenizer.from_str(tokenizer.to_str())  # a post-processor that adds it already, and training's settings
    copy.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    copy.enable_truncation(3)
    copy.enable_padding(length=5)
    copy.save(str(folder / "tokenizer.json"))
    assert Text(opened.text()).encode("hello hello hello hello") == [bos, hello, *[tokenizer.token_to_id("Ġhello")] * 3]
