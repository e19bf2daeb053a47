"""Checks a JSON schema before XGrammar compiles it, and refuses keywords that it would ignore.

Found with the JSON-Schema-Test-Suite and by generating replies (bench/RESULTS.md): XGrammar enforces a keyword only
beside the type that it belongs to, and only one description of a value at a time. Keywords that no specification knows
are ignored, as everywhere.
"""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from engine.plugin import RequestError

BY_TYPE: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"pattern", "format"}),  # one of bounded length may hold control characters, which JSON bars
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
PYTHONS: Mapping[str, tuple[type, ...]] = MappingProxyType({
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
})  # fmt: skip
ALONE = ("$ref", "enum", "const", "anyOf")  # each says all there is to say
ASSERTIONS = frozenset({
    *ALONE, *(keyword for keywords in BY_TYPE.values() for keyword in keywords),
    "allOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies",
    "patternProperties", "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties", "unevaluatedItems",
    "contains", "minContains", "maxContains", "uniqueItems", "multipleOf", "$dynamicRef", "$recursiveRef",
    "additionalItems", "extends", "disallow", "divisibleBy", "minLength", "maxLength",
})  # fmt: skip
FORMATS = frozenset({"ipv6", "uuid", "duration", "uri"})  # it has others, which let through too much
# A pattern that means the same to everybody, speaks of the string from end to end, and of no character that JSON
# escapes: letters, sets of some by name, groups without branches.
SIGN = r"[^\\^$.|?*+()\[\]{}\"\x00-\x1f\x7f]|\\[dw.+*?()\[\]{}|^$/-]"
MEMBER = r"[a-z]-[a-z]|[A-Z]-[A-Z]|[0-9]-[0-9]|[^\\\[\]^\"\x00-\x1f\x7f-]|\\[dw.+*?()|$/-]"
QUANTIFIER = r"(?:[*+?]|\{\d+(?:,\d*)?\})?"
WHOLE = re.compile(rf"\^(?:(?:{SIGN}|\[(?:{MEMBER})+\]|\)){QUANTIFIER}|\((?:\?:)?)*\$", re.ASCII)
MOST_NUMBER = 2**53  # beyond it a double is not exact, which bounds of numbers are; other integers have 64 bits


def check_schema(schema: Any, path: str = "#") -> None:
    """Raises RequestError naming the first keyword that cannot be enforced."""
    if isinstance(schema, bool):
        if not schema:
            raise _refuse("false", path)
        return
    if not isinstance(schema, dict):
        raise RequestError(f"{path} is {str(schema)[:80]}, not a schema", code="invalid_grammar")
    for name in ("$defs", "definitions"):
        for key, each in (schema.get(name) or {}).items():
            check_schema(each, f"{path}/{name}/{key}")
    said = schema.keys() & ASSERTIONS
    _check_numbers(schema, path)
    if alone := [keyword for keyword in ALONE if keyword in said]:
        _check_alone(schema, alone[0], said, path)
    else:
        _check_typed(schema, said, path)


def check_tag(tag: Any) -> None:
    """The same of each schema in a structural tag."""
    for name, each in tag.items() if isinstance(tag, dict) else ():
        if name == "json_schema":
            check_schema(each)
        else:
            check_tag(each)
    for each in tag if isinstance(tag, list) else ():
        check_tag(each)


def _refuse(keyword: str, path: str, why: str = "") -> RequestError:
    return RequestError(
        f"xgrammar cannot enforce {keyword} at {path}{why}; leave it out, or install llguidance",
        code="unsupported_keyword",
    )


def _check_numbers(schema: dict[str, Any], path: str) -> None:
    for keyword in ("enum", "const", *BY_TYPE["number"]):
        whole = keyword in ("enum", "const") or schema.get("type") == "integer"
        for number in _integers(schema.get(keyword)):
            if not (-(2**63) <= number < 2**63 if whole else abs(number) <= MOST_NUMBER):
                raise _refuse(keyword, path, f", which is {str(number)[:40]}: too large to be told from its neighbours")


