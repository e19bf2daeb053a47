"""How a directory of the sentence-transformers library turns hidden states into vectors, in config.json's terms.

modules.json names the steps; those of an ordinary encoder (run it, pool, normalise) become the term `pooling`. Left
out: prompts before a text (config_sentence_transformers.json), which the client must send.
"""

from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from engine.plugin import LONGEST, ConfigError

MODES = ("mean", "cls")
OLDER = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}  # of sentence-transformers before 5.4


class Module(Struct):
    """One entry of modules.json."""

    path: str
    type: str

    @property
    def kind(self) -> str:
        return self.type.rpartition(".")[2]


class SentenceOptions(Struct):
    """sentence_bert_config.json."""

    max_seq_length: int | None = None
    do_lower_case: bool = False


Described = TypeVar("Described")


def pooling_terms(folder: Path) -> dict[str, Any] | None:
    """`mode`, `normalize` and, if it is bounded, `max_seq_length`; None without a modules.json.

    Raises ConfigError for an unknown step or pooling, and for a file that cannot be read."""
    if not (folder / "modules.json").is_file():
        return None
    modules = {module.kind: module for module in _read(folder / "modules.json", list[Module])}
    if unknown := modules.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ConfigError(f"{folder / 'modules.json'} has steps that are not supported: {', '.join(sorted(unknown))}")
    if "Pooling" not in modules:
        raise ConfigError(f"{folder / 'modules.json'} has no step Pooling; without, there is no vector of a text")
    terms: dict[str, Any] = {
        "mode": _mode(folder / modules["Pooling"].path / "config.json"),
        "normalize": "Normalize" in modules,
    }
    longest = sentence_options(folder).max_seq_length or _longest(folder / "tokenizer_config.json")
    return terms if longest is None else terms | {"max_seq_length": longest}


def _longest(path: Path) -> int | None:
    """The tokenizer's own limit, if it is a real length: many have a number without meaning."""
    said = _read(path, dict[str, Any]).get("model_max_length") if path.is_file() else None
    return said if type(said) is int and 0 < said <= LONGEST else None


def sentence_options(folder: Path) -> SentenceOptions:
    """The options of the directory; defaults for those that it leaves out."""
    path = folder / "sentence_bert_config.json"
    return _read(path, SentenceOptions) if path.is_file() else SentenceOptions()


def _mode(path: Path) -> str:
    said = _read(path, dict[str, Any])
    found = said.get("pooling_mode")
    modes = list(found) if isinstance(found, list) else [] if found is None else [found]
    modes = modes or [OLDER.get(key, key) for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in MODES:
        listed = ", ".join(map(str, modes)) or "no mode"
        raise ConfigError(f"{path} pools by {listed}; supported is exactly one of {', '.join(MODES)}")
    return str(modes[0])


def _read(path: Path, kind: type[Described]) -> Described:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
