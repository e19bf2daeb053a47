"""JSON schemas before two judges: the official JSON-Schema-Test-Suite, run whole, and jsonschema_rs on made-up ones.

`make test` unpacks the suite; JSON_SCHEMA_TEST_SUITE names another folder of it (bench/grammars/schema_suite.py).
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from schema_pairs import Maker, suite

from engine.errors import RequestError
from engine.grammars.closed import prepared
from engine.grammars.engines import Engines
from engine.params.grammar import Grammar
from engine.plugin.registry import Plugins

ENGINES = ("llguidance", "xgrammar")
SUITE = Path(os.environ.get("JSON_SCHEMA_TEST_SUITE", Path(sys.prefix) / "json-schema-suite"))


# What the suite knows and we do not hold to, by file: formats are held to where draft 2020-12's main tests call them
# remarks, no reply says what formats.py leaves out, and some formats and contentEncoding are remarks to us.
FORMATS = {"date-time", "time", "email", "hostname"}
REMARKS = {"idn-email", "idn-hostname", "regex", "ecmascript-regex", "content"}


@pytest.mark.skipif(
    not SUITE.exists(), reason=f"{SUITE} does not exist: python -m bench.grammars.schema_suite --fetch {SUITE}"
)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("draft", suite.DRAFTS)
def test_the_official_suite(name: str, draft: str) -> None:
    """Each schema is refused, or right on all of its tests; the table of bench/RESULTS.md says how many."""
    pytest.importorskip(name)
    made = suite.made(name)
    counts: Counter[str] = Counter()
    docs = (Path(__file__).parents[2] / "bench" / "RESULTS.md").read_text()
    for part in suite.PARTS:
        here: Counter[str] = Counter()
        for file in sorted((SUITE / draft / part).glob("*.json")):
            result = suite.run(made, file, suite.DRAFTS[draft])
            here += result.counts
            for wrong in result.wrong:
                if wrong.valid:
                    assert (file.stem == "format" and not part) or (file.stem in FORMATS and part), (file.stem, wrong)
                else:
                    assert file.stem in REMARKS and part, (file.stem, wrong)
        kind = {"": "", "optional": ", optional", "optional/format": ", formats"}[part]
        row = f"| {draft.replace('draft', 'draft ')}{kind}, {name} | "
        if name == "llguidance" or not part:
            assert row + " | ".join(str(here[column]) for column in suite.COLUMNS) + " |" in docs, (row, here)
        counts += here
    assert counts["taken"] > (200 if name == "llguidance" else 60) and counts["valid"] > 120


PAIRS = 2000


@pytest.mark.parametrize("name", ENGINES)
def test_a_second_judge_says_the_same(name: str) -> None:
    """jsonschema_rs of made-up schemas and instances, of each that is not refused."""
    pytest.importorskip(name)
    made = suite.made(name)
    counts: Counter[str] = Counter()
    for seed in range(PAIRS):
        maker = Maker(seed)
        schema = maker.schema()
        instance = maker.near(schema)
        valid = jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(instance)
        try:
            compiled = suite.compiled(made, schema)
        except RequestError:
            counts["refused"] += 1
            continue
        assert suite.lets_through(made, compiled, instance) == valid, (seed, schema, instance, valid)
        counts["valid" if valid else "invalid"] += 1
    least = {"llguidance": (1000, 400, 600), "xgrammar": (700, 150, 1100)}[name]
    assert counts["valid"] > least[0] and counts["invalid"] > least[1] and counts["refused"] < least[2], counts


NUMBERS: list[tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = [
    ({"const": 2**53}, (str(2**53),), (str(2**53 - 1), str(2**53 + 1))),
    ({"type": "integer", "minimum": 2**53 - 2}, (str(2**53 - 2), str(2**53 + 1)), (str(2**53 - 3),)),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.6}, ("0.5", "0.6", "0.001"), ("0", "-0", "0.0", "0.61")),
    ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, ("1.25", "1.0001"), ("1", "1.0", "1.5")),
    ({"type": "number", "minimum": -2.6, "exclusiveMaximum": -2}, ("-2.5", "-2.001"), ("-2", "-2.0", "-2.7")),
    ({"type": "number", "exclusiveMinimum": 0}, ("0.5", "1"), ("0", "0.0", "-0")),
    ({"type": "number", "exclusiveMaximum": 0.95, "multipleOf": 0.1}, ("0.9", "-0.4"), ("0.95", "1", "0.85")),
    (
        {"type": "number", "minimum": -2.5, "maximum": -2, "multipleOf": 0.25},
        ("-2.50", "-2.25", "-2"),
        ("-2.75", "-2.2"),
    ),
    ({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}, ("0", "0.50", "0.75", "1"), ("0.6", "1.25")),
]
BIG = (2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64, 10**20, 10**30, 1e300)


@pytest.mark.parametrize(("schema", "right", "wrong"), NUMBERS, ids=str)
def test_numbers(schema: dict[str, Any], right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    made = suite.made("llguidance")
    compiled = suite.compiled(made, schema)
    assert [text for text in right if not suite.follows(made, compiled, text)] == []
    assert [text for text in wrong if suite.follows(made, compiled, text)] == []


@pytest.mark.parametrize("number", BIG)
@pytest.mark.parametrize("keyword", ["const", "enum", "minimum", "exclusiveMinimum", "maximum", "multipleOf", "nested"])
def test_numbers_that_a_double_does_not_tell_apart_are_refused_or_exact(number: float, keyword: str) -> None:
    schema: dict[str, Any] = {"type": "integer", keyword: [number] if keyword == "enum" else number}
    if keyword == "nested":
        schema = {"properties": {"a": {"anyOf": [{"const": {"b": [1, number]}}, {"type": "null"}]}}}
    with pytest.raises(RequestError, match="numbers are not told apart"):
        suite.compiled(suite.made("llguidance"), schema)
    try:
        pytest.importorskip("xgrammar")
        made = suite.made("xgrammar")
        compiled = suite.compiled(made, schema)
    except RequestError:
        return
    assert isinstance(number, int) and -(2**63) <= number < 2**63 and keyword != "multipleOf"
    if keyword != "nested":
        near = [value for value in range(number - 2, number + 3) if suite.follows(made, compiled, str(value))]
        assert near == {
            "minimum": [number, number + 1, number + 2], "exclusiveMinimum": [number + 1, number + 2],
            "maximum": [number - 2, number - 1, number],
        }.get(keyword, [number])  # fmt: skip


def test_a_number_of_64_bits_is_offered_to_the_next_engine() -> None:
    for name in ENGINES:
        pytest.importorskip(name)
    entries = [Plugins.load().entries("grammars")[name] for name in ENGINES]
    engines = Engines(entries, suite.WORDS, threads=1, whitespace=True)
    for name in ENGINES:
        engines.named(name)
    source = json.dumps({"type": "object", "properties": {"id": {"enum": [175928847299117063]}}, "required": ["id"]})
    name, _ = engines.compile(prepared(Grammar("json_schema", source)))
    assert name == "xgrammar"
