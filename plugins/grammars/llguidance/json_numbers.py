"""Rewrites the numbers of a JSON schema so that llguidance enforces them exactly, or refuses them.

llguidance reads them as doubles. It allows a whole number that is an exclusive bound, if the other bound is farther
from 0 and less than one away. Next to a bound it wants as many digits as the bound has, which multiples may not have.
So a number that a double cannot tell from its neighbours is refused, and bounds are rewritten for the same numbers.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from engine_plugins.grammars.llguidance.ecma import Unheld

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
WORDS = ("enum", "const")
MOST = 2**53  # beyond it, two whole numbers may be one double, and next to it one that is left out
LEAST = 1e-30  # taken for the number next to 0: a double's own has 324 digits
MOST_NEAR = 64  # up to which the double next to a whole number is told from it
UNHELD = "unsupported_keyword"
MERGING = ("anyOf", "oneOf", "$ref")  # with other keywords beside them, bounds may meet those of another schema


def check(schema: dict[str, Any]) -> None:
    """Raises Unheld for a number that a double does not tell from its neighbours."""
    for name in BOUNDS:
        _check_number(name, schema.get(name))
    for name in WORDS:
        for number in _numbers(schema.get(name)):
            _check_number(name, number)


def _numbers(value: Any) -> Iterator[int | float]:
    """Every number in a JSON value."""
    if isinstance(value, int | float):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _numbers(part)


def _check_number(name: str, value: Any) -> None:
    most = MOST - name.startswith("exclusive")
    if isinstance(value, int | float) and not -most <= value <= most:
        why = f"{name} has the number {str(value)[:40]}, and beyond {most} numbers are not told apart"
        raise Unheld(why, "ask for a string, or pip install xgrammar, which takes 64 bits", "unsupported_grammar")


def merges(schema: Any) -> bool:
    """Whether bounds may meet those of another schema."""
    if isinstance(schema, list):
        return any(map(merges, schema))
    if not isinstance(schema, dict):
        return False
    beside = any(name in schema for name in MERGING) and any(name in schema for name in ("type", "properties", *BOUNDS))
    return beside or "allOf" in schema or any(map(merges, schema.values()))


def with_bounds(schema: dict[str, Any], *, merging: bool) -> dict[str, Any]:
    """`schema` with its bounds rewritten; `merging` is what `merges` says of the whole. Raises Unheld for bounds that
    cannot be rewritten."""
    bounds = {name: schema[name] for name in BOUNDS if _is_number(schema.get(name))}
    step = bounds.get("multipleOf", 1)
    by_parts = len(bounds) > 1 and step > 0 and step != int(step)
    if by_parts:
        bounds = _between_multiples(bounds, Fraction(str(step)))
    for exclusive, inclusive, sign in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
        bound = bounds.get(exclusive)
        if bound is None or bound != int(bound) or sign * bound < 0 or schema.get("type") == "integer":
            continue
        if merging or by_parts or _is_near(bounds, bound, sign):
            if abs(bound) >= MOST_NEAR:
                why = f"{exclusive} {bound} beside bounds that may be near to it is not supported"
                raise Unheld(why, f"use {inclusive}", UNHELD)
            del bounds[exclusive]
            edge = math.nextafter(bound, sign * math.inf) if bound else sign * LEAST
            bounds[inclusive] = sign * max(sign * edge, sign * bounds.get(inclusive, edge))
    return {name: value for name, value in schema.items() if not _is_number(value) or name not in BOUNDS} | bounds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_near(bounds: dict[str, Any], bound: float, sign: int) -> bool:
    """Whether there is a bound on the other side less than one away, from the lower one for `sign` 1."""
    others = ("maximum", "exclusiveMaximum") if sign > 0 else ("minimum", "exclusiveMinimum")
    return any(0 < sign * (bounds[name] - bound) < 1 for name in others if name in bounds)


def _between_multiples(bounds: dict[str, Any], step: Fraction) -> dict[str, Any]:
    """The bounds moved away, to the first multiples of `step` that they leave out."""
    moved: dict[str, Any] = {"multipleOf": bounds["multipleOf"]}
    for inclusive, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        edges = []  # in steps, with `sign` such that more is narrower
        if inclusive in bounds:
            edges.append(math.ceil(sign * Fraction(str(bounds[inclusive])) / step) - 1)
        if exclusive in bounds:
            edges.append(math.floor(sign * Fraction(str(bounds[exclusive])) / step))
        if edges:
            edge = sign * max(edges) * step
            moved[exclusive] = int(edge) if edge.denominator == 1 else float(edge)
    low, high = moved.get("exclusiveMinimum", -math.inf), moved.get("exclusiveMaximum", math.inf)
    if (10 * step).denominator > 1 and low < -step and high > -1:  # a last 0 is not written behind -0
        why = f"multipleOf {bounds['multipleOf']} beside bounds that let numbers from -1 to 0 through is not supported"
        raise Unheld(why, "leave the bounds out", UNHELD)
    return moved
