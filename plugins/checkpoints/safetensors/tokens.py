"""The special tokens of a Hugging Face directory, from the files beside tokenizer.json, read as in transformers.

tokenizer_config.json has named tokens ("bos_token", any "…_token"), tokens without a name, and perhaps
`added_tokens_decoder`. Without the latter, the older special_tokens_map.json and added_tokens.json are read as well.
Tokens that tokenizer.json lacks are added to the tokenizer. Left out: tokens that only a Python class names.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from engine.plugin import ConfigError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, OLD_EXTRA, SPECIFIC = "extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"

Named = dict[str, AddedToken]


def add_special_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Adds the tokens of the files in `folder` that `tokenizer` lacks. Returns the named tokens, as templates know
    them. Raises ConfigError for a file that cannot be read, and for an entry that is not a token."""
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    if OLD_EXTRA in config and not config.get(EXTRA):
        config[EXTRA] = config.pop(OLD_EXTRA)
    specific = {key: config.pop(key) for key in [*config] if _is_specific(key) and isinstance(config[key], str)}
    specific |= config.get(SPECIFIC) or {}
    listed: dict[int, AddedToken] = {}
    try:
        if "added_tokens_decoder" in config:
            listed = {int(id): _token(token) for id, token in (config["added_tokens_decoder"] or {}).items()}
            by_text = {token.content: token for token in listed.values()}
        else:
            path = folder / "special_tokens_map.json"
            _merge(config, read_object(path))
        if isinstance(config.get(EXTRA), dict):
            specific |= config.pop(EXTRA)
        special = {_token(token).content for token in (*map(config.get, NAMES), *(config.get(EXTRA) or ())) if token}
        if EXTRA not in config and OLD_EXTRA in config:
            config[EXTRA] = config.pop(OLD_EXTRA)
        specific |= {key: value for key, value in config.items() if _is_specific(key)}
        named = {key: _token(config[key], special=True) for key in NAMES if config.get(key) is not None}
        named |= {key: _token(value, special=True) for key, value in specific.items() if value is not None}
        extra = [_token(token, special=True) for token in config.get(EXTRA) or ()]
        if "added_tokens_decoder" not in config:
            path = folder / "added_tokens.json"
            listed, there = _older(read_object(path), special), tokenizer.get_added_tokens_decoder()
            by_text = {token.content: token for token in (*listed.values(), *there.values())}
            listed |= there
        named |= {key: by_text.get(token.content, token) for key, token in named.items() if key in NAMES}
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{path} has something else where a token belongs: {error}") from error
    tokenizer.add_tokens(_missing(tokenizer, listed, named, extra))
    return {name: token.content for name, token in named.items()}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one without a file. Raises ConfigError for anything else."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _is_specific(key: str) -> bool:
    """Whether this names a kind of token that transformers does not know, for example one for images."""
    return key.endswith("_token") and key not in NAMES and not key.startswith("add_")


def _token(value: Any, special: bool = False) -> AddedToken:
    """A token as the files have it, a string or an object; `special` says whether a string is special."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    options = {key: option for key, option in value.items() if key != "__type"}
    if "content" not in options:
        raise ValueError(f"{value} has no content")
    return AddedToken(**({"special": True} if special else {}) | options)


def _merge(config: dict[str, Any], older: dict[str, Any]) -> None:
    """special_tokens_map.json over tokenizer_config.json."""
    for key, value in older.items():
        if key == EXTRA and isinstance(value, list):
            known = list(config.get(EXTRA) or ())
            value = known + [token for token in value if token not in known]
        elif isinstance(value, dict) and key != EXTRA:
            value = {**value, "special": True}
        config[key] = value


def _older(tokens: dict[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json by id; those among `special` are special."""
    return {
        int(id): AddedToken(text, normalized=text not in special, special=text in special)
        for text, id in tokens.items()
    }


def _missing(
    tokenizer: Tokenizer, listed: dict[int, AddedToken], named: Named, extra: Iterable[AddedToken]
) -> list[AddedToken]:
    """The tokens to add, in the order of transformers, because the order gives the ids."""
    there = tokenizer.get_added_tokens_decoder().values()
    known = {repr(token) for token in there}
    missing = [token for _, token in sorted(listed.items()) if repr(token) not in known]
    contents = {token.content for token in (*there, *missing)}
    missing += [token for token in (*named.values(), *extra) if token.content not in contents]  # the last one of a text
    names = {token.content for token in named.values()}
    for token in missing:
        if token.content in names:
            token.special = True
    return missing
