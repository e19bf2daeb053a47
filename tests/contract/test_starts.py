"""Whatever a checkpoint says, a worker starts or says in a sentence why it cannot: neither a traceback nor a hang.

Hypothesis changes the configurations of tiny checkpoints, one of each family, and the bytes of a GGUF."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import tiny_model
from test_checkpoints import write_gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from engine.config import resolve
from engine.errors import ConfigError, EngineError
from engine.layers import Model
from engine.messages.control import Boot, WorkerReady
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.worker.start import start

EXAMPLES = int(os.environ.get("START_EXAMPLES", "15"))  # of each family
FEW = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {**MOE, "num_experts": 4},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma3": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Phi3": {},
    "DeepseekV3": {
        **MOE,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 6,
        "first_k_dense_replace": 1,
    },
    "Bert": {},
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "factor": 4.0},
    {"type": "dynamic", "factor": 2.0},
]
QUANTIZED = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}

# what no reader expects: other types, edges, and numbers that are too large for memory, loops or integers of a machine
WRONG = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 3, 7, 2**15, 2**24, 2**31, 2**63, 2**70, 0.5, 1.5, 1e300, -0.0]),
    st.sampled_from(["", "64", "silu", "\ud7ff", [], [1], ["a"], [None], {}, {"a": 1}, [[]], {"factor": 2}]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    words = Tokenizer(models.WordLevel({chr(0x100 + i): i for i in range(96)}, unk_token=chr(0x100)))
    for family, changes in FAMILIES.items():
        if family == "Bert":
            sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
            sizes["max_position_embeddings"] = 40
            BertModel(BertConfig(vocab_size=96, num_hidden_layers=2, **sizes)).save_pretrained(root / family)
        else:
            tiny_model(family, **changes).save_pretrained(root / family)
        words.save(str(root / family / "tokenizer.json"))
    return {family: root / family for family in FAMILIES}


def attempt(model: Path) -> WorkerReady | EngineError:
    """What comes of a start: what a worker says when it is ready, or its sentence."""
    options = {"model": str(model), "max_running": 2, "kv_tokens": 64, "device": "cpu", "max_step_tokens": 32}
    try:
        _, ready = start(Boot(resolve(options, {})), 0.0)
    except EngineError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return error
    return ready


def changed(config: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """`config` with up to two of its terms gone or of another value, at the top or within."""
    config = json.loads(json.dumps(config))
    if data.draw(st.booleans()):
        config["rope_parameters"] = {**data.draw(st.sampled_from(ROPES)), "rope_theta": 100.0}
    if data.draw(st.integers(0, 9)) == 0:
        config["quantization_config"] = dict(QUANTIZED)
    for _ in range(data.draw(st.integers(1, 2))):
        within = config
        key = data.draw(st.sampled_from(sorted(within)))
        while isinstance(within[key], dict) and within[key] and data.draw(st.booleans()):
            within = within[key]
            key = data.draw(st.sampled_from(sorted(within)))
        if data.draw(st.integers(0, 4)) == 0:
            del within[key]
        else:
            within[key] = json.loads(json.dumps(data.draw(WRONG)))  # a copy, as the next change may be within
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_any_configuration_starts_or_is_refused_in_a_sentence(folders: dict[str, Path], family: str) -> None:
    path = folders[family] / "config.json"
    original = path.read_text()
    assert isinstance(attempt(folders[family]), WorkerReady)

    @FEW
    @given(st.data())
    def whatever(data: st.DataObject) -> None:
        path.write_text(json.dumps(changed(json.loads(original), data)))
        attempt(folders[family])

    try:
        whatever()
    finally:
        path.write_text(original)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": "48"}, "hidden_size is '48' in the model's configuration; it must be an integer from 1 to"),
        ({"hidden_size": None}, "the model's configuration has no hidden_size"),
        ({"hidden_size": 2**20}, r"weight .* has shape .* in the checkpoint, but its configuration calls for"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648 .* it must be at most 30"),
        ({"num_hidden_layers": 5}, "checkpoint's weights do not fit Llama: 18 missing"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0 .* from 1 to"),
        ({"num_attention_heads": -6}, "num_attention_heads is -6 .* from 1 to"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4 .* a divisor of the 6 num_attention_heads"),
        ({"head_dim": 7}, r"7 dimensions of a head of 7 cannot be rotated"),
        ({"vocab_size": 2**23}, "vocab_size is 8388608 .* no weight has so many rows"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0 .* a number above 0"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings is 1099511627776"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no' .* true or false"),
        ({"hidden_act": 7}, "hidden_act is 7 .* a string"),
        ({"dtype": 16}, "dtype is 16"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\] .* an object"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, r"rope_parameters\.factor is 0 .* above 0"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"no rope_parameters\.factor"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8' .* an object"),
    ],
)
def test_a_term_that_cannot_be_is_named_with_its_value_and_bound(
    folders: dict[str, Path], change: dict[str, Any], says: str
) -> None:
    path = folders["Llama"] / "config.json"
    original = path.read_text()
    path.write_text(json.dumps(json.loads(original) | change))
    try:
        with pytest.raises(ConfigError, match=says):
            raise attempt(folders["Llama"])  # type: ignore[misc]
    finally:
        path.write_text(original)


@pytest.mark.parametrize("change", [{"hidden_size": 2**20}, {"num_hidden_layers": 2}, {"intermediate_size": 81}])
def test_what_does_not_fit_is_found_before_memory_is_taken(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    path = folders["Llama"] / "config.json"
    original = path.read_text()
    path.write_text(json.dumps(json.loads(original) | change))
    taken: list[Model] = []
    monkeypatch.setattr(Model, "allocate", taken.append)
    try:
        assert isinstance(attempt(folders["Llama"]), ConfigError)
    finally:
        path.write_text(original)
    assert taken == []


def test_dummy_weights_of_absurd_sizes_are_refused_before_they_are_made(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders["Llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 2**20, "vocab_size": 2**18}))
    with pytest.raises(ConfigError, match=r"take [\d.]+ TiB, and cpu has .* [GM]iB free"):
        start(Boot(resolve({"model": str(tmp_path), "load": "dummy", "device": "cpu"}, {})), 0.0)


def test_end_tokens_that_the_model_does_not_have_end_nothing(folders: dict[str, Path]) -> None:
    path = folders["Llama"] / "config.json"
    original = path.read_text()
    (folders["Llama"] / "generation_config.json").unlink(missing_ok=True)
    path.write_text(json.dumps(json.loads(original) | {"eos_token_id": [-1, 5, 96, 2**40]}))
    try:
        assert isinstance(attempt(folders["Llama"]), WorkerReady)
    finally:
        path.write_text(original)


@pytest.mark.parametrize("path", ["a" * 5000, "a/" * 3000, "/dev/null/a.gguf", "/proc/self/mem.gguf"], ids=len)
def test_a_path_that_the_system_refuses_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=r"--model|there is no file"):
        open_checkpoint(Plugins.load(), path)


def test_a_server_that_cannot_start_says_one_line_and_fails(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folders["Llama"] / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folders["Llama"] / "model.safetensors").read_bytes()[:-1])
    command = [sys.executable, "-m", "engine.cli", "serve", "--model", str(tmp_path), "--port", "0", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "model.safetensors is cut short" in done.stderr
    _, *said = done.stderr.splitlines()  # behind the line that says what is started
    assert len(said) == 1, done.stderr
    assert done.stdout == ""


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [("h", "e")]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokens), num_hidden_layers=1, bos_token_id=257, eos_token_id=258, **sizes)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", LlamaForCausalLM(config), tokenizer)


def test_any_bytes_in_a_gguf_start_or_are_refused_in_a_sentence(gguf_file: Path, tmp_path: Path) -> None:
    original, path = gguf_file.read_bytes(), tmp_path / "changed.gguf"
    header = len(original) - 4 * 32 * 32 * 5  # and some of the weights

    @settings(FEW, max_examples=4 * EXAMPLES)
    @given(st.data())
    def whatever(data: st.DataObject) -> None:
        content = bytearray(original)
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, header))
            kind = data.draw(st.sampled_from(["<B", "<I", "<Q"]))
            value = data.draw(st.integers(0, 256 ** struct.calcsize(kind) - 1) | st.integers(0, 40))
            struct.pack_into(kind, content, at, value)
        cut = data.draw(st.none() | st.integers(0, len(content)))
        path.write_bytes(content[:cut])
        attempt(path)

    assert isinstance(attempt(gguf_file), WorkerReady)
    whatever()


FIELDS = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
FIELDS += ["attention.head_count_kv", "rope.freq_base", "attention.layer_norm_rms_epsilon"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [0, 2**31, 2**32 - 1])
def test_a_number_in_a_gguf_that_cannot_be_is_named(gguf_file: Path, tmp_path: Path, field: str, value: int) -> None:
    content, name = bytearray(gguf_file.read_bytes()), f"llama.{field}".encode()
    at = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    if "freq" in field or "eps" in field:
        struct.pack_into("<f", content, at, -value)
    else:
        struct.pack_into("<I", content, at, value)
    (tmp_path / "changed.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=name.decode()) as refused:
        raise attempt(tmp_path / "changed.gguf")  # type: ignore[misc]
    assert "changed.gguf" in str(refused.value)


# ── safetensors ──────────────────────────────────────────────────────────────────────────────


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return msgspec.json.decode(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict[str, Any], rest: bytes) -> bytes:
    encoded = msgspec.json.encode(header)
    return len(encoded).to_bytes(8, "little") + encoded + rest


def overlapping(content: bytes) -> bytes:
    header, rest = header_of(content)
    one, other = (name for name in header if name.endswith(("k_proj.weight", "v_proj.weight")) and ".0." in name)
    header[one]["data_offsets"] = header[other]["data_offsets"]
    return with_header(header, rest)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content[:-100], r"is cut short: what it says to hold ends at byte \d+, the file at \d+"),
        (lambda content: content[:200], "is cut short"),
        (lambda content: b"", r"model\.safetensors"),
        (lambda content: b"\xff" * 8 + content[8:], "is cut short"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (lambda content: with_header({}, b""), "do not fit Llama|vocab_size"),
        (overlapping, "is damaged"),
        (lambda content: content + b"tail", "is damaged"),
    ],
)
def test_a_weight_file_that_is_not_whole_is_named(folders: dict[str, Path], damage: Any, says: str) -> None:
    path = folders["Llama"] / "model.safetensors"
    original = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(original))
    try:
        with pytest.raises(ConfigError, match=says):
            raise attempt(folders["Llama"])  # type: ignore[misc]
    finally:
        path.unlink()
        path.write_bytes(original)
