"""Which kinds of JSON values a schema lets through: "string", "integer", and so on.

A parser of a family that writes a string as it stands asks here whether 12 is a number or a text. What a schema leaves
open may be of any kind. Torch-free. Left out: whether a value is valid by the schema, and references that leave it.
"""

from typing import Any

ANY_KIND = frozenset(("string", "integer", "number", "boolean", "null", "array", "object"))
MOST_DEPTH = 32  # of schemas within schemas and references: what is deeper may be of any kind


def kinds_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """The kinds of values that `schema` lets through, by `type`, `enum`, `const`, `anyOf` and their like; `root` is the
    schema that references begin at. All of them where it does not say, or is malformed. Every integer is a number."""
    if not isinstance(schema, dict) or depth > MOST_DEPTH:
        return ANY_KIND
    found = _typed(schema.get("type"))
    if isinstance(values := [schema["const"]] if "const" in schema else schema.get("enum"), list):
        found &= frozenset(map(kind_of, values))
    for name in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(name), list) and branches:
            found &= frozenset().union(*(kinds_of(branch, root, depth + 1) for branch in branches))
    if isinstance(parts := schema.get("allOf"), list):
        for part in parts:
            found &= kinds_of(part, root, depth + 1)
    if isinstance(reference := schema.get("$ref"), str):
        found &= kinds_of(_referred(reference, root), root, depth + 1)
    if schema.get("nullable") is True:
        found |= {"null"}
    return found or ANY_KIND


def kind_of(value: Any) -> str:
    """The kind of a JSON value; of a number that is written with a point or an exponent, "number"."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _typed(said: Any) -> frozenset[str]:
    """The kinds that a `type` names; all where it names none."""
    listed = said if isinstance(said, list) else [said]
    named = ANY_KIND.intersection(each for each in listed if isinstance(each, str))
    return named | {"integer"} if "number" in named else named or ANY_KIND


def _referred(reference: str, root: Any) -> Any:
    """What a reference into `root` refers to; None if that is nothing."""
    if not reference.startswith("#"):
        return None
    place = root
    for step in reference[1:].split("/")[1:]:
        place = place.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place
