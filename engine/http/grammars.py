"""The fields in which HTTP clients ask for a grammar: OpenAI's `response_format`, vLLM's `structured_outputs` and
`guided_*`, SGLang's `regex`, `ebnf`, `json_schema` and `structural_tag`, and our own beside them.

Bodies, and for each API the table of how a field asks; params/grammar.py makes one Grammar of them. Left out: patterns
of whitespace.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, ClassVar

from engine.errors import RequestError
from engine.http.fields import LABEL, Rule, unserved
from engine.http.wire import Body
from engine.params.grammar import Ask, GrammarFields, GrammarKind

Schema = dict[str, Any] | bool


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


class OwnGrammar(Body):
    """The fields that are named as grammars' kinds; one at most is given. Null is the same as absent."""

    json_schema: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    lark: str | None = None
    choice: list[str] | None = None
    structural_tag: str | dict[str, Any] | None = None
    strict_schema: bool | None = None


class GrammarBody(OwnGrammar):
    """Fields that both kinds of completion share; one of them at most is given. Null is the same as absent."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "guided_decoding_backend": LABEL,  # which engine compiles a grammar is the server's to say
        "guided_whitespace_pattern": unserved(),
    }


# ── how each field asks ──────────────────────────────────────────────────────────────────────


def language_of(source: str) -> GrammarKind:
    """vLLM takes two languages by one name, told apart by how a rule is written."""
    return "ebnf" if "::=" in source else "lark"


def tag_of(format: TagFormat) -> dict[str, Any]:
    """The structural tag of a `response_format`."""
    old = format.structures is not None or format.triggers is not None
    if old == (format.format is not None) or (old and None in (format.structures, format.triggers)):
        raise RequestError(
            "response_format of the type structural_tag needs either format, or structures and triggers; send one",
            param="response_format",
        )
    if format.format is not None:
        return {"type": "structural_tag", "format": format.format}
    tags = [
        {
            "type": "tag",
            "begin": each.begin,
            "content": {"type": "json_schema", "json_schema": each.schema},
            "end": each.end,
        }
        for each in format.structures or ()
    ]
    inner = {"type": "triggered_tags", "triggers": format.triggers, "tags": tags}
    return {"type": "structural_tag", "format": inner}


AS_LANGUAGE = Ask(language_of)
OWN = {
    "json_schema": Ask("json_schema"),
    "structural_tag": Ask("structural_tag"),
    "regex": Ask("regex"),
    "ebnf": Ask("ebnf"),
    "lark": Ask("lark"),
    "choice": Ask("choice"),
    "json_object": Ask("json_object"),
}
OWN_FIELDS = GrammarFields(OWN)
OPENAI_FIELDS = GrammarFields(
    {
        "guided_json": OWN["json_schema"],
        "guided_regex": OWN["regex"],
        **OWN,
        "guided_choice": OWN["choice"],
        "guided_grammar": AS_LANGUAGE,
        "response_format": {
            ObjectFormat: Ask("json_object"),
            SchemaFormat: Ask("json_schema", attrgetter("json_schema.schema"), attrgetter("json_schema.strict")),
            TagFormat: Ask("structural_tag", tag_of),
        },
        "structured_outputs": {
            "json": OWN["json_schema"],
            "regex": OWN["regex"],
            "structural_tag": OWN["structural_tag"],
            "choice": OWN["choice"],
            "grammar": AS_LANGUAGE,
            "json_object": OWN["json_object"],
        },
    }
)
