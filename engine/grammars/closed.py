"""Closes the objects of a strict JSON schema, so that a reply has only the properties that it declares.

JSON Schema allows properties that the schema does not declare. Clients do not want them in a reply, and a small model
continues with them if it may. Every reply that a closed schema allows is valid by the schema as sent. Left open: an
object that declares no property, or requires undeclared ones; a schema that combines objects (allOf, $ref beside
properties), because closing a part could leave no valid reply.
"""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from engine.grammars.simpler import simpler
from engine.params.grammar import Grammar

OPENERS = ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "$dynamicRef")
IN_PLACE = ("allOf", "if", "then", "else", "dependentSchemas", "not")
BRANCHES = ("anyOf", "oneOf")
MAPS = ("properties", "$defs", "definitions", "patternProperties")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "contains", "not", "if", "then", "else")


def prepared(grammar: Grammar) -> Grammar:
    """`grammar` as engines take it, with its schemas simplified, and closed if it is strict."""
    if grammar.kind not in ("json_schema", "structural_tag"):
        return grammar
    value = msgspec.json.decode(grammar.source)
    change = _closed_and_simpler if grammar.strict else simpler
    changed = change(value) if grammar.kind == "json_schema" else _in_tags(value, change)
    return msgspec.structs.replace(grammar, source=msgspec.json.encode(changed).decode())


def _closed_and_simpler(schema: Any) -> Any:
    return simpler(close(simpler(schema)))


def close(schema: Any) -> Any:
    """`schema` with its objects closed."""
    if any(_composes(node) for node in _schemas(schema)):
        return schema
    return _closed(schema)


def _in_tags(value: Any, change: Callable[[Any], Any]) -> Any:
    """A structural tag with each json_schema in it changed."""
    if isinstance(value, list):
        return [_in_tags(each, change) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: change(each) if name == "json_schema" else _in_tags(each, change) for name, each in value.items()}


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema within `schema`, itself the first."""
    if not isinstance(schema, dict):
        return
    yield schema
    for inner in _inner(schema):
        yield from _schemas(inner)


def _inner(schema: dict[str, Any]) -> Iterator[Any]:
    for name in MAPS:
        if isinstance(each := schema.get(name), dict):
            yield from each.values()
    for name in LISTS:
        if isinstance(each := schema.get(name), list):
            yield from each
    for name in SINGLE:
        if isinstance(each := schema.get(name), dict):
            yield each


def _composes(schema: dict[str, Any]) -> bool:
    """Whether several places describe the properties of an object."""
    named = isinstance(schema.get("properties"), dict)
    if any(name in schema for name in IN_PLACE):
        return True
    return named and any(name in schema for name in ("$ref", *BRANCHES))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name in MAPS:
        if isinstance(each := schema.get(name), dict):
            closed[name] = {key: _closed(value) for key, value in each.items()}
    for name in LISTS:
        if isinstance(each := schema.get(name), list):
            closed[name] = [_closed(value) for value in each]
    for name in SINGLE:
        if isinstance(each := schema.get(name), dict):
            closed[name] = _closed(each)
    if _all_named(schema):
        closed["additionalProperties"] = False
    if isinstance(schema.get("prefixItems"), list) and "items" not in schema and "unevaluatedItems" not in schema:
        closed["items"] = False
    return closed


def _all_named(schema: dict[str, Any]) -> bool:
    """Whether the declared properties include all required ones, and nothing is said about others."""
    named, required, least = schema.get("properties"), schema.get("required", ()), schema.get("minProperties", 0)
    if not isinstance(named, dict) or any(name in schema for name in OPENERS):
        return False
    if not isinstance(required, list | tuple) or not isinstance(least, int | float):
        return False  # it is malformed, which the engine says
    return set(map(str, required)) <= named.keys() and least <= len(named)
