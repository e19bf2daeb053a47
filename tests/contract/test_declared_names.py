"""A declared name of a JSON object has its schema's value, however the name is spelled: "\\u0073ize" is size."""

import json
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from schema_pairs import suite

from engine.conversation.calls import Tool, allowed, either, forced
from engine.errors import RequestError
from engine.grammars.closed import prepared
from engine.http.grammars import OPENAI_FIELDS
from engine.http.openai.chat import ChatBody
from engine.params.grammar import Grammar
from engine.plugin.registry import Plugins, resolve
from engine.plugin.specs import GrammarEngine

PLUGINS = Plugins.load()
NAMES = ("size", "größe", '6"', "a\\b", "a/b", "日本", "😀", "\u2028", " ", "a\nb", "\x01", "\x7f", "\ue000")
HERMES = resolve(PLUGINS.entries("parsers")["hermes"].target).syntax
INTEGER = {"type": "integer"}
SIZE: dict[str, Any] = {"type": "object", "properties": {"size": INTEGER}}
ESCAPED = r"\u0073ize"


def usual(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)[1:-1]


def spellings(name: str) -> Iterator[str]:
    """`name` between its quotes: as it is, in ASCII, all in escapes, its first or last character in them."""
    halves = [f"{half:04x}" for half in memoryview(name.encode("utf-16-le")).cast("H")]
    escapes = [rf"\u{half}" for half in halves]
    yield from (usual(name), json.dumps(name)[1:-1], usual(name).replace("/", r"\/"), "".join(escapes))
    yield "".join(rf"\u{half.upper()}" for half in halves)
    if name.isascii():
        yield from (escapes[0] + usual(name[1:]), usual(name[:-1]) + escapes[-1])


@cache
def engine_of(name: str) -> GrammarEngine:
    pytest.importorskip(name)
    made: GrammarEngine = suite.made(name)
    return made


def takes(grammar: Grammar, *texts: str, engine: str = "llguidance") -> list[bool]:
    made = engine_of(engine)
    compiled = made.compile(prepared(grammar))
    return [suite.follows(made, compiled, text) for text in texts]


def loose(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema), strict=False)


REST: list[dict[str, Any]] = [
    {},
    {"additionalProperties": {}},
    {"additionalProperties": {"type": "string"}},
    {"patternProperties": {"^x-": {"type": "string"}}},
    {"patternProperties": {"^x-": {"type": "string"}}, "additionalProperties": False},
]


@pytest.mark.parametrize("rest", REST, ids=str)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_declared_name_in_every_spelling(name: str, rest: dict[str, Any]) -> None:
    grammar = loose({"type": "object", "properties": {name: INTEGER, "last": {}}, **rest})
    assert takes(grammar, f'{{"{usual(name)}": 1}}', '{"last": [1]}') == [True, True]
    for spelling in spellings(name):
        assert json.loads(f'{{"{spelling}": "big"}}') == {name: "big"}
        wrong = [f'{{"{spelling}": "big"}}', f'{{"{usual(name)}": 1, "{spelling}": "big"}}']
        assert takes(grammar, *wrong) == [False, False], spelling


@pytest.mark.parametrize("rest", REST[:-1], ids=str)
def test_undeclared_names_have_their_usual_spelling(rest: dict[str, Any]) -> None:
    grammar = loose({**SIZE, **rest})
    names = ("", "siz", "sizes", "Size", 'say "a"', "a\\b", r"\u0073ize", "größe", "日本", "😀", "a/b", "a\n")
    assert takes(grammar, *(f'{{"size": 1, "{usual(name)}": "b"}}' for name in names)) == [True] * len(names)
    assert takes(grammar, '{"gr\\u00f6\\u00dfe": "b"}', '{"a\\/b": "b"}') == [False, False]


def test_a_name_that_a_pattern_matches_in_every_spelling() -> None:
    for rest in (True, {"type": "string"}):
        grammar = loose({"type": "object", "patternProperties": {"^x-": INTEGER}, "additionalProperties": rest})
        right = takes(grammar, '{"x-a": 1}', '{"xa": "b"}', '{"x-größe": 1}')
        wrong = takes(grammar, '{"x-a": "b"}', '{"\\u0078-a": "b"}', '{"x\\u002da": "b"}')
        assert (right, wrong) == ([True] * 3, [False] * 3)
    both = {"properties": {"a\nb": {"maximum": 5}}, "patternProperties": {r"^a[\s\S]b$": INTEGER}}
    for rest in (True, False):
        grammar = loose({"type": "object", **both, "additionalProperties": rest})
        wrong = (r'{"a\nb": 6}', r'{"a\u000ab": 6}', r'{"a\u000Ab": 6}', r'{"\u0061xb": "b"}')
        assert takes(grammar, r'{"a\nb": 5}', r'{"axb": 6}', *wrong) == [True, True] + [False] * 4


