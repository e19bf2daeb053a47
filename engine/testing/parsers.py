"""The contract of parsers of replies, for authors by way of engine.plugin.testing. Torch-free.

def test_my_parser():
    check_tool_parser(MyParser)
    check_any_split(lambda: MyParser(["f"]), "a reply such as the model writes it")
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from engine.conversation.parsers import Parsed, ReplyParser, assembled
from engine.plugin.parsing import Call, Event, ReasoningParser, StreamParser, ToolParser, kind_of

WRITTEN_CALLS: tuple[tuple[Call, ...], ...] = (
    (Call("f", "{}"),),
    (Call("get_weather", '{"city": "Zürich", "days": [1, 2.5e-3, -0], "deep": {"er": null}}'),),
    (Call("f", '{"a": "}]) \\" \\\\ ```\\n</tool_call> [1]; {\\"name\\": \\"g\\"}"}'), Call("g-2", '{"b": true}')),
    (Call("f", '{"漢字": "👩‍👩‍👧 \\u00e9 \u2028"}'), Call("f", "{}"), Call("g-2", '{"": [[], {}]}')),
)


def parsed(parser: StreamParser, pieces: Sequence[str]) -> Parsed:
    """What `parser` makes of a reply that comes in `pieces`; the ids of calls, which differ, are left out."""
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    whole = assembled(events + parser.finish())
    return Parsed(whole.content, whole.reasoning, [Call(call.name, call.arguments) for call in whole.calls])


def cuts(text: str) -> Iterator[list[str]]:
    """`text` in pieces of one to seven characters, and in two pieces at each place."""
    for size in range(1, 8):
        yield [text[place : place + size] for place in range(0, len(text), size)]
    for place in range(len(text) + 1):
        yield [text[:place], text[place:]]


def check_any_split(make: Callable[[], StreamParser], text: str) -> Parsed:
    """However `text` is cut, the parsers that `make` returns tell the same of it; what they tell. Without a call, that
    is all of it."""
    whole = parsed(make(), [text])
    for pieces in cuts(text):
        got = parsed(make(), pieces)
        assert got == whole, f"{pieces!r} is told as {got}, but whole it is {whole}"
    if isinstance(make(), ToolParser) and not whole.calls:
        assert whole.content == text, f"{text!r} holds no call, but is told as {whole.content!r}"
    return whole


def _schemas() -> dict[str, dict[str, Any] | None]:
    """Of the tools that WRITTEN_CALLS call, which say the kind of each argument."""
    schemas: dict[str, dict[str, Any] | None] = {}
    for call in (call for calls in WRITTEN_CALLS for call in calls):
        kinds = {key: {"type": kind_of(value)} for key, value in json.loads(call.arguments).items()}
        before = schemas.get(call.name) or {"properties": {}}
        schemas[call.name] = {"type": "object", "properties": before["properties"] | kinds}
    return schemas


def check_tool_parser(parser: type[ToolParser]) -> None:
    """It reads what its own `syntax` writes, alone and with text before it, in any pieces; of a reply that is cut off
    anywhere nothing is lost before the first call, no part of an end is content, and nothing at all where calls are
    forced; and text is text."""
    schemas = _schemas()

    def make() -> ToolParser:
        return parser(sorted(schemas), schemas)

    def equal(found: Parsed, calls: Sequence[Call]) -> bool:
        if parser.syntax.marked is None:  # its arguments are the model's own JSON
            return found == Parsed("", "", list(calls))
        told = [(call.name, json.loads(call.arguments)) for call in found.calls]
        return not found.content and told == [(call.name, json.loads(call.arguments)) for call in calls]

    def told(reading: ReplyParser, pieces: Sequence[str]) -> Parsed:
        return assembled([event for piece in pieces for event in reading.feed(piece)] + reading.finish())

    for calls in WRITTEN_CALLS:
        written = parser.syntax.write(calls)
        found = check_any_split(make, written)
        assert equal(found, calls), f"{written!r} is told as {found}"
        for end in range(len(written)):
            cut = parsed(make(), [written[:end]])
            assert cut.calls or cut.content == written[:end], f"of {written[:end]!r} only {cut.content!r} is told"
            begun = [call.name for call in cut.calls]
            assert begun == [call.name for call in calls[: len(begun)]], f"{written[:end]!r} is told as {cut}"
            if begun and cut.content:  # of the call that was to come, and of no end
                follows = [parser.syntax.separator + parser.syntax.written(call) for call in calls[len(begun) :]]
                assert any(text.strip().startswith(cut.content.strip()) for text in follows[:1]), (
                    f"{written[:end]!r} has the content {cut.content!r}"
                )
            for pieces in ([written[:end]], list(written[:end])):
                forced = told(ReplyParser(None, make(), forced=True), pieces)
                assert forced.content == "", f"where it is forced, {written[:end]!r} has the content {forced.content!r}"
    for text in ("", " \n", "Hello.", "[1, 2]", '{"a": 1}', "<tool", "[TOOL", "f(x)", "[f", '{"name": "f"', "< ｜ `"):
        assert check_any_split(make, text) == Parsed(text, "", []), f"{text!r} is no call"


def check_reasoning_parser(parser: type[ReasoningParser]) -> None:
    """It tells reasoning from content wherever the prompt leaves it, in any pieces."""
    start, end = parser.start, parser.end
    for opened in (True, False, None):
        make = partial(parser, opened)
        inside = opened or (opened is None and parser.assumed)
        for text, reasoning, content in (
            (f"{start}\nOne <b>\n\ntwo\n{end}\n\nThree {start}", "One <b>\n\ntwo", f"Three {start}"),
            (f"{start}\n\n{end}\n\n4", "", "4"),
            (f"{start}cut off", "cut off", ""),
            *((f"{start}cut\n{end[:at]}", "cut", "") for at in range(1, len(end))),
            (f"{start[:-1]} is {end}no mark", *((f"{start[:-1]} is ", "no mark") if inside else ("", None))),
        ):
            told = check_any_split(make, text)
            marked = check_any_split(partial(parser, opened, marked=True), text)
            assert marked.reasoning + marked.content == text, f"with its marks, {text!r} is told as {marked}"
            if opened is False:
                reasoning, content = "", None
            wanted = Parsed(text if content is None else content, reasoning, [])
            assert told == wanted, f"{text!r} with opened={opened} is told as {told}"
