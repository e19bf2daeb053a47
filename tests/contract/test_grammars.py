"""Every grammar engine against one contract: what it lets through is what is right, token by token."""

import importlib.util
import json

import numpy as np
import pytest

from engine.errors import RequestError
from engine.params.grammar import Grammar, GrammarKind
from engine.plugin.hookspecs import GrammarEntry
from engine.plugin.registry import Plugins, resolve
from engine.plugin.testing import (
    GRAMMAR_CASES,
    INVALID,
    GrammarCase,
    check_grammar,
    check_invalid,
    check_together,
    check_whitespace,
)
from engine.testing.grammars import vocabulary

ENTRIES = [
    pytest.param(
        entry, id=entry.name, marks=pytest.mark.skipif(importlib.util.find_spec(entry.package) is None, reason="")
    )
    for entry in Plugins.load().entries("grammars").values()
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", GRAMMAR_CASES, ids=str)
def test_what_is_let_through_is_what_is_right(entry: GrammarEntry, case: GrammarCase) -> None:
    if case.kind not in entry.kinds:
        pytest.skip(f"{entry.name} does not take a {case.kind}")
    if not check_grammar(resolve(entry.target), case):
        pytest.skip(f"{entry.name} refuses a keyword of it")


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("threads", [1, 3])
def test_matchers_are_asked_together_as_alone(entry: GrammarEntry, threads: int) -> None:
    check_together(resolve(entry.target), threads)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("kind", "source"), INVALID)
def test_what_is_invalid_is_refused(entry: GrammarEntry, kind: GrammarKind, source: str) -> None:
    if kind not in entry.kinds:
        pytest.skip(f"{entry.name} does not take a {kind}")
    check_invalid(resolve(entry.target), kind, source)


@pytest.mark.parametrize("entry", ENTRIES)
def test_whitespace_is_bounded(entry: GrammarEntry) -> None:
    check_whitespace(resolve(entry.target))


ODD = '\x00\t\x7f\x85\u2028é"\\'  # characters that Lark takes in no literal as they are, among others


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("choice", json.dumps([ODD, "b"])),
        ("structural_tag", json.dumps({"type": "structural_tag", "format": {"type": "const_string", "value": ODD}})),
        ("ebnf", 'root ::= "\x00\t\x7f\x85\u2028é\\"" [\\\\] # "\t'),
    ],
)
def test_a_literal_may_hold_any_character(kind: GrammarKind, source: str) -> None:
    pytest.importorskip("llguidance")
    case = GrammarCase(kind=kind, source=source, right=(ODD,), wrong=("", ODD[:-1], ODD.replace("\x85", "\x86")))
    assert check_grammar(resolve(Plugins.load().entries("grammars")["llguidance"].target), case)


EBNF: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    (r'"\u00e9\u0041\x42\U00000043"', ("éABC",), ("e9ABC",)),
    (r'"\U0001F600\U0010ffff"', ("😀\U0010ffff",), ("😀",)),
    (r'"\"\\\[\]\n\r\t\u0022\u005c\u000a\x7f"', ('"\\[]\n\r\t"\\\n\x7f',), ("",)),
    (r"[\u00e0-\u00ff]", ("à", "é", "ÿ"), ("e", "-", "\xdf")),
    (r"[\U0001F600-\U0001F64F]", ("😀", "🙏"), ("🙐", "😀😀")),
    (r"[^\u0061-\u007a]", ("A", "é", "\n"), ("a", "z")),
    (r"[\]a]", ("]", "a"), ("\\",)),
    (r"[a\-z]", ("a", "-", "z"), ("b",)),
    (r"[-a]", ("-", "a"), ("b",)),
    (r"[a-]", ("-", "a"), ("b",)),
    (r"[+--]", ("+", ",", "-"), (".",)),
    (r"[a&&b]", ("a", "b", "&"), ("c",)),
    (r"[~~\^]", ("~", "^"), ("a",)),
    (r"[a^]", ("a", "^"), ("b",)),
    (r"[[/]", ("[", "/"), ("]",)),
    (r"[\x41-\x43\n\"]", ("A", "C", "\n", '"'), ("D", "n", "\\")),
    (r"[#\u0023]", ("#",), ("2",)),
]


