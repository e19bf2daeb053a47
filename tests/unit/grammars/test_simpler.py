"""Schemas in fewer words, which are valid for the same values: by rule, and by an independent validator."""

from typing import Any

import jsonschema_rs
import pytest

from engine.grammars.simpler import simpler

X = {"type": "integer"}
OLD = "http://json-schema.org/draft-07/schema#"
CASES: list[tuple[Any, Any]] = [
    ({"type": "object", "propertyNames": {"type": "string"}}, {"type": "object"}),
    ({"propertyNames": True}, {}),
    ({"propertyNames": {"type": ["string", "null"], "title": "t"}}, {}),
    ({"propertyNames": False}, {"allOf": [{"maxProperties": 0}]}),
    (
        {
            "propertyNames": {"type": "string", "enum": ["a", "b"]},
            "additionalProperties": X,
            "properties": {"b": True, "c": X},
        },
        {"properties": {"b": True, "a": X}, "additionalProperties": False},
    ),
    (
        {"propertyNames": {"pattern": "^a"}, "additionalProperties": X},
        {"patternProperties": {"^a": X}, "additionalProperties": False},
    ),
    (
        {"propertyNames": {"maxLength": 2}},
        {"patternProperties": {r"^[\s\S]{0,2}$": True}, "additionalProperties": False},
    ),
    ({"uniqueItems": False}, {}),
    ({"uniqueItems": True, "maxItems": 1}, {"maxItems": 1}),
    ({"uniqueItems": True, "prefixItems": [X], "items": False}, {"prefixItems": [X], "items": False}),
    ({"uniqueItems": True, "maxItems": 2}, {"uniqueItems": True, "maxItems": 2}),
    ({"minContains": 0, "maxContains": 3}, {}),
    ({"contains": X, "minContains": 0}, {}),
    ({"contains": X, "minContains": 0, "maxContains": 1}, {"contains": X, "minContains": 0, "maxContains": 1}),
    ({"contains": True, "maxContains": 3}, {"allOf": [{"minItems": 1, "maxItems": 3}]}),
    ({"$schema": OLD, "contains": X, "minContains": 0}, {"$schema": OLD, "contains": X}),
    ({"not": False}, {}),
    ({"anyOf": [X, {"not": {}}]}, {"anyOf": [X, False]}),
    ({"not": {"not": X}}, {"allOf": [X]}),
    ({"not": {"type": "null"}}, {"allOf": [{"type": ["string", "number", "boolean", "array", "object"]}]}),
    ({"not": X}, {"not": X}),
    ({"if": {}}, {}),
    ({"if": X}, {}),
    ({"then": X, "else": X}, {}),
    ({"if": True, "then": X, "else": False}, {"allOf": [X]}),
    ({"if": False, "then": False, "else": X}, {"allOf": [X]}),
    ({"if": X, "then": True}, {}),
    ({"dependentRequired": {}, "dependentSchemas": {"a": {}}}, {}),
    ({"dependentRequired": {"a": ["b"], "c": []}, "required": ["b"]}, {"required": ["b"]}),
    ({"dependencies": {"a": True, "b": []}}, {}),
    ({"properties": {}, "unevaluatedProperties": False}, {"properties": {}, "additionalProperties": False}),
    ({"additionalProperties": False, "unevaluatedProperties": False}, {"additionalProperties": False}),
    ({"prefixItems": [X], "unevaluatedItems": False}, {"prefixItems": [X], "items": False}),
    ({"allOf": [X], "unevaluatedProperties": False}, {"allOf": [X], "unevaluatedProperties": False}),
    ({"if": X, "unevaluatedProperties": False}, {"if": X, "unevaluatedProperties": False}),
    ({"minProperties": 0}, {}),
    ({"minProperties": 1, "required": ["a"]}, {"required": ["a"]}),
    (
        {"maxProperties": 1, "properties": {"a": X}, "additionalProperties": False},
        {"properties": {"a": X}, "additionalProperties": False},
    ),
    ({"type": "string", "uniqueItems": True, "propertyNames": X, "minProperties": 2}, {"type": "string"}),
    (
        {"$schema": OLD, "$ref": "#/definitions/a", "maxLength": 1, "definitions": {"a": X}},
        {"$schema": OLD, "$ref": "#/definitions/a", "definitions": {"a": X}},
    ),
    ({"$schema": OLD, "unevaluatedProperties": False}, {"$schema": OLD}),
    (
        {"properties": {"not": {"not": False}, "uniqueItems": {"uniqueItems": False}}},
        {"properties": {"not": {}, "uniqueItems": {}}},
    ),
    (
        {"const": {"uniqueItems": False}, "enum": [{"not": {}}]},
        {"const": {"uniqueItems": False}, "enum": [{"not": {}}]},
    ),
]
VALUES: list[Any] = [
    None,
    True,
    0,
    1.5,
    "",
    "a",
    [],
    [1],
    [1, 1],
    [1, "a"],
    [None],
    {},
    {"a": 1},
    {"b": "x"},
    {"a": 1, "b": 2},
    {"c": 1},
    {"ab": 1},
    {"abc": 1},
    {"a": None},
    {"a": 1, "c": 3},
]


@pytest.mark.parametrize(("schema", "wanted"), CASES, ids=str)
def test_what_becomes_of_a_schema(schema: Any, wanted: Any) -> None:
    assert simpler(schema) == wanted
    before, after = jsonschema_rs.validator_for(schema), jsonschema_rs.validator_for(wanted)
    assert [value for value in VALUES if before.is_valid(value) != after.is_valid(value)] == []


@pytest.mark.parametrize(
    "name", ["propertyNames", "dependentRequired", "contains", "if", "not", "allOf", "properties", "items"]
)
@pytest.mark.parametrize("value", [None, 3, "x", [], {"a": 3}, [3], [[]], {"type": 3}])
def test_what_is_malformed_is_left_to_an_engine(name: str, value: Any) -> None:
    simpler({name: value, "minProperties": value, "uniqueItems": value, "maxContains": value, "required": value})
