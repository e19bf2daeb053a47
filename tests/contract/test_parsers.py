"""Every parser of replies keeps the contract, and tells the same of any text however it is cut."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.conversation.parsers import Parsed
from engine.plugin.parsing import Call, ReasoningParser, ToolParser
from engine.plugin.registry import Plugins, resolve
from engine.plugin.testing import check_any_split, check_reasoning_parser, check_tool_parser
from engine.testing.parsers import parsed

ENTRIES = Plugins.load().entries("parsers")
TOOLS = sorted({entry.target: name for name, entry in reversed(ENTRIES.items()) if entry.kind == "tool"}.values())
REASONING = [name for name, entry in ENTRIES.items() if entry.kind == "reasoning"]
NAMES = ["f", "get-weather"]
# What tricky replies are made of: marks and halves of them, JSON and halves of it, names, space.
FRAGMENTS = [
    *(
        '{"name": "f", "arguments": ',
        '{"name": "get-weather", "parameters": {}}',
        '{"arguments": {"a": 1}, "name": "f"}',
    ),
    *('{"a": 1}', '{"a": "', "{", "}", "[", "]", '"', "\\", '\\"', ",", ":", ";", "null", "1.5", "tru", "'", "(", ")"),
    *("f(a=1)", "get-weather(", "a='x'", "[f(", ")]", "=", '"name"', '"arguments"', "f", "g"),
    *("\n", " ", "\r\n", "\t", "é", "漢", "👩‍👩‍👧", "\u2028", "\x00", "﻿", "```json\n", "```", "function"),
]


def parser_of(name: str) -> type:
    parser: type = resolve(ENTRIES[name].target)
    return parser


def marks_of(parser: type) -> list[str]:
    """The marks of a parser, and what they begin and end with."""
    if issubclass(parser, ReasoningParser):
        marks = [parser.start, parser.end]
    else:
        assert issubclass(parser, ToolParser)
        syntax = parser.syntax
        own = (syntax.opening, syntax.beginning("f"), syntax.end, syntax.separator, syntax.closing)
        if (marked := syntax.marked) is not None:
            own = (
                *own,
                marked.begin.replace("NAME", "f"),
                marked.opening.replace("KEY", "a"),
                marked.closing,
                marked.end,
            )
        marks = [mark for mark in (*parser.special, *getattr(parser, "sections", ()), *own) if mark]
    return [part for mark in marks for part in (mark, mark[: len(mark) // 2], mark[len(mark) // 2 :]) if part]


@st.composite
def replies(draw: st.DrawFn, name: str) -> list[str]:
    """A reply in pieces."""
    marks = st.sampled_from(marks_of(parser_of(name)))
    part = st.one_of(marks, marks, st.sampled_from(FRAGMENTS), st.text(max_size=4))
    text = "".join(draw(st.lists(part, max_size=14)))
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_parser_keeps_the_contract(name: str) -> None:
    check_tool_parser(parser_of(name))


@pytest.mark.parametrize("name", REASONING)
def test_a_reasoning_parser_keeps_the_contract(name: str) -> None:
    check_reasoning_parser(parser_of(name))


@pytest.mark.parametrize("name", TOOLS)
@given(data=st.data())
def test_calls_are_the_same_however_they_come(name: str, data: st.DataObject) -> None:
    pieces = data.draw(replies(name))
    text, parser = "".join(pieces), parser_of(name)
    whole = parsed(parser(NAMES), [text])
    assert parsed(parser(NAMES), pieces) == whole
    assert parsed(parser(NAMES), list(text)) == whole
    if not whole.calls:
        assert whole.content == text
    assert is_part_of(whole.content, text)


@pytest.mark.parametrize("name", REASONING)
@given(data=st.data(), opened=st.sampled_from([True, False, None]))
def test_reasoning_is_the_same_however_it_comes(name: str, data: st.DataObject, opened: bool | None) -> None:
    pieces = data.draw(replies(name))
    text, parser = "".join(pieces), parser_of(name)
    whole = parsed(parser(opened), [text])
    assert parsed(parser(opened), pieces) == whole
    assert parsed(parser(opened), list(text)) == whole
    assert is_part_of(whole.reasoning + whole.content, text)
    lost = len(text) - len(whole.reasoning) - len(whole.content)
    assert lost <= len(parser.start) + len(parser.end) + text.count("\n")
    if opened is False:
        assert whole == Parsed(text, "", [])


def is_part_of(less: str, text: str) -> bool:
    """Whether `less` is `text` with some of it left out."""
    rest = iter(text)
    return all(character in rest for character in less)


HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
SECTION, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
FENCED = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>'
ONE = [Call("f", '{"a": 1}')]


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", f"Let me see.\n{HERMES}\n{HERMES}\n", "Let me see.", ONE * 2),
        ("hermes", f"{HERMES}\nDone.", "Done.", ONE),
        ("hermes", HERMES.replace("}}", "}"), "", ONE),  # a bracket forgotten
        ("hermes", HERMES.replace("</tool_call>", ""), "", ONE),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", ONE),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", ONE),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [Call("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [Call("f", "{}")]),
        ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [Call("other", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": oops}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>f(a=1)</tool_call>', None, []),
        ("hermes", f"<tool_call>oops {HERMES}", "<tool_call>oops", ONE),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}} no </tool_call>', "no </tool_call>", ONE),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ', "", [Call("f", '{"a": ')]),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', None, []),
        *(("hermes", HERMES[:-cut], "", ONE) for cut in range(1, 12)),
        ("hermes", f"{HERMES[:-1]} x", "</tool_call x", ONE),
        ("deepseek_v3", f"{SECTION}{FENCED[:-1]}", "", ONE),
        *(("deepseek_v3", f"{SECTION}{FENCED[: FENCED.rindex('`') + at]}", "", ONE) for at in (-2, -1, 0, 1, 2)),
        *(("deepseek_v3", f"{FENCED}{END[:cut]}", "", ONE) for cut in range(1, len(END))),
        ("pythonic", "[f(a=1)]<|python_en", "", ONE),
        ("pythonic", '[{"name": "f", "arguments": {"a": 1}}, ', "", ONE),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, ', "", ONE),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}; ', "", ONE),
        ("llama3_json", ' {"name": "f", "parameters": {"a": 1}}; {"name": "f", "arguments": {"a": 1}}', "", ONE * 2),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", ONE),
        ("llama3_json", 'See:<|python_tag|>{"name": "f", "parameters": {"a": 1}} yes', "See:yes", ONE),
        ("llama3_json", '{"name": "other", "parameters": {}}', None, []),
        ("llama3_json", 'It is {"name": "f", "parameters": {}}', None, []),
        ("llama3_json", "<|python_tag|>print(1)", None, []),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', "", ONE),
        ("mistral", 'Yes.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}', "Yes.", ONE * 2),
        ("mistral", '[TOOL_CALLS]f{"a": 1}', "", ONE),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, 3]', ", 3]", ONE),
        ("mistral", "[TOOL_CALLS] nothing", None, []),
        ("deepseek_v3", f"{SECTION}{FENCED}\n{FENCED}{END}", "", ONE * 2),
        ("deepseek_v3", f"Yes. {FENCED}", "Yes.", ONE),
        ("deepseek_v3", f"{SECTION}{FENCED.replace('```json', '')}{END}", "", ONE),
        ("deepseek_v3", f"{SECTION}nothing{END}", None, []),
        ("deepseek_r1", f"<｜tool▁calls｜>{FENCED}{END}", "", ONE),
        ("deepseek_r1", f"<｜tool calls begin｜>{FENCED}", "", ONE),
        ("deepseek_v31", f'{SECTION}<｜tool▁call▁begin｜>f<｜tool▁sep｜>{{"a": 1}}<｜tool▁call▁end｜>{END}', "", ONE),
        ("pythonic", "[f(a=1)]", "", ONE),
        ("pythonic", "<|python_start|>[f(a=1), f(a=1)]<|python_end|>", "", ONE * 2),
        ("pythonic", "[get-weather(city='Z)\"', on=[True, null, {'k': -1.5}])]", "",
         [Call("get-weather", '{"city": "Z)\\"", "on": [true, null, {"k": -1.5}]}')]),
        ("pythonic", '[f(a=1), f(1)] so', ", f(1)] so", ONE),
        ("pythonic", "[f(a=x)]", None, []),
        ("pythonic", "[f(a=1e999)]", None, []),
        ("pythonic", "[f(a='\\ud800')]", None, []),
        ("pythonic", "[other(a=1)]", None, []),
        ("pythonic", "[f(a=" + "(" * 500 + ")" * 500 + ")]", None, []),
        ("pythonic", "Say [f(a=1)]", None, []),
    ],
)  # fmt: skip
def test_what_families_write(name: str, text: str, content: str | None, calls: list[Call]) -> None:
    found = check_any_split(lambda: parser_of(name)(NAMES), text)
    assert found == Parsed(text if content is None else content, "", calls)


def test_arguments_are_told_as_they_come() -> None:
    for name in TOOLS:
        if name == "pythonic":  # whose calls are told as a whole
            continue
        parser = parser_of(name)(["f"])
        begun = parser.feed(parser.syntax.opening + parser.syntax.beginning("f") + '{"a": "one ')
        assert [event.text for event in begun[1:]] == ['{"a": "one '], name
        assert [event.text for event in parser.feed("two")] == ["two"], name


def test_the_parser_of_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    (source,) = re.findall(r"```python\n(from engine\.plugin\.parsing import .*?)```", guide, re.DOTALL)
    names: dict[str, type[ToolParser]] = {}
    exec(source, names)
    check_tool_parser(names["Angles"])
    found = check_any_split(lambda: names["Angles"](["f"]), 'Yes: <<f {"a": ">>"}>><<g {}>>.')
    assert found == Parsed("Yes:<<g {}>>.", "", [Call("f", '{"a": ">>"}')])


def test_ids() -> None:
    ids = [parser_of("mistral")().new_id() for _ in range(2)]
    assert ids[0] != ids[1] and all(len(id) == 9 and id.isalnum() for id in ids)
    assert parser_of("hermes")().new_id().startswith("call_")


def test_a_hostile_reply_takes_no_quadratic_time() -> None:
    for name in TOOLS:
        for part in (*marks_of(parser_of(name)), '{"a":', '["', "[f(a=", "\\"):
            text = part * (20_000 // len(part))
            pieces = [text[place : place + 5] for place in range(0, len(text), 5)]
            assert parsed(parser_of(name)(["f"]), [text]) == parsed(parser_of(name)(["f"]), pieces)