@pytest.mark.parametrize("names", [{"pattern": "^[a-z]*$"}, {"enum": ["a", "size"]}, {"maxLength": 4}], ids=str)
def test_names_that_have_a_schema(names: dict[str, Any]) -> None:
    grammar = loose({"type": "object", "propertyNames": names, "additionalProperties": INTEGER})
    texts = ('{"size": 1}', '{"size": "b"}', f'{{"{ESCAPED}": "b"}}', r'{"\u0041BCDE": 1}', r'{"ABCDE": 1}')
    assert takes(grammar, *texts) == [True] + [False] * 4


def test_words_in_every_spelling() -> None:
    """Some spelling of a word in an `enum` or `const` is taken, and none of another word."""
    for word in NAMES:
        for schema, form in (({"enum": [word, 1]}, '"%s"'), ({"const": {"in": word}}, '{"in": "%s"}')):
            assert any(takes(loose(schema), *(form % spelling for spelling in spellings(word)))), word
            others = [form % spelling for other in NAMES if other != word for spelling in spellings(other)]
            assert not any(takes(loose(schema), *others)), word


PLACES: list[tuple[dict[str, Any], str]] = [
    ({"type": "object", "properties": {"in": SIZE}}, '{"in": REPLY}'),
    ({"type": "object", "properties": {"in": {"type": "array", "items": SIZE}}}, '{"in": [REPLY], "a": 1}'),
    ({"type": "object", "additionalProperties": SIZE}, '{"any": REPLY}'),
    ({"anyOf": [{"type": "null"}, SIZE]}, "REPLY"),
    ({"$ref": "#/$defs/size", "$defs": {"size": SIZE}}, "REPLY"),
    ({**SIZE, "required": ["size"]}, "REPLY"),
    ({**SIZE, "allOf": [{"required": ["size"]}]}, "REPLY"),
    ({**SIZE, "anyOf": [{"required": ["size"]}, {"properties": {"b": INTEGER}}]}, "REPLY"),
    (
        {"allOf": [SIZE, {"properties": {"b": INTEGER}}, {"additionalProperties": {"type": ["integer", "string"]}}]},
        "REPLY",
    ),
    ({"allOf": [SIZE, {"patternProperties": {"^b": INTEGER}}]}, "REPLY"),
    ({"$ref": "#/$defs/size", "properties": {"b": {}}, "$defs": {"size": SIZE}}, "REPLY"),
    ({"additionalProperties": True, "anyOf": [{"required": ["more"]}, {"properties": {"b": {}}}], **SIZE}, "REPLY"),
    ({"properties": {"size": INTEGER}}, "REPLY"),
    ({**SIZE, "required": ["size"], "minProperties": 2}, "REPLY"),
]


@pytest.mark.parametrize(("schema", "place"), PLACES, ids=str)
def test_objects_in_every_place(schema: dict[str, Any], place: str) -> None:
    right, wrong = '{"size": 1, "more": "x"}', f'{{"size": 1, "more": "x", "{ESCAPED}": "big"}}'
    texts = [place.replace("REPLY", reply) for reply in (right, wrong, wrong.replace('"size": 1, ', ""))]
    assert takes(loose(schema), *texts) == [True, False, False]


def test_a_name_that_may_not_be_there() -> None:
    texts = ('{"a": 1}', '{"size": 1}', f'{{"{ESCAPED}": 1}}')
    assert takes(loose({"type": "object", "properties": {"size": False}}), *texts) == [True, False, False]


def test_which_names_come_twice() -> None:
    texts = ('{"size": 1, "size": 1}', '{"size": 1, "a": 1, "a": "x"}')
    for rest in ({}, {"additionalProperties": {"type": ["integer", "string"]}}):
        assert takes(loose({**SIZE, **rest}), *texts) == [False, True]
    assert takes(loose({"type": "object", "minProperties": 2}), '{"a": 1}', '{"a": 1, "a": 1}') == [False, True]


