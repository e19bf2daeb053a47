"""Rewrites a JSON schema so that llguidance enforces it exactly, or refuses it.

llguidance reads numbers as doubles, its expressions are Rust's, and its formats allow some invalid texts. So this
module checks numbers (json_numbers.py), translates `pattern` (ecma.py), and turns a `format` into the expressions of
formats.py; unknown formats are annotations, as in JSON Schema. Left out: dropping keywords that forbid nothing, which
engine/grammars/simpler.py does.
"""

import re
from typing import Any

from engine_plugins.grammars.llguidance.ecma import Unheld, whole_string
from engine_plugins.grammars.llguidance.formats import FORMATS
from engine_plugins.grammars.llguidance.json_numbers import check, merges, with_bounds

COUNTED = frozenset({"Length", "Items", "Properties"})
VALUES = frozenset({"enum", "const", "default", "examples"})  # no schemas
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})  # schemas by name
OLD_DRAFT = re.compile(r"draft-0[0-3]\b")


def exact(schema: Any) -> Any:
    """`schema` for llguidance. Raises Unheld naming the keyword that cannot be enforced exactly."""
    return _exact(schema, merges(schema))


def _exact(schema: Any, merging: bool) -> Any:
    if isinstance(schema, list):
        return [_exact(each, merging) for each in schema]
    if not isinstance(schema, dict):
        return schema
    _check(schema)
    schema = with_bounds(schema, merging=merging)
    format, pattern = schema.get("format"), schema.get("pattern")
    replaced = {name for name, text in (("format", format), ("pattern", pattern)) if isinstance(text, str)}
    written = {name: _keyword(name, value, merging) for name, value in schema.items() if name not in replaced}
    patterns = [f"^{whole_string(pattern)}$"] if isinstance(pattern, str) else []
    known = FORMATS.get(format) if isinstance(format, str) else None
    if known is not None:
        patterns += [f"^(?:{expression})$" for expression in known[0]]
        if known[1] is not None and _is_count(written.get("maxLength", known[1])):
            written["maxLength"] = min(known[1], written.get("maxLength", known[1]))
    if patterns:
        written["pattern"] = patterns[0]
    if len(patterns) > 1:
        written["allOf"] = [*written.get("allOf", []), *({"pattern": each} for each in patterns[1:])]
    return written


def _keyword(name: str, value: Any, merging: bool) -> Any:
    """The `value` of a schema's keyword. The keys of some are no keywords, but the client's names."""
    if name == "patternProperties" and isinstance(value, dict):
        return {f"^{whole_string(pattern)}$": _exact(schema, merging) for pattern, schema in value.items()}
    if name in NAMED and isinstance(value, dict):
        return {key: _exact(schema, merging) for key, schema in value.items()}
    if name in VALUES:
        return value
    return int(value) if _whole(name, value) else _exact(value, merging)


def _check(schema: dict[str, Any]) -> None:
    check(schema)
    if isinstance(draft := schema.get("$schema"), str) and OLD_DRAFT.search(draft):
        why = f"$schema is {draft[:80]}, whose keywords are others"
        raise Unheld(why, "write it in draft 4 or a later one", "unsupported_keyword")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(name: str, value: Any) -> bool:
    """Whether `value` is a count that is written as 2.0."""
    return name.startswith(("min", "max")) and name[3:] in COUNTED and isinstance(value, float) and value.is_integer()
