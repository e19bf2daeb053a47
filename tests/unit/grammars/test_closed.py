"""Strict schemas: closed where they name properties, left open where closing would leave nothing."""

import json
from typing import Any

import pytest

from engine.grammars.closed import close, prepared
from engine.params.grammar import Grammar

ONE: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED = {**ONE, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (ONE, CLOSED),
        (True, True),
        ({"type": "object"}, {"type": "object"}),
        ({"type": "array", "items": ONE}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [ONE, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$defs": {"x": ONE}, "$ref": "#/$defs/x"}, {"$defs": {"x": CLOSED}, "$ref": "#/$defs/x"}),
        ({"properties": {"properties": ONE}}, {"properties": {"properties": CLOSED}, "additionalProperties": False}),
        ({"prefixItems": [ONE]}, {"prefixItems": [CLOSED], "items": False}),
        ({"prefixItems": [ONE], "items": True}, {"prefixItems": [CLOSED], "items": True}),
        ({"enum": [ONE]}, {"enum": [ONE]}),
    ],
)
def test_what_is_named_is_all_there_is(schema: Any, closed: Any) -> None:
    assert close(schema) == closed


@pytest.mark.parametrize(
    "schema",
    [
        {**ONE, "additionalProperties": {"type": "null"}},
        {**ONE, "patternProperties": {"^x": True}},
        {**ONE, "required": ["a", "b"]},
        {**ONE, "minProperties": 2},
        {**ONE, "required": 3},
        {**ONE, "unevaluatedProperties": False},
        {"allOf": [ONE, {"properties": {"b": True}}]},
        {**ONE, "$ref": "#/$defs/x", "$defs": {"x": {"properties": {"b": True}}}},
        {**ONE, "anyOf": [{"properties": {"b": True}}, {"properties": {"c": True}}]},
        {**ONE, "if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}},
    ],
)
def test_what_is_said_in_several_places_stays_open(schema: Any) -> None:
    assert close(schema) == schema


def test_it_is_for_strict_grammars_of_schemas_alone() -> None:
    text = json.dumps(ONE)
    assert json.loads(prepared(Grammar("json_schema", text)).source) == CLOSED
    assert json.loads(prepared(Grammar("json_schema", text, strict=False)).source) == ONE
    assert prepared(Grammar("regex", text)).source == text
    tag = {"type": "tag", "begin": "<", "content": {"type": "json_schema", "json_schema": ONE}, "end": ">"}
    made = prepared(Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": tag})))
    assert json.loads(made.source)["format"]["content"]["json_schema"] == CLOSED
