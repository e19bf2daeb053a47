"""Calls whose arguments are marked one by one, as Qwen3-Coder and Qwen3.5 write them: read, and forced."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.conversation.calls import Tool, allowed, forced, parameters_in
from engine.conversation.parsers import assembled
from engine.grammars.closed import prepared
from engine.params.grammar import Grammar
from engine.plugin.parsing import CallArguments, CallBegin, Content, ToolParser, kinds_of
from engine.plugin.registry import Plugins, resolve
from engine.plugin.specs import Vocabulary
from engine.plugin.testing import check_any_split
from engine.testing.parsers import parsed

PLUGINS = Plugins.load()
PARSER: type[ToolParser] = resolve(PLUGINS.entries("parsers")["qwen3_coder"].target)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "b": {"type": "boolean"},
        "o": {"$ref": "#/$defs/Deep"},
        "l": {"type": "array", "nullable": True},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["string", "integer"]},
        "any": {},
    },
    "$defs": {"Deep": {"type": "object"}},
}
SCHEMAS: dict[str, dict[str, Any] | None] = {"f": SCHEMA, "g-2": None}


def made() -> ToolParser:
    return PARSER(list(SCHEMAS), SCHEMAS)


def call(inside: str, name: str = "f") -> str:
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def value(key: str, text: str) -> str:
    return f"<parameter={key}>\n{text}\n</parameter>\n"


def told(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """The content and the calls in `text`, however it is cut."""
    found = check_any_split(made, text)
    return found.content, [(each.name, json.loads(each.arguments)) for each in found.calls]


@pytest.mark.parametrize(
    ("key", "text", "is_read"),
    [
        ("s", "12", "12"), ("s", "\n a \n", "\n a \n"), ("s", "", ""), ("s", '"a"\\\t', '"a"\\\t'),
        ("s", "null", "null"),
        ("s", "<b>x</b> <", "<b>x</b> <"), ("s", "a</parameter b", "a</parameter b"),
        ("s", "a<parameter=b>", "a<parameter=b>"), ("s", "a<parameter=i>\n1", "a<parameter=i>\n1"),
        ("s", "x = '</parameter>'\n</function>\n<tool_call>\n", "x = '</parameter>'\n</function>\n<tool_call>\n"),
        ("s", "<parameter=i>\n<parameter=no>\n</tool_call>.", "<parameter=i>\n<parameter=no>\n</tool_call>."),
        ("i", " 12 ", 12), ("i", "twelve", "twelve"), ("i", "NaN", "NaN"), ("b", "true", True), ("b", "False", False),
        ("o", '{"x": [1,\n 2]}', {"x": [1, 2]}), ("o", "{'x': 1}", "{'x': 1}"), ("o", '{"x": 1', '{"x": 1'),
        ("o", '{"\\"x": "</parameter></function>"}', {'"x': "</parameter></function>"}),
        ("l", "[]", []), ("l", "None", None), ("maybe", "null", None), ("maybe", "true", "true"),
        ("maybe", "[1]", "[1]"),
        ("either", "7", 7), ("either", "7.5", "7.5"), ("any", "[1]", [1]), ("any", "a [1]", "a [1]"),
        ("any", "None", "None"), ("undeclared", "12", "12"), ("ü\"", "x", "x"),
    ],
)  # fmt: skip
def test_a_value_is_read_as_the_schema_says(key: str, text: str, is_read: Any) -> None:
    if text.startswith("<parameter=i>"):  # a parameter that has come begins nothing
        found = told(call(value("i", "1") + value(key, text)))
        assert found == ("", [("f", {"i": 1, key: is_read})])
    else:
        assert told(call(value(key, text))) == ("", [("f", {key: is_read})])


A = value("s", "a")
F = [("f", {"s": "a"})]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (call(""), "", [("f", {})]),
        (f"Yes.\n\n{call(A)}\n{call('', 'g-2')}\n\n{call(A)}", "Yes.", [*F, ("g-2", {}), *F]),
        (f"{call(A)}\nDone.", "Done.", F),
        (call(A).replace("<tool_call>\n", ""), "", F),
        ("<function=f>\n" + A + "</function>\n", "", F),
        ("Write <function=name> first.", None, []),  # of no tool that was offered
        (call(value("i", "3"), "other"), "", [("other", {"i": "3"})]),  # whose schema nobody knows
        ("<tool_call>\n<function=>\n</function>", None, []),
        ("<tool_call>\n<function=a b>\n</function>", None, []),
        ("<tool_call> <function=f> <parameter=s>a</parameter> </function> </tool_call>", "", F),
        (call("<parameter=s>\na\n"), "", F),  # ends that are missing
        (call("<parameter=s>\na\n" + value("i", "2")), "", [("f", {"s": "a", "i": 2})]),
        (call(A).replace("</function>\n", ""), "", F),
        (call("<parameter=s>\na\n").replace("</function>\n", ""), "", F),
        (call("<parameter=s>\na\n").replace("</function>\n", "") + "\n" + call(A), "", F * 2),
        ("<tool_call>\n<function=f>\n" + A + "</function>\n" + call(A), "", F * 2),
        (call("oops "), "oops </function>\n</tool_call>", [("f", {})]),
        ('<tool_call>\n{"name": "f", "arguments": {"s": "a"}}\n</tool_call>\n' + call(A), "", F * 2),
    ],
)
def test_replies(text: str, content: str | None, calls: list[Any]) -> None:
    assert told(text) == (text if content is None else content, calls)


def test_of_a_reply_that_is_cut_off_the_arguments_stay_open() -> None:
    whole = call(value("s", 'a\n"b"') + value("i", "12"))
    arguments = '{"s": "a\\n\\"b\\"", "i": 12}'
    begun = whole.index("f>") + 2
    for end in range(len(whole) + 1):
        found = parsed(made(), [whole[:end]])
        assert parsed(made(), list(whole[:end])) == found
        if end < begun:
            assert found.content == whole[:end] and not found.calls
            continue
        assert found.content == "" and arguments.startswith(found.calls[0].arguments), whole[:end]
        assert (found.calls[0].arguments == arguments) == (end >= whole.index("</function>") + len("</function>"))
    assert told(whole) == ("", [("f", {"s": 'a\n"b"', "i": 12})])


def test_what_is_certain_is_told_at_once() -> None:
    parser = made()
    assert parser.feed("Yes. <tool_call>\n<function=f") == [Content("Yes.")]
    begun, brace = parser.feed(">")
    assert isinstance(begun, CallBegin) and begun.name == "f" and brace == CallArguments(0, "{")

    def more(text: str) -> str:
        return "".join(event.text for event in parser.feed(text) if isinstance(event, CallArguments))

    assert [more(text) for text in ("\n<parameter=s>", "\na\n", 'b"<', "/parameter>", "\n<parameter=i>\n1")] == [
        '"s": ', '"a', '\\nb\\"', "", '", "i": ',
    ]  # fmt: skip
    assert [more(text) for text in ("2", "\n</parameter>\n", "</function>")] == ["", "", "12}"]
    assert parser.finish() == []


TEXTS = st.text(st.sampled_from('a "\\\n<>/é漢{}[]=') | st.characters(codec="utf-8"), max_size=12)
VALUES = {
    "s": TEXTS,
    "i": st.integers(),
    "b": st.booleans(),
    "o": st.dictionaries(TEXTS, TEXTS | st.none(), max_size=2),
    "l": st.lists(st.floats(allow_nan=False, allow_infinity=False) | TEXTS, max_size=2),
}
CALLS = st.fixed_dictionaries({}, optional=VALUES)


@settings(max_examples=30)
@given(calls=st.lists(CALLS, min_size=1, max_size=2), cut=st.lists(st.integers(0, 400), max_size=8))
def test_what_is_written_is_what_is_read_in_any_pieces(calls: list[dict[str, Any]], cut: list[int]) -> None:
    marked = PARSER.syntax.marked
    assert marked is not None
    text = "\n".join(marked.written("f", arguments) for arguments in calls)
    places = sorted({min(place, len(text)) for place in cut} | {0, len(text)})
    whole, parser = made(), made()
    events = [event for start, end in pairwise(places) for event in parser.feed(text[start:end])]
    found = assembled([*events, *parser.finish()])
    assert [json.loads(each.arguments) for each in found.calls] == calls and found.content == ""
    once = assembled([*whole.feed(text), *whole.finish()])
    assert [each.arguments for each in once.calls] == [each.arguments for each in found.calls]


# ── what is forced ───────────────────────────────────────────────────────────────────────────

FORCED = {
    "type": "object",
    "properties": {
        "s": {"type": "string", "description": "a text"},
        "unit": {"enum": ["c", "f</b>"]},
        "o": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    },
    "required": ["s", "o"],
}
TEXT, DEEP = value("s", "Zü <b>\n</p"), value("o", '{"x": "</parameter></function>"}')
Accepts = Callable[[Grammar | None, str], bool]


@pytest.fixture(scope="module", params=["llguidance", "xgrammar"])
def accepts(request: pytest.FixtureRequest) -> Accepts:
    """Whether a text is a whole reply of a grammar, by an engine and a vocabulary of bytes."""
    pytest.importorskip(request.param)
    vocabulary = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>"], frozenset([256]), (256,))
    engine = resolve(PLUGINS.entries("grammars")[request.param].target)(vocabulary, threads=1, whitespace=True)

    def whole(grammar: Grammar | None, text: str) -> bool:
        assert grammar is not None
        matcher = engine.compile(prepared(grammar)).matcher()
        return all(engine.accept([matcher], [token])[0] for token in (*text.encode(), 256))

    return whole


def test_a_forced_call_is_written_as_the_family_writes_it(accepts: Accepts) -> None:
    grammar = forced([Tool("f", FORCED), Tool("g-2")], PARSER.syntax, parallel=True)
    right = [
        call(TEXT + DEEP),
        call(TEXT + value("unit", "f</b>") + DEEP + value("maybe", "null")),
        f"{call(TEXT + DEEP)}\n{call('', 'g-2')}",
    ]
    for text in right:
        assert accepts(grammar, text), text
        parser = PARSER(["f", "g-2"], {"f": FORCED, "g-2": None})
        found = assembled([*parser.feed(text), *parser.finish()])
        arguments = json.loads(found.calls[0].arguments)
        assert arguments["s"] == "Zü <b>\n</p" and arguments["o"] == {"x": "</parameter></function>"}
    for text in (
        call(TEXT), call(DEEP + TEXT), call(TEXT + value("unit", "k") + DEEP), call("", "h"),
        call(TEXT + value("o", '{"x": 1}')),
        call(value("s", "a</function>") + DEEP), call(value("s", "a<parameter=") + DEEP), call("", "g-2") + "\n", "Hi.",
        call(value("more", "x"), "g-2"), call(TEXT + DEEP + value("maybe", "a</tool_call>")), call(TEXT + TEXT + DEEP),
    ):  # fmt: skip
        assert not accepts(grammar, text), text


@pytest.mark.parametrize(
    "about",
    [
        {"type": "string", "maxLength": 3}, {"type": "string", "format": "date"}, {"enum": ["a", 1]},
        {"$ref": "#/$defs/x"},
        {"enum": ["</parameter>"]}, {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 3}]}, {"type": "str"},
        {"type": "string", "const": "a", "enum": ["a"]}, False,
    ],
)  # fmt: skip
def test_what_cannot_be_held_exactly_is_forced_as_json(about: Any) -> None:
    schema = {"type": "object", "properties": {"a": about}, "$defs": {"x": {}}, "required": ["a"]}
    del schema["$defs" if about != {"$ref": "#/$defs/x"} else "required"]
    grammar = forced([Tool("f", schema)], PARSER.syntax, parallel=False)
    (tag,) = json.loads(grammar.source)["format"]["tags"]
    assert tag["begin"] == '<tool_call>\n{"name": "f", "arguments": ' and tag["content"]["json_schema"] == schema


def test_open_objects_are_forced_as_json(accepts: Accepts) -> None:
    for schema in ({"type": "object"}, {"properties": {}, "additionalProperties": {"type": "integer"}}):
        grammar = forced([Tool("f", {"type": "object", **schema})], PARSER.syntax, parallel=False)
        assert accepts(grammar, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>')


def test_a_strict_tool_among_others(accepts: Accepts) -> None:
    grammar = allowed([Tool("f", FORCED, strict=True), Tool("g-2")], PARSER.syntax)
    for text in ("Hi <b>", f"Hi {call(TEXT + DEEP)} so", call("<x></functio ", "g-2")):
        assert accepts(grammar, text), text
    for text in (call(TEXT), call("", "h"), "<tool_call>\n{"):
        assert not accepts(grammar, text), text


def test_of_a_forced_call_each_schema_is_known_by_its_tool() -> None:
    grammar = forced([Tool("f", FORCED), Tool("j", {"type": "object"})], PARSER.syntax, parallel=True)
    assert list(parameters_in(grammar)) == [("f", FORCED["properties"]["o"]), ("j", {"type": "object"})]  # type: ignore[index]


def test_kinds_of_schemas() -> None:
    deep = {"$defs": {"a/b": {"type": "number"}, "loop": {"$ref": "#/$defs/loop"}}}
    assert kinds_of({"$ref": "#/$defs/a~1b"}, deep) == {"number", "integer"}
    assert len(kinds_of({"$ref": "#/$defs/loop"}, deep)) == len(kinds_of({"$ref": "http://x/y"}, deep)) == 7
    assert kinds_of({"allOf": [{"type": ["string", "null"]}, {"enum": ["a", 1]}]}, {}) == {"string"}
    assert kinds_of({"oneOf": [{"const": None}, {"type": "array"}]}, {}) == {"null", "array"}
    assert len(kinds_of({"type": 5}, {})) == len(kinds_of(True, {})) == 7
