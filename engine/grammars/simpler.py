"""Simplifies JSON schemas: keywords that forbid nothing are left out, and some are rewritten into others.

    {"type": "array", "uniqueItems": false, "minContains": 1}      {"type": "array"}
    {"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": X}      {"properties": {"a": X, "b": X}, ...: false}
    {"if": {}, "then": X}      {"allOf": [X]}

A schema and its simplified form are valid for the same values. Malformed parts stay as they are, and an engine reports
them. Left out: rules that would need to resolve references.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
SINGLE = (
    "items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
OF_TYPE: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "array": ("contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems", "additionalItems"),
    "object": (
        "propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties",
        "minProperties", "maxProperties",
    ),
})  # fmt: skip
IN_PLACE = ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "not")
TYPES = ("string", "number", "boolean", "null", "array", "object")
NEWER = frozenset(
    {
        "unevaluatedProperties",
        "unevaluatedItems",
        "dependentRequired",
        "dependentSchemas",
        "minContains",
        "maxContains",
    }
)  # than draft 7, in which they say nothing
REMARKS = frozenset({"$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"})
LENGTHS = ("minLength", "maxLength")
UNEVALUATED = ("unevaluatedProperties", "unevaluatedItems")
BESIDE_REF = frozenset({"$ref", "$schema", "definitions", "$defs"})
Schema = dict[str, Any]
Rule = Callable[[Schema, bool], None]


def simpler(schema: Any) -> Any:
    """`schema` simplified, valid for the same values."""
    schema = _changed(schema, (_unevaluated,), legacy=False)
    if any(name in each for each in _all_schemas(schema) for name in UNEVALUATED):
        return schema  # which asks what other keywords have looked at: what forbids nothing may look at something
    return _changed(schema, RULES, legacy=False)


def _changed(schema: Any, rules: Sequence[Rule], *, legacy: bool) -> Any:
    """`schema` and all within it by `rules`. `legacy`: of draft 7 or an earlier one, as `$schema` says."""
    if not isinstance(schema, dict):
        return schema
    if isinstance(draft := schema.get("$schema"), str):
        legacy = "/draft-0" in draft
    if legacy:
        # There what stands beside $ref counts for nothing, and newer keywords say nothing.
        kept = BESIDE_REF if "$ref" in schema else schema.keys() - NEWER
        schema = {name: each for name, each in schema.items() if name in kept}
    schema = _mapped(schema, lambda each: _changed(each, rules, legacy=legacy))
    for rule in rules:
        rule(schema, legacy)
    nothing = isinstance(parts := schema.get("allOf"), list) and any(each is False for each in parts)
    return False if nothing and not schema.keys() & {"$defs", "definitions"} else schema


def _all_schemas(schema: Any) -> Iterator[Schema]:
    """`schema` and all within it."""
    if isinstance(schema, dict):
        yield schema
        for each in _schemas_in(schema):
            yield from _all_schemas(each)


def _schemas_in(schema: Schema) -> Iterator[Any]:
    """The schemas that `schema` is made of."""
    for name in MAPS:
        if isinstance(each := schema.get(name), dict):
            yield from each.values()
    for name in LISTS:
        if isinstance(each := schema.get(name), list):
            yield from each
    for name in SINGLE:
        if not isinstance(each := schema.get(name, []), list):
            yield each


def _mapped(schema: Schema, change: Callable[[Any], Any]) -> Schema:
    """A copy of `schema` with each that it is made of changed."""
    copy = dict(schema)
    for name in MAPS:
        if isinstance(each := schema.get(name), dict):
            copy[name] = {key: change(value) for key, value in each.items()}
    for name in LISTS:
        if isinstance(each := schema.get(name), list):
            copy[name] = [change(value) for value in each]
    for name in SINGLE:
        if isinstance(each := schema.get(name), dict):
            copy[name] = change(each)
    return copy


def _free(schema: Any) -> bool:
    """Whether `schema` forbids nothing."""
    return schema is True or (isinstance(schema, dict) and schema.keys() <= REMARKS)


def _count(value: Any) -> int | None:
    """A count; None for what is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _types(schema: Schema) -> list[str] | None:
    """The types that `schema` names; None if it names none."""
    types = schema.get("type")
    types = [types] if isinstance(types, str) else types
    return types if isinstance(types, list) and all(isinstance(each, str) for each in types) else None


def _all_of(schema: Schema, more: Any) -> None:
    """`schema` must be `more` as well."""
    if not _free(more) and isinstance(schema.setdefault("allOf", []), list):
        schema["allOf"] = [*schema["allOf"], more]


# ── the rules, each of which changes `schema` ────────────────────────────────────────────────


def _other_types(schema: Schema, legacy: bool) -> None:
    """Drops keywords for types that the schema does not name."""
    types = _types(schema)
    for type, keywords in OF_TYPE.items():
        if types is not None and type not in types:
            for keyword in keywords:
                schema.pop(keyword, None)


def _numbers_of(schema: Schema, legacy: bool) -> None:
    """Drops bounds on the number of properties that the declared names guarantee already."""
    if _count(schema.get("minProperties")) == 0:
        del schema["minProperties"]
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return
    names = {name for name in required if isinstance(name, str)}
    least, most = _count(schema.get("minProperties")), _count(schema.get("maxProperties"))
    if least is not None and least <= len(names):
        del schema["minProperties"]
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if most is not None and closed and len(properties) <= most:
        del schema["maxProperties"]


