r"""Keeps undeclared names of a JSON object apart from declared ones, whose values have schemas of their own.

llguidance knows a declared name in one spelling, and takes any other for an undeclared name. Readers of JSON do not:

    {"properties": {"size": {"type": "integer"}}}      {"\u0073ize": "big"}

So undeclared names get one spelling as well. A pattern does that (`with_names`): llguidance writes strings that have a
pattern without escapes, except for \", \\ and control characters, of which some have several. It cannot stand beside
other patterns, beside a schema of undeclared names, which would hold for declared ones too, or beside declared names
with control characters. There the whole schema goes without \uXXXX (`escapes`), and so its strings without control
characters other than \b, \f, \n, \r and \t.

Left out: undeclared names that come twice, which no grammar of these engines forbids.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from engine_plugins.grammars.llguidance.ecma import ANYTHING, Unheld

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
LONG = re.compile(r"\\u00(?:[01]|7f)")  # in JSON, less its \\: a control character without a short escape
SHORT = {"json_allowed_escapes": 'nrbtf\\"'}  # llguidance's option: what may stand behind a backslash


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value; a property is taken for a keyword of its name, which does no harm here."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(part)


def escapes(schema: Any) -> dict[str, str]:
    """llguidance's options for `schema`; none if `with_names` is enough for all of its objects. Raises Unheld for an
    `enum` or `const` that could not be written."""
    nodes = list(objects(schema))
    named = [node for node in nodes if _declares(node) and _is_open(node)]
    patterns = [node for node in nodes if node.get("patternProperties")]
    meeting = (any(map(_is_open, named + patterns)), bool(patterns), any(map(_has_control, nodes)))
    if sum(meeting) < 2 and all(map(_is_free, named)):
        return {}
    for node in nodes:
        for word in ("enum", "const"):
            if LONG.search(json.dumps(node.get(word)).replace(r"\\", "")):
                why = f"{word} has a control character, and \\uXXXX is kept from undeclared names"
                raise Unheld(why, "leave it out, or set additionalProperties to false", "unsupported_keyword")
    return SHORT


def with_names(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with one spelling of undeclared names, if it declares others. llguidance reads keywords in turn, and
    combines at an `anyOf` what it has read: what is said of names stands together, where `properties` stood."""
    if not _declares(schema) or not _is_free(schema):
        return schema
    rest = {"patternProperties": {f"^{ANYTHING}$": True}, "additionalProperties": False}
    written: dict[str, Any] = {}
    for name, value in schema.items():
        if name not in rest:
            written[name] = value
        if name == "properties":
            written |= rest
    return written


def _declares(schema: dict[str, Any]) -> bool:
    return isinstance(names := schema.get("properties"), dict) and bool(names)


def _is_open(schema: dict[str, Any]) -> bool:
    return schema.get("additionalProperties") is not False


def _is_free(schema: dict[str, Any]) -> bool:
    """Whether undeclared names may have any value."""
    rest = schema.get("additionalProperties", True)
    return rest is True or rest == {}


def _has_control(schema: dict[str, Any]) -> bool:
    """Whether one of its names has a control character."""
    names = [schema.get("properties"), schema.get("required")]
    return any(CONTROL.search(str(name)) for each in names if isinstance(each, dict | list) for name in each)
