"""What clients are told of grammars that llguidance does not take: what is wrong, in their words and no others."""

import json
from typing import Any

import pytest

from engine.errors import RequestError
from engine.params.grammar import Grammar, GrammarKind
from engine.plugin.registry import Plugins, resolve
from engine.plugin.specs import GrammarEngine
from engine.testing.grammars import vocabulary

OURS = ("no_forcing", "x-guidance", "whitespace_pattern", "coerce_one_of", "lenient", "(And (", "r0", " | ", "in regex")


@pytest.fixture(scope="module")
def engine() -> GrammarEngine:
    pytest.importorskip("llguidance")
    made: GrammarEngine = resolve(Plugins.load().entries("grammars")["llguidance"].target)(
        vocabulary(), threads=1, whitespace=True
    )
    return made


def refused(engine: GrammarEngine, kind: GrammarKind, source: str) -> RequestError:
    with pytest.raises(RequestError) as raised:
        engine.compile(Grammar(kind, source))
    message = raised.value.message
    assert message.startswith((f"llguidance does not take the {kind}: ", f"the {kind} "))
    assert "; " in message and "\n   " not in message, "it ends with a remedy, and quotes no text of ours"
    assert not [ours for ours in OURS if ours in message]
    return raised.value


def says(kind: GrammarKind, what: str, remedy: str = "correct it") -> str:
    return f"llguidance does not take the {kind}: {what}; {remedy}"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("a/(b", "unclosed group: '(' in 'a/(b'"),
        (r"\d[z-a]", r"invalid character class range, the start must be <= the end: 'z-a' in '\d[z-a]'"),
        ("(?=é)b", "look-around, including look-ahead and look-behind, is not supported: '(?=' in '(?=é)b'"),
        ("x\n(", "unclosed group: '(' in 'x\n('"),
        ("[", "unclosed character class: '['"),
        ("a{99999999999}", "a number is too large: 99999999999"),
    ],
)
def test_of_an_expression(engine: GrammarEngine, source: str, what: str) -> None:
    assert refused(engine, "regex", source).message == says("regex", what)


@pytest.mark.parametrize("source", [r"\bé/b", "a^b", "(?m)^a$", r"a\Bb"])
def test_of_an_expression_that_looks_around(engine: GrammarEngine, source: str) -> None:
    what = rf"look-around, such as \b, or ^ and $ inside, is not supported: '{source}'"
    assert refused(engine, "regex", source).message == says("regex", what, "leave it out")
    lark = refused(engine, "lark", f"start: /{source.replace('/', '')}/").message
    assert "$ inside, is not supported; leave it out" in lark and "line 1, column 8" in lark


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ('root ::= "a" nowhere', "Rule 'nowhere' not found"),
        ("root = a", "Expected ::= at line 1, 'root ' ^ '= a'"),
        ('root ::= x\nx ::= "b" [z-a]', "invalid character class range, the start must be <= the end: 'z-a'"),
        ('root ::= "a"{3,1}', "range end must be >= start, got (3, 1)"),
    ],
)
def test_of_ebnf(engine: GrammarEngine, source: str, what: str) -> None:
    assert refused(engine, "ebnf", source).message == says("ebnf", what)


@pytest.mark.parametrize("name", ["a_b", "A-B", "start"])
def test_of_rules_that_have_one_name_here(engine: GrammarEngine, name: str) -> None:
    source = f'root ::= a-b {name}\na-b ::= "a"\n{name} ::= "b"'
    message = refused(engine, "ebnf", source).message
    assert "A_B" not in message and "two of its rules" in message and message.endswith("rename one")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("start: nowhere", "line 1, column 8, in 'start: nowhere': unknown name: \"nowhere\""),
        ('// first\n\nstart: A\nA: "é" /(/', "line 4, column 4, in 'A: \"é\" /(/': unclosed group: '('"),
        ('start: "a" "b', 'line 1, column 14, in \'start: "a" "b\': lexer error'),
        ('%llguidance {"x": 1}\nstart: no', "line 2, column 8, in 'start: no': unknown name: \"no\""),
        ("start: A\n%llguidance {}\nA: B", "line 3, column 4, in 'A: B': unknown name: \"B\""),
        ("start: <foo>", "line 1, column 8, in 'start: <foo>': unknown special token: \"<foo>\""),
        ('start: "a" %json {"type": 3}', "type must be a string or array of strings"),
        ('start: b %json {\n"const":\n1}\nb: no', "line 4, column 4, in 'b: no': unknown name: \"no\""),
    ],
)
def test_of_lark_in_its_own_lines(engine: GrammarEngine, source: str, what: str) -> None:
    message = refused(engine, "lark", source).message
    assert message == says("lark", what) or message.endswith(f": {what}; correct it")


def test_of_a_schema_in_lark(engine: GrammarEngine) -> None:
    source = 'start: x\nx: %json {"const": 1} | %json {"const": 1e30} | %json {"pattern": "(?=a)"}'
    assert "const has the number 1e+30, and beyond" in refused_plainly(engine, "lark", source)
    assert "look-around" in refused_plainly(engine, "lark", source.replace("1e30", "1"))


def test_of_options_of_lark_that_are_no_json(engine: GrammarEngine) -> None:
    message = refused_plainly(engine, "lark", "%llguidance {bad}\nstart: x")
    assert "options of %llguidance are no JSON" in message and "leave the line out" in message