def chat(format: dict[str, Any]) -> Grammar:
    """What a body of OpenAI's API with that `response_format` asks for."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "response_format": format}
    grammar, _ = OPENAI_FIELDS.asked(msgspec.convert(body, ChatBody))
    assert grammar is not None
    return grammar


def test_response_formats() -> None:
    texts = ('{"size": 1}', '{"size": 1, "more": "x"}', '{"size": "big"}', f'{{"{ESCAPED}": "big"}}')
    for strict, more in ((True, False), (None, False), (False, True)):
        grammar = chat({"type": "json_schema", "json_schema": {"name": "s", "schema": SIZE, "strict": strict}})
        assert takes(grammar, *texts) == [True, more, False, False]
    opened = {**SIZE, "additionalProperties": True}
    grammar = chat({"type": "json_schema", "json_schema": {"name": "s", "schema": opened, "strict": True}})
    assert takes(grammar, *texts) == [True, True, False, False]
    assert takes(chat({"type": "json_object"}), *texts[:3]) == [True] * 3


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("rest", [True, {"type": "string"}], ids=str)
def test_arguments_of_tools(strict: bool, rest: Any) -> None:
    tools = [Tool("f", {**SIZE, "additionalProperties": rest}, strict=strict), Tool("g", SIZE, strict=strict)]
    asked = [forced(tools, HERMES, parallel=True), either(tools, HERMES, loose(SIZE), parallel=True)]
    asked += [grammar for grammar in [allowed(tools, HERMES)] if grammar]
    assert len(asked) == 2 + strict
    for grammar in asked:
        calls = [
            HERMES.beginning("f") + arguments + HERMES.end
            for arguments in (
                '{"size": 1, "more": "x"}',
                f'{{"size": 1, "{ESCAPED}": "big"}}',
                f'{{"{ESCAPED}": "big"}}',
            )
        ]
        assert takes(grammar, *calls) == [True, False, False]


def test_a_schema_in_lark() -> None:
    for rest in ({}, {"additionalProperties": {"type": "string"}}):
        for own in ({}, {"x-guidance": {"key_separator": ":"}}):
            grammar = Grammar("lark", f"start: %json {json.dumps({**SIZE, **rest, **own})}")
            texts = ('{"size":1,"a":"b"}', f'{{"{ESCAPED}":"big"}}')
            assert takes(grammar, *texts) == [True, False]


def test_control_characters_beside_open_objects() -> None:
    """A plain open object takes them in strings. Where the whole schema goes without them, one that has to come is
    refused."""
    free = {"type": "object", "properties": {"s": {"type": "string"}}}
    texts = ('{"s": "\\u0003"}', '{"a": "\\u0003"}', '{"s": "\\b\\f\\n\\r\\t"}')
    assert takes(loose(free), *texts) == [True] * 3
    assert takes(loose({**free, "additionalProperties": {"type": "string"}}), *texts) == [False, False, True]
    for word in ("\x03", ["a", "\x7f"]):
        schema = {"properties": {"s": {"const": word}}, "additionalProperties": {"type": "string"}}
        assert takes(loose({**schema, "additionalProperties": True})) == []
        with pytest.raises(RequestError, match="const has a control character") as caught:
            takes(loose(schema))
        assert caught.value.code == "unsupported_keyword"
    for word in ("\n\\u0003", r"\u0003"):
        schema = {"properties": {"s": {"const": word}}, "additionalProperties": {"type": "string"}}
        assert takes(loose(schema), json.dumps({"s": word})) == [True]


def test_xgrammar_refuses_open_objects_and_holds_closed_ones() -> None:
    for rest in REST[:-1]:
        with pytest.raises(RequestError, match="xgrammar cannot enforce") as caught:
            takes(loose({**SIZE, **rest}), engine="xgrammar")
        assert caught.value.code == "unsupported_keyword"
    closed = loose({"type": "object", "properties": dict.fromkeys(NAMES, INTEGER), "additionalProperties": False})
    for name in NAMES:
        for value, taken in (("1", True), ('"big"', False)):
            texts = [f'{{"{spelling}": {value}}}' for spelling in spellings(name)]
            assert any(takes(closed, *texts, engine="xgrammar")) == taken, name


LETTERS = ("a", "b", "/", '"', "\\", "é", "😀", "\n", "\x01")


def test_no_spelling_makes_a_wrong_reply_right() -> None:
    """Made-up schemas and replies, before a second judge."""
    rng, made = random.Random(0), engine_of("llguidance")
    counts = {"taken": 0, "wrong": 0}
    for _ in range(250):
        names = ["".join(rng.choices(LETTERS, k=rng.randint(1, 2))) for _ in range(3)]
        schema = {
            "type": "object",
            "properties": {name: rng.choice([INTEGER, {"type": "string"}]) for name in names[:2]},
        }
        schema |= rng.choice(REST) | rng.choice([{}, {"patternProperties": {"^a": INTEGER}}])
        validator = jsonschema_rs.validator_for(schema)
        compiled = suite.compiled(made, schema)
        for _ in range(6):
            values = rng.choices(("1", '"x"'), k=3)
            pairs = [f'"{rng.choice([*spellings(name)])}":{value}' for name, value in zip(names, values, strict=True)]
            text = "{" + ",".join(rng.sample(pairs, rng.randint(1, 3))) + "}"
            valid = validator.is_valid(json.loads(text))
            if suite.follows(made, compiled, text):
                assert valid, (schema, text)
                counts["taken"] += 1
            counts["wrong"] += not valid
    assert counts["taken"] > 100 and counts["wrong"] > 500, counts
