"""What HTTP clients ask a reply to be, in all their words: OpenAI's `response_format`, vLLM's `structured_outputs` and
`guided_*`, SGLang's `regex`, `ebnf`, `json_schema` and `structural_tag`, and our own beside them.

All of them become the fields of SamplingParams, of which one at most may be given. Left out: patterns of whitespace.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import msgspec

from engine.errors import RequestError
from engine.http.fields import LABEL, Rule, unserved
from engine.http.wire import Body
from engine.params.grammar import JSON_KINDS, check_nesting

Schema = dict[str, Any] | bool
Field = tuple[str, Any, bool]  # of SamplingParams, its value, and whether a schema is meant strictly


# ── bodies ───────────────────────────────────────────────────────────────────────────────────


class NamedSchema(Body):
    """OpenAI's. What `strict` false leaves open, a reply may have."""

    schema: Schema
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class Structure(Body):
    begin: str
    end: str
    schema: Schema


class PlainFormat(Body, tag_field="type", tag="text"):
    """Any text."""


class ObjectFormat(Body, tag_field="type", tag="json_object"):
    """A JSON object."""


class SchemaFormat(Body, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class TagFormat(Body, tag_field="type", tag="structural_tag"):
    """Either XGrammar's `format`, or as it was before, `structures` that begin with one of `triggers`."""

    format: dict[str, Any] | None = None
    structures: list[Structure] | None = None
    triggers: list[str] | None = None


ResponseFormat = PlainFormat | ObjectFormat | SchemaFormat | TagFormat


class StructuredOutputs(Body):
    """vLLM's. Null is the same as absent."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: Any = None
    disable_additional_properties: Any = None
    disable_fallback: Any = None
    whitespace_pattern: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "disable_any_whitespace": unserved(False),
        "disable_additional_properties": unserved(True),
        "disable_fallback": LABEL,  # there is none
        "whitespace_pattern": unserved(),
    }


class GrammarBody(Body):
    """Fields that both kinds of completion share; one of them at most is given. Null is the same as absent."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    lark: str | None = None
    choice: list[str] | None = None
    structural_tag: str | dict[str, Any] | None = None
    strict_schema: bool | None = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "guided_decoding_backend": LABEL,  # which engine compiles a grammar is the server's to say
        "guided_whitespace_pattern": unserved(),
    }


# ── from a body to SamplingParams ────────────────────────────────────────────────────────────


class GrammarFields(Protocol):
    """A body with some of the fields of GrammarBody."""

    strict_schema: bool | None


def grammar_fields(body: GrammarFields, path: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """What `body` asks a reply to be: fields of SamplingParams, and what the client, who has the body under `path`,
    calls those and the grammar. Raises RequestError where two are given that differ."""
    given = list(_given(body))
    if any(not _same(given[0][1], other) for _, other in given[1:]):
        names = " and ".join(path + name for name, _ in given)
        raise RequestError(f"{names} are given, and a reply can be only one of them", param=path + given[1][0])
    if not given:
        return {}, {}
    name, (field, value, strict) = given[0]
    if body.strict_schema is not None:
        strict = body.strict_schema
    fields = {field: value} | ({} if strict else {"strict_schema": False})
    return fields, {field: path + name, "grammar": path + name}


def _same(one: Field, other: Field) -> bool:
    """Whether two fields ask for the same; a schema is the same however it is written."""
    if one[0] != other[0] or one[2] != other[2]:
        return False
    return one[1] == other[1] or (one[0] in JSON_KINDS and _read(one[1]) == _read(other[1]) is not None)


def _read(source: Any) -> Any:
    try:
        return msgspec.json.decode(source)
    except (msgspec.DecodeError, RecursionError, TypeError):  # it is refused later, by its name
        return None


def _given(body: GrammarFields) -> Iterator[tuple[str, Field]]:
    """The fields of `body` that ask for a grammar, by the names that clients know."""
    for name, field in (
        ("guided_json", "json_schema"),
        ("json_schema", "json_schema"),
        ("structural_tag", "structural_tag"),
        ("guided_regex", "regex"),
        ("regex", "regex"),
        ("ebnf", "ebnf"),
        ("lark", "lark"),
    ):
        if (value := getattr(body, name, None)) is not None:
            yield name, (field, _text(value, name), True)
    for name in ("guided_choice", "choice"):
        if (value := getattr(body, name, None)) is not None:
            yield name, ("choice", _choice(value, name), True)
    if (value := getattr(body, "guided_grammar", None)) is not None:
        yield "guided_grammar", _grammar(value)
    if getattr(body, "json_object", None):
        yield "json_object", ("json_object", True, True)
    if (format := getattr(body, "response_format", None)) is not None and (asked := format_field(format)):
        yield "response_format", asked
    if (outputs := getattr(body, "structured_outputs", None)) is not None:
        for inner, each in _in_outputs(outputs):
            yield f"structured_outputs.{inner}", each


def _in_outputs(outputs: StructuredOutputs) -> Iterator[tuple[str, Field]]:
    for name, field in (("json", "json_schema"), ("regex", "regex"), ("structural_tag", "structural_tag")):
        if (value := getattr(outputs, name)) is not None:
            yield name, (field, _text(value, f"structured_outputs.{name}"), True)
    if outputs.choice is not None:
        yield "choice", ("choice", _choice(outputs.choice, "structured_outputs.choice"), True)
    if outputs.grammar is not None:
        yield "grammar", _grammar(outputs.grammar)
    if outputs.json_object:
        yield "json_object", ("json_object", True, True)


def format_field(format: ResponseFormat) -> Field | None:
    """What a `response_format` says; nothing, if that is any text."""
    match format:
        case ObjectFormat():
            return "json_object", True, True
        case SchemaFormat():
            schema = _text(format.json_schema.schema, "response_format")
            return "json_schema", schema, format.json_schema.strict is not False
        case TagFormat():
            tag = {"type": "structural_tag", "format": _tags(format)}
            return "structural_tag", _text(tag, "response_format"), True
    return None


def _tags(format: TagFormat) -> dict[str, Any]:
    """The `format` of a structural tag."""
    old = format.structures is not None or format.triggers is not None
    if old == (format.format is not None) or (old and None in (format.structures, format.triggers)):
        raise RequestError(
            "response_format of the type structural_tag needs either format, or structures and triggers; send one",
            param="response_format",
        )
    if format.format is not None:
        return format.format
    tags = [
        {
            "type": "tag",
            "begin": each.begin,
            "content": {"type": "json_schema", "json_schema": each.schema},
            "end": each.end,
        }
        for each in format.structures or ()
    ]
    return {"type": "triggered_tags", "triggers": format.triggers, "tags": tags}


def _text(value: Any, name: str) -> str:
    """Text as it is; anything else as JSON. The client calls it `name`."""
    if isinstance(value, str):
        return value
    check_nesting(value, name)
    return msgspec.json.encode(value).decode()


def _choice(texts: list[str], name: str) -> tuple[str, ...]:
    if not texts:
        raise RequestError(f"{name} is empty; offer at least one text, or leave it out", param=name)
    return tuple(texts)


def _grammar(source: str) -> Field:
    """vLLM takes two languages by one name, told apart by how a rule is written."""
    return ("ebnf" if "::=" in source else "lark"), source, True