@pytest.mark.parametrize(("rule", "right", "wrong"), EBNF, ids=str)
@pytest.mark.parametrize("kind", ["ebnf", "structural_tag"])
def test_what_escapes_of_gbnf_mean(
    kind: GrammarKind, rule: str, right: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    pytest.importorskip("llguidance")
    source = f"root ::= {rule} # [é"
    if kind == "structural_tag":
        source = json.dumps({"type": "structural_tag", "format": {"type": "grammar", "grammar": source}})
    case = GrammarCase(kind=kind, source=source, right=right, wrong=("", *wrong))
    assert check_grammar(resolve(Plugins.load().entries("grammars")["llguidance"].target), case)


@pytest.mark.parametrize(
    "rule", [r'"\q"', r'"\u12"', r'"\ud800"', r'"\U00110000"', r"[\q]", r"[\ud83d-\ude00]", r'"\xg1"']
)
def test_an_escape_of_gbnf_that_is_none_is_refused(rule: str) -> None:
    engine = resolve(Plugins.load().entries("grammars")["llguidance"].target)(vocabulary(), threads=1, whitespace=True)
    with pytest.raises(RequestError, match="llguidance does not take the ebnf"):
        engine.compile(Grammar("ebnf", f"root ::= {rule}"))


LARK: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    (r'start: "%json {" %json {"pattern": "^[a&&b]$", "type": "string"} // %json {', ('%json {"&"',), ('%json {"c"',)),
    (
        'start: /%json \\{\\d\\}/ %json {\n "type": "string",\n "format": "date"} "!"',
        ('%json {1}"2024-02-29"!',),
        ('%json {1}"2023-02-29"!',),
    ),
    (
        'start: %json {"const": "/"} | %json {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}',
        ('"/"', "0.1"),
        ("0",),
    ),
]


@pytest.mark.parametrize(("source", "right", "wrong"), LARK, ids=str)
def test_a_schema_within_lark_is_held_to_as_alone(source: str, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    pytest.importorskip("llguidance")
    case = GrammarCase(kind="lark", source=source, right=right, wrong=wrong)
    assert check_grammar(resolve(Plugins.load().entries("grammars")["llguidance"].target), case)


def test_an_ambiguous_grammar_is_given_up_before_it_holds_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, where it is first seen: in the compiler, or in the row that comes to it. Here the vocabulary is
    small, and so the bound."""
    module = pytest.importorskip("engine_plugins.grammars.llguidance.engine")
    monkeypatch.setattr(module, "MOST_ITEMS", 100)
    words = vocabulary()
    made = resolve(Plugins.load().entries("grammars")["llguidance"].target)(words, threads=1, whitespace=True)
    masks = np.zeros((1, -(-len(words.tokens) // 32)), np.int32)
    matcher = made.compile(Grammar("lark", "start: s\ns: s s | s s s | /[a-z ]/ | /[ -~]/")).matcher()
    for _ in range(40):
        made.fill([matcher], masks, [0])
        if matcher.error:
            break
        assert made.accept([matcher], [ord("a")]) == [True]
    assert "items" in matcher.error


@pytest.mark.parametrize("name", ["const", "enum", "default", "examples", "properties", "format"])
def test_a_property_may_be_called_as_a_keyword_is(name: str) -> None:
    """Its schema is one: the odd count and the format that nobody knows in it are read as everywhere."""
    exact = pytest.importorskip("engine_plugins.grammars.llguidance.json_exact").exact
    schema = {"type": "string", "maxLength": 2.0, "format": "colour"}
    whole = {"type": "object", "properties": {name: schema}, "additionalProperties": False, "const": schema}
    wanted = {name: {"type": "string", "maxLength": 2}}
    assert exact(whole) == {**whole, "properties": wanted}