def refused_plainly(engine: GrammarEngine, kind: GrammarKind, source: str) -> str:
    with pytest.raises(RequestError) as raised:
        engine.compile(Grammar(kind, source))
    return raised.value.message


SCHEMAS: list[tuple[Any, str]] = [
    ({"type": "string", "pattern": r"a/\d("}, r"pattern 'a/\d(': unclosed group: '('; correct it"),
    ({"patternProperties": {"a(": {}}}, "pattern 'a(': unclosed group: '('; correct it"),
    ({"pattern": r"\bé/b"}, r"pattern '\bé/b': \b, which looks around, is not supported; leave it out"),
    ({"pattern": "a(?!b)"}, "pattern 'a(?!b)': look-around is not supported: '(?!'; leave it out"),
    ({"pattern": r"(a)\1"}, r"back references, and numbers behind a backslash, are not supported: '\1'; leave it out"),
    ({"pattern": r"\p{Nothing}"}, r"Unicode property not found: '\p{Nothing}'; correct it"),
    (
        {"const": 2**53 + 1},
        "const has the number 9007199254740993, and beyond 9007199254740992 numbers are not told apart"
        "; ask for a string, or pip install xgrammar, which takes 64 bits",
    ),
    ({"patternProperties": {"^a": {}, "b$": {}}}, "where a name may match two patterns; use one pattern"),
    ({"type": "object", "not": {}}, 'Unimplemented keys: ["not"]; leave it out'),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "$ref: Pointer '/$defs/b' does not exist; correct it"),
    ({"enum": []}, "Unsatisfiable schema: enum is empty; correct it"),
    ({"type": "string", "maxLength": 10**12}, "a number is too large: 1000000000000; correct it"),
    ({"type": "strange"}, "Invalid type: strange; correct it"),
    ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "plainly exclude each other; use anyOf"),
    (
        {"type": "string", "format": "email", "maxLength": 2},
        "Unsatisfiable schema: no string has the pattern, format and length that one is to have; correct it",
    ),
]


@pytest.mark.parametrize(("schema", "what"), SCHEMAS)
def test_of_a_schema_and_of_the_same_in_a_structural_tag(engine: GrammarEngine, schema: Any, what: str) -> None:
    content = {"type": "json_schema", "json_schema": schema}
    format = {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}
    tag = json.dumps({"type": "structural_tag", "format": format})
    alone, within = refused(engine, "json_schema", json.dumps(schema)), refused(engine, "structural_tag", tag)
    assert alone.message.endswith(what) and alone.code == within.code
    assert within.message == alone.message.replace("json_schema", "structural_tag", 1)


def test_of_a_schema_that_is_false(engine: GrammarEngine) -> None:
    assert "which no reply fits" in refused_plainly(engine, "json_schema", "false")


CONST = {"type": "const_string", "value": "a"}
TEXT = {"type": "any_text"}
FORMATS: list[tuple[dict[str, Any], str]] = [
    ({"type": "regex", "pattern": "(?=a)"}, "'(?=' in '(?=a)'"),
    ({"type": "sequence", "elements": [CONST, {"type": "regex", "pattern": "[z-a]"}]}, "'z-a' in '[z-a]'"),
    ({"type": "grammar", "grammar": "root ::= [z-a]"}, "'z-a'"),
    ({"type": "grammar", "grammar": "root ::= x"}, "Rule 'x' not found"),
    ({"type": "repeat", "min": 3, "max": 1, "content": CONST}, "got (3, 1)"),
    ({"type": ["tag"]}, "a format has the type ['tag']"),
    ({"type": "token", "token": True}, "True is no special token"),
    ({"type": "or", "elements": []}, "elements of a or is []; it is a list of objects, one at least"),
    ({"type": "tag", "begin": "a", "content": TEXT, "end": []}, "end of a tag is []"),
    ({"type": "triggered_tags", "triggers": [3], "tags": [CONST]}, "triggers of a triggered_tags is [3]"),
    ({"type": "triggered_tags", "triggers": ["a"], "tags": [3]}, "tags of a triggered_tags is [3]"),
    ({"type": "tags_with_separator", "tags": [3], "separator": ","}, "tags of a tags_with_separator is [3]"),
    ({"type": "repeat", "min": True, "max": 2, "content": CONST}, "min of a repeat is true, not a whole number"),
]


@pytest.mark.parametrize(("format", "what"), FORMATS)
def test_of_a_structural_tag(engine: GrammarEngine, format: dict[str, Any], what: str) -> None:
    tag = json.dumps({"type": "structural_tag", "format": format})
    assert what in refused(engine, "structural_tag", tag).message


def test_xgrammar_holds_to_the_schemas_in_a_structural_tag_as_well() -> None:
    pytest.importorskip("xgrammar")
    made = resolve(Plugins.load().entries("grammars")["xgrammar"].target)(vocabulary(), threads=1, whitespace=True)
    for schema in ({"type": "string", "not": {"const": "a"}}, {"properties": {"a": {"const": 2**64}}}):
        content = {"type": "or", "elements": [{"type": "json_schema", "json_schema": schema}, CONST]}
        tag = {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}
        with pytest.raises(RequestError, match="xgrammar cannot enforce"):
            made.compile(Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": tag})))