def _integers(value: Any) -> Iterator[int]:
    """Every whole number in a JSON value."""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        yield int(value)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _integers(part)


def _check_alone(schema: dict[str, Any], keyword: str, said: set[str], path: str) -> None:
    if others := said - {keyword}:
        raise _refuse(sorted(others)[0], path, f" beside {keyword}")
    if keyword == "$ref" and not str(schema["$ref"]).startswith("#/") and schema["$ref"] != "#":
        raise _refuse(f"$ref {schema['$ref']!r}", path, ", which is not in this schema")
    if keyword == "anyOf":
        if "type" in schema:
            raise _refuse("type", path, " beside anyOf")
        for index, each in enumerate(schema["anyOf"]):
            check_schema(each, f"{path}/anyOf/{index}")
    if "type" in schema and keyword == "$ref":
        raise _refuse("type", path, " beside $ref")
    if "type" in schema and keyword in ("enum", "const"):
        members = schema["enum"] if keyword == "enum" else [schema["const"]]
        if not isinstance(members, list):
            raise RequestError(f"enum at {path} is {str(members)[:80]}, not a list", code="invalid_grammar")
        _check_members(schema["type"], members, path)


def _check_members(kind: Any, members: list[Any], path: str) -> None:
    """XGrammar lets through every member, of whatever type."""
    kinds = kind if isinstance(kind, list) else [kind]
    for each in kinds:
        if not isinstance(each, str) or each not in BY_TYPE:
            raise RequestError(f"type at {path} is {str(each)[:80]!r}, which is not a type", code="invalid_grammar")
    for member in members:
        if not any(_is(member, each) for each in kinds):
            raise _refuse("type", path, f" beside {repr(member)[:80]}, which is of another type")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and value.is_integer():
        return kind in ("integer", "number")
    return isinstance(value, PYTHONS[kind])


def _check_typed(schema: dict[str, Any], said: set[str], path: str) -> None:
    kind = schema.get("type")
    if isinstance(kind, list):
        if said:
            raise _refuse(sorted(said)[0], path, " of several types; use anyOf")
        return
    if kind is None:
        if said:
            raise _refuse(sorted(said)[0], path, " without a type beside it")
        return
    if kind not in BY_TYPE:
        raise RequestError(f"type at {path} is {str(kind)[:80]!r}, which is not a type", code="invalid_grammar")
    if others := said - BY_TYPE[kind]:
        raise _refuse(sorted(others)[0], path)
    if kind == "object":
        _check_object(schema, path)
    elif kind == "array":
        for name in ("items", "prefixItems"):
            given = schema.get(name, [])
            for index, each in enumerate(given if isinstance(given, list) else [given]):
                if each is not False:
                    check_schema(each, f"{path}/{name}/{index}")
        if "prefixItems" in said and said & {"minItems", "maxItems"}:
            raise _refuse("prefixItems", path, " beside a number of items")
    elif kind == "string":
        _check_string(schema, said, path)


def _check_object(schema: dict[str, Any], path: str) -> None:
    properties = schema.get("properties", {})
    for name, each in properties.items():
        check_schema(each, f"{path}/properties/{name}")
    if missing := [name for name in schema.get("required", ()) if name not in properties]:
        raise _refuse("required", path, f" of {missing[0]!r}, which properties does not have")
    rest = schema.get("additionalProperties", True)
    if rest is not False:
        check_schema(rest, f"{path}/additionalProperties")
        if properties:
            # It would take a declared name again, among those that are not.
            raise _refuse("additionalProperties", path, " other than false beside properties")


def _check_string(schema: dict[str, Any], said: set[str], path: str) -> None:
    if len(said) > 1:
        raise _refuse("format", path, " beside pattern")
    if "pattern" in said and not WHOLE.fullmatch(str(schema["pattern"])):
        raise _refuse("pattern", path, ", which is more than letters, [...] and repetitions: write ^...$")
    if "format" in said and schema["format"] not in FORMATS:
        raise _refuse(f"format {schema['format']!r}", path)
