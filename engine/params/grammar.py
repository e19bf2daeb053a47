"""What a client may ask a reply to be, as a `Grammar`: one of a few fields, checked as far as text alone can tell.

Whether a grammar compiles is found out where it is compiled. Left out: what only HTTP clients say (http/grammars.py).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from engine.errors import RequestError
from engine.messages.request import Grammar, GrammarKind, SamplingParams

MAX_GRAMMAR = 1 << 19  # characters
MAX_CHOICES = 1024
MAX_NESTING = 200  # JSON that nests deeper cannot be walked everywhere: Python bounds recursion
FIELDS: tuple[GrammarKind, ...] = (
    "json_object",
    "json_schema",
    "regex",
    "ebnf",
    "lark",
    "choice",
    "structural_tag",
)  # of SamplingParams: each is named as its kind
JSON_KINDS = ("json_schema", "choice", "structural_tag")
SAME_NAMES: Mapping[str, str] = MappingProxyType({})


def grammar_of(params: SamplingParams, names: Mapping[str, str] = SAME_NAMES) -> Grammar | None:
    """The grammar that `params` ask for, checked. Raises RequestError.

    `names` maps a field to what the client called it."""
    given = [field for field in FIELDS if getattr(params, field) not in (None, False, ())]
    if not given:
        return None
    shown = [names.get(field, field) for field in given]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(shown)} are given, and a reply can be only one of them", param=shown[1])
    field = given[0]
    value = getattr(params, field)
    if field == "json_object":
        grammar = Grammar(field)
    elif field == "choice":
        grammar = choice(value, shown[0])
    else:
        grammar = Grammar(field, value, strict=params.strict_schema)
    check_grammar(grammar, shown[0])
    return grammar


def choice(texts: object, name: str) -> Grammar:
    """The grammar of a reply that is one of `texts`."""
    if not isinstance(texts, list | tuple) or not 1 <= len(texts) <= MAX_CHOICES:
        raise RequestError(f"{name} must be a list of 1 to {MAX_CHOICES} strings", param=name)
    if not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"{name} must hold strings, none of them empty", param=name)
    for text in texts:
        _check_unicode(text, name)
    return Grammar("choice", msgspec.json.encode(list(texts)).decode())


def check_grammar(grammar: Grammar, name: str) -> None:
    """Raise RequestError when `grammar`, which the client calls `name`, is too long or is no text or no JSON."""
    source = grammar.source
    if not isinstance(source, str):
        raise RequestError(f"{name} is a {type(source).__name__}; send it as text (json.dumps(...))", param=name)
    if len(source) > MAX_GRAMMAR:
        raise RequestError(
            f"{name} has {len(source)} characters, and at most {MAX_GRAMMAR} are taken; send less", param=name
        )
    _check_unicode(source, name)
    if grammar.kind not in JSON_KINDS:
        return
    try:
        value = msgspec.json.decode(source)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"{name} is no JSON: {error}; correct it", param=name) from None
    check_nesting(value, name)
    if grammar.kind == "json_schema" and not isinstance(value, dict | bool):
        raise RequestError(f"{name} is {source[:80]}; a JSON schema is an object, true or false", param=name)
    if grammar.kind == "structural_tag" and not isinstance(value, dict):
        raise RequestError(f"{name} is {source[:80]}; a structural tag is an object", param=name)


def check_nesting(value: Any, name: str) -> None:
    """Raise RequestError when JSON that the client calls `name` nests too deeply."""
    level = [value]
    for _ in range(MAX_NESTING):
        lists = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [inner for each in lists for inner in each]
        if not level:
            return
    raise RequestError(f"{name} nests deeper than {MAX_NESTING} levels; flatten it", param=name)


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{name} holds half of a surrogate pair, {text[error.start]!r}; send whole characters"
        raise RequestError(message, param=name) from None