def _lists(schema: Schema, legacy: bool) -> None:
    """Drops or rewrites keywords about items: those that must be there, and uniqueness."""
    least = 1 if legacy else _count(schema.get("minContains", 1))
    most = None if legacy else _count(schema.get("maxContains"))
    if "contains" not in schema or (least == 0 and "maxContains" not in schema):
        for name in ("contains", "minContains", "maxContains"):
            schema.pop(name, None)
    elif _free(schema["contains"]) and least is not None and (most is not None or "maxContains" not in schema):
        for name in ("contains", "minContains", "maxContains"):
            schema.pop(name, None)
        _all_of(schema, {"minItems": least} if most is None else {"minItems": least, "maxItems": most})
    items = "prefixItems" if "prefixItems" in schema else "items"
    rest = schema.get("items" if items == "prefixItems" else "additionalItems")
    listed = len(schema[items]) if isinstance(schema.get(items), list) and rest is False else None
    at_most = min((each for each in (_count(schema.get("maxItems")), listed) if each is not None), default=None)
    unique = schema.get("uniqueItems")
    if unique is False or (unique is True and at_most is not None and at_most < 2):
        del schema["uniqueItems"]
    if not isinstance(schema.get("items"), list):
        schema.pop("additionalItems", None)


def _names(schema: Schema, legacy: bool) -> None:
    """Rewrites `propertyNames` by declaring the names or by a pattern for them."""
    names = schema.get("propertyNames")
    if names is True or (isinstance(names, dict) and _says_string(names)):
        del schema["propertyNames"]
        return
    if names is False:
        del schema["propertyNames"]
        _all_of(schema, {"maxProperties": 0})
        return
    if not isinstance(names, dict) or any(name in schema for name in ("patternProperties", *IN_PLACE)):
        return
    said, properties = names.keys() - REMARKS - {"type"}, schema.get("properties", {})
    if not isinstance(properties, dict) or (_types(names) or ["string"]) != ["string"]:
        return
    rest = schema.get("additionalProperties", True)
    if said in ({"enum"}, {"const"}):
        words = names["enum"] if "enum" in said else [names["const"]]
        if not isinstance(words, list):
            return
        allowed = [word for word in words if isinstance(word, str)]
        schema["properties"] = {name: each for name, each in properties.items() if name in allowed} | {
            name: rest for name in allowed if name not in properties
        }
    elif properties or not said <= {"pattern", *LENGTHS}:
        return
    else:
        if (pattern := _pattern_of(names)) is None:
            return
        schema["patternProperties"] = {pattern: rest}
    del schema["propertyNames"]
    schema["additionalProperties"] = False


def _says_string(names: Schema) -> bool:
    return names.keys() - REMARKS <= {"type"} and "string" in (_types(names) or ["string"])


def _pattern_of(names: Schema) -> str | None:
    """What a name must match, as one expression; None if that takes two."""
    if "pattern" in names:
        pattern = names["pattern"]
        return pattern if isinstance(pattern, str) and not names.keys() & set(LENGTHS) else None
    least, most = _count(names.get("minLength", 0)), _count(names.get("maxLength", 0))
    if least is None or most is None:
        return None
    return rf"^[\s\S]{{{least},{most if 'maxLength' in names else ''}}}$"


def _dependent(schema: Schema, legacy: bool) -> None:
    """Drops dependencies between properties that demand nothing, or nothing new."""
    required: list[Any] = schema["required"] if isinstance(schema.get("required"), list) else []
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        asked = schema.get(keyword)
        if isinstance(asked, dict):
            left = {
                name: each
                for name, each in asked.items()
                if not _free(each) and not (isinstance(each, list) and all(other in required for other in each))
            }
            schema[keyword] = left
            if not left:
                del schema[keyword]


def _conditions(schema: Schema, legacy: bool) -> None:
    for name in ("then", "else"):
        if name in schema and ("if" not in schema or _free(schema[name])):
            del schema[name]
    if "if" not in schema:
        return
    if _free(schema["if"]) or schema["if"] is False:
        holds = schema.pop("if") is not False
        then, other = schema.pop("then", True), schema.pop("else", True)
        _all_of(schema, then if holds else other)
    elif "then" not in schema and "else" not in schema:
        del schema["if"]


def _negations(schema: Schema, legacy: bool) -> None:
    """Rewrites a negation of nothing, of everything, of a negation, or of types."""
    if "not" not in schema:
        return
    negated = schema["not"]
    if negated is False:
        del schema["not"]
    elif _free(negated):
        del schema["not"]
        _all_of(schema, False)
    elif isinstance(negated, dict) and negated.keys() - REMARKS == {"not"}:
        del schema["not"]
        _all_of(schema, negated["not"])
    elif isinstance(negated, dict) and negated.keys() - REMARKS == {"type"}:
        types = _types(negated)
        if types is not None and set(types) <= set(TYPES):
            del schema["not"]
            others = [type for type in TYPES if type not in types]
            _all_of(schema, {"type": others} if others else False)


def _unevaluated(schema: Schema, legacy: bool) -> None:
    """Rewrites `unevaluated…` as `additional…` if one place declares everything."""
    apart = any(name in schema for name in IN_PLACE)
    for unevaluated, additional in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if unevaluated not in schema:
            continue
        if _free(schema[unevaluated]) or (additional in schema and not isinstance(schema[additional], list)):
            del schema[unevaluated]
        elif not apart and additional not in schema and "contains" not in schema:
            schema[additional] = schema.pop(unevaluated)


RULES: tuple[Rule, ...] = (_other_types, _lists, _names, _dependent, _conditions, _negations, _numbers_of)
