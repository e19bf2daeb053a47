"""JSON schemas keyword by keyword: what each grammar engine lets through, what replies drawn from its masks are by an
independent validator, and what it refuses. The official suite is test_schema_suite.py's.
"""

import json
import re
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from engine.errors import RequestError
from engine.grammars.closed import prepared
from engine.params.grammar import Grammar
from engine.plugin.registry import Plugins, resolve
from engine.plugin.specs import GrammarEngine
from engine.testing.grammars import vocabulary

WORDS = vocabulary()
ENGINES = ("llguidance", "xgrammar")
ITEM = {
    "type": "object",
    "required": ["id", "name", "tags"],
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 9999},
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
}
PLAIN = {
    "type": "object",
    "required": ["a"],
    "properties": {"a": {"type": "string"}, "b": {"anyOf": [{"type": "number"}, {"type": "null"}]}},
}
BOTH: list[dict[str, Any]] = [
    PLAIN,
    {"type": "array", "items": PLAIN, "minItems": 1, "maxItems": 3},
    {"type": "object"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
    {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]+$"},
    {"type": "string", "format": "uuid"},
    {"type": "integer", "minimum": -3, "maximum": 120},
    {"type": "integer", "exclusiveMinimum": 3},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"enum": ["a", 1, None, True, {"b": [1]}]},
    {"const": {"a": [1, "é"]}},
    {"type": ["integer", "string", "null"], "enum": [2, -7, "a", None]},
    {"type": "boolean", "enum": [True, False]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"t": {"$ref": "#/$defs/tree"}}}}},
    {"type": ["string", "null"]},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    {"type": "object", "additionalProperties": {"type": "integer"}},
]
LLGUIDANCE: list[dict[str, Any]] = [
    ITEM,
    {"type": "array", "items": ITEM, "minItems": 1, "maxItems": 3},
    {"type": "string", "minLength": 2, "maxLength": 5},
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "email", "ipv4")),
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "minProperties": 2},
    {"type": "integer", "multipleOf": 7},
    {"type": "string", "pattern": "b+", "maxLength": 5},
    {"minimum": 3, "maxLength": 2},
    {"type": "string", "format": "password"},
    {"type": "string", "enum": ["a", "b", "c", "d", 1, None]},
    {"type": "integer", "enum": [1, 2, 3, 4, True, 1.5]},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "string", "not": {"const": "a"}}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {"type": "integer"}}, "contains"),
    ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "properties": {"a": {"type": "object", "propertyNames": {"maxLength": 2}}}}, "propertyNames"),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf"),
    ({"$ref": "https://example.com/schema"}, "$ref"),
]


def engine(name: str) -> GrammarEngine:
    pytest.importorskip(name)
    made: GrammarEngine = resolve(Plugins.load().entries("grammars")[name].target)(WORDS, threads=1, whitespace=True)
    return made


def replies(made: GrammarEngine, grammar: Grammar, count: int) -> list[str]:
    """Replies drawn from the masks of `grammar`; those that go on too long are left out."""
    compiled = made.compile(grammar)
    masks = np.zeros((1, -(-len(WORDS.tokens) // 32)), np.int32)
    rng = np.random.default_rng(0)
    closing = np.array([token[-1:] in (b'"', b"]", b"}") for token in WORDS.tokens])
    said = []
    for _ in range(count):
        matcher, tokens = compiled.matcher(), b""
        for _ in range(300):
            made.fill([matcher], masks, [0])
            bits = np.unpackbits(masks.view(np.uint8), bitorder="little")[: len(closing)].astype(bool)
            ids = (
                np.flatnonzero(bits & closing)
                if (bits & closing).any() and rng.random() < 0.3
                else np.flatnonzero(bits)
            )
            token = int(rng.choice([id for id in ids if id in WORDS.eos_ids] or ids))
            assert made.accept([matcher], [token]) == [True]
            if token in WORDS.eos_ids:
                # XGrammar takes the bytes of half a surrogate pair for a character; real models do not say them.
                said.append(tokens.decode(errors="replace"))
                break
            tokens += WORDS.tokens[token]
    return said


CASES = [(name, schema) for name in ENGINES for schema in BOTH] + [("llguidance", schema) for schema in LLGUIDANCE]


@pytest.mark.parametrize(("name", "schema"), CASES, ids=str)
def test_whatever_is_said_is_valid(name: str, schema: dict[str, Any]) -> None:
    made = engine(name)
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    strict = prepared(Grammar("json_schema", json.dumps(schema)))
    loose = Grammar("json_schema", json.dumps(schema), strict=False)
    grammars = [strict, loose] if name == "llguidance" else [strict]
    said = [text for grammar in grammars for text in replies(made, grammar, 12)]
    assert len(said) > 3
    for text in said:
        assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("schema", "keyword"), REFUSED, ids=str)
def test_what_cannot_be_held_to_is_refused_by_name(name: str, schema: dict[str, Any], keyword: str) -> None:
    with pytest.raises(RequestError, match=re.escape(keyword)):
        engine(name).compile(Grammar("json_schema", json.dumps(schema)))


@pytest.mark.parametrize("schema", LLGUIDANCE, ids=str)
def test_xgrammar_is_not_asked_for_what_it_passes_over(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="xgrammar cannot enforce") as caught:
        engine("xgrammar").compile(Grammar("json_schema", json.dumps(schema)))
    assert caught.value.code == "unsupported_keyword"
