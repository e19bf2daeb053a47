"""How a directory of the sentence-transformers library turns hidden states into vectors, in config.json's terms.

modules.json names the steps; those of an ordinary encoder (run it, pool, normalise) become the term `pooling`. Left
out: prompts to put before a text (config_sentence_transformers.json), which are the client's to send.
"""

from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from engine.plugin import ConfigError

MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


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
    """`mode`, `normalize` and, if it is bounded, `max_seq_length`; None where there is no modules.json.

    Raises ConfigError for a step or a pooling that it does not know, and for what cannot be read."""
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
    if (longest := sentence_options(folder).max_seq_length) is not None:
        terms["max_seq_length"] = longest
    return terms


def sentence_options(folder: Path) -> SentenceOptions:
    """Those of the directory; the defaults where it says none."""
    path = folder / "sentence_bert_config.json"
    return _read(path, SentenceOptions) if path.is_file() else SentenceOptions()


def _mode(path: Path) -> str:
    said = _read(path, dict[str, Any])
    on = [name for name, value in said.items() if name.startswith("pooling_mode") and value is True]
    if len(on) != 1 or on[0] not in MODES:
        raise ConfigError(
            f"{path} pools by {', '.join(on) or 'no mode'}; supported is exactly one of {', '.join(MODES)}"
        )
    return MODES[on[0]]


def _read(path: Path, kind: type[Described]) -> Described:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
