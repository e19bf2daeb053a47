"""Rewrites a JSON schema so that llguidance enforces it exactly, or refuses it.

llguidance reads numbers as doubles, its expressions are Rust's, its formats allow some invalid texts, and it takes a
declared name that is written in escapes for another name. So this module checks numbers (json_numbers.py), translates
`pattern` (ecma.py), turns a `format` into the expressions of formats.py, and gives names one spelling (json_names.py).
Unknown formats are annotations, as in JSON Schema. Left out: dropping keywords that forbid nothing, which
engine/grammars/simpler.py does.
"""

import re
from typing import Any, NamedTuple

from engine_plugins.grammars.llguidance.ecma import Unheld, whole_string
from engine_plugins.grammars.llguidance.formats import FORMATS
from engine_plugins.grammars.llguidance.json_names import escapes, with_names
from engine_plugins.grammars.llguidance.json_numbers import check, merges, with_bounds

COUNTED = frozenset({"Length", "Items", "Properties"})
VALUES = frozenset({"enum", "const", "default", "examples"})  # no schemas
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})  # schemas by name
OLD_DRAFT = re.compile(r"draft-0[0-3]\b")


class Whole(NamedTuple):
    """What is known of the whole schema: whether bounds may meet, and whether names need a pattern."""

    merging: bool
    naming: bool


def exact(schema: Any) -> Any:
    """`schema` for llguidance. Raises Unheld naming the keyword that cannot be enforced exactly."""
    options = escapes(schema)
    written = _exact(schema, Whole(merges(schema), naming=not options))
    if options:
        own = written.get("x-guidance")
        written["x-guidance"] = {**own, **options} if isinstance(own, dict) else options
    return written


def _exact(schema: Any, whole: Whole) -> Any:
    if isinstance(schema, list):
        return [_exact(each, whole) for each in schema]
    if not isinstance(schema, dict):
        return schema
    _check(schema)
    schema = with_bounds(schema, merging=whole.merging)
    format, pattern = schema.get("format"), schema.get("pattern")
    replaced = {name for name, text in (("format", format), ("pattern", pattern)) if isinstance(text, str)}
    written = {name: _keyword(name, value, whole) for name, value in schema.items() if name not in replaced}
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
    return with_names(written) if whole.naming else written


def _keyword(name: str, value: Any, whole: Whole) -> Any:
    """The `value` of a schema's keyword. The keys of some are no keywords, but the client's names."""
    if name == "patternProperties" and isinstance(value, dict):
        return {f"^{whole_string(pattern)}$": _exact(schema, whole) for pattern, schema in value.items()}
    if name in NAMED and isinstance(value, dict):
        return {key: _exact(schema, whole) for key, schema in value.items()}
    if name in VALUES:
        return value
    return int(value) if _whole(name, value) else _exact(value, whole)


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
