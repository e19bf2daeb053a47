"""A directory in the Hugging Face layout as a checkpoint: config.json, *.safetensors, tokenizer.json.

Weights stay memory-mapped; a slice reads just its bytes. Left out: pickled weights (.bin), tokenizers that exist
only as Python code, and the hub, which is resolved to a directory before this sees it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from engine.plugin import ConfigError, LazyTensor, TextSpec

if TYPE_CHECKING:
    import torch


class SafetensorsCheckpoint:
    """One model directory. `tensors()` yields the types that the files hold."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def open(cls, model: str) -> "SafetensorsCheckpoint | None":
        """Open a directory; None when `model` is none. Raises ConfigError when it has no config.json."""
        path = Path(model).expanduser()
        if not path.is_dir():
            return None
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} has no config.json; --model takes a directory in the Hugging Face layout")
        return cls(path)

    def name(self) -> str:
        """The directory's name; of a hub snapshot (.../models--owner--name/snapshots/...) `owner/name`."""
        path = self._path.resolve()
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        return path.name

    def config(self) -> dict[str, Any]:
        """config.json. Raises ConfigError when it is damaged or names no architecture."""
        config = self._json("config.json")
        if not config.get("architectures"):
            raise ConfigError(f"{self._path / 'config.json'} names no architectures; add the one the model is of")
        return config

    def text(self) -> TextSpec:
        """tokenizer.json, with what tokenizer_config.json and generation_config.json say of it.

        Raises ConfigError when tokenizer.json is missing or damaged."""
        tokenizer, config = self._tokenizer(), self._json("tokenizer_config.json", optional=True)
        bos, eos = (token_text(config.get(key)) for key in ("bos_token", "eos_token"))
        bos_id = tokenizer.token_to_id(bos) if bos else None
        ends = self._json("generation_config.json", optional=True).get("eos_token_id")
        if ends is None:
            ends = self._json("config.json").get("eos_token_id")
        eos_ids = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.token_to_id(eos) if eos else None}
        # what transformers would have added to the post-processor as it loads the tokenizer
        add_bos = bool(config.get("add_bos_token")) and bos_id is not None and tokenizer.encode("").ids[:1] != [bos_id]
        return TextSpec(
            tokenizer=tokenizer,
            eos_ids=tuple(sorted(id for id in eos_ids if id is not None)),
            bos_id=bos_id,
            add_bos=add_bos,
            bos_token=bos,
            eos_token=eos,
            chat_template=self._chat_template(config.get("chat_template")),
        )

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """Every weight, file by file. Raises ConfigError when there are none, or a file is missing or damaged."""
        for path in self._files():
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ConfigError(f"{path} is damaged ({error}); download it again") from error
            for name in file.offset_keys():
                yield name, SafetensorsLazyTensor(file, name)

    def _files(self) -> list[Path]:
        """The weight files: those the index names, else all of them."""
        index = "model.safetensors.index.json"
        if (self._path / index).is_file():
            named = sorted(set(self._json(index).get("weight_map", {}).values()))
            for name in named:
                if not (self._path / name).is_file():
                    raise ConfigError(f"{self._path} has no {name}, which {index} names; download it again")
        else:
            named = sorted(path.name for path in self._path.glob("*.safetensors"))
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
        tokenizer.no_truncation()  # settings of the training run that the file may carry along
        tokenizer.no_padding()
        return tokenizer

    def _chat_template(self, configured: Any) -> str | None:
        """chat_template.jinja, else tokenizer_config.json's: a string, or a list of named ones."""
        path = self._path / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        if isinstance(configured, list):
            return {entry["name"]: entry["template"] for entry in configured}.get("default")
        return configured

    def _json(self, name: str, optional: bool = False) -> dict[str, Any]:
        path = self._path / name
        if optional and not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds a {type(content).__name__}; an object is needed")
        return content


def token_text(token: Any) -> str:
    """A special token of tokenizer_config.json as a string; it may be null, a string or an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token or ""


class SafetensorsLazyTensor:
    """One weight of one file, which stays mapped for as long as any of its tensors is held."""

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._name = name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self._name).get_shape())

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "torch.Tensor":
        return self._file.get_slice(self._name)[index]
