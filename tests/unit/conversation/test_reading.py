"""What a conversation makes of its replies, without HTTP: grammars of calls, and where reasoning ends."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from http_front import text_of

from engine.conversation.calls import Tool, allowed, either, forced
from engine.conversation.parts import read_messages
from engine.conversation.reading import Reading, Wanted, reading_of
from engine.errors import RequestError
from engine.params.grammar import Grammar
from engine.params.sampling import SamplingParams
from engine.plugin import Vocabulary
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.parsing import JSON_LIST, Call, ToolParser
from engine.plugin.registry import Plugins, resolve

HI = [{"role": "user", "content": "hi"}]
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
THINKING = PLAIN + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [Tool("f", SCHEMA), Tool("g-2")]
STRICT = [Tool("f", SCHEMA, strict=True), Tool("g-2")]
ANSWER = Grammar(
    "json_schema",
    '{"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": false}',
)
Accepts = Callable[[Grammar, str], bool]
PARSERS = {
    name: resolve(entry.target) for name, entry in Plugins.load().entries("parsers").items() if entry.kind == "tool"
}  # fmt: skip


@pytest.fixture(params=["llguidance", "xgrammar"])
def accepts(request: pytest.FixtureRequest) -> Accepts:
    """Whether a text is a whole reply of a grammar, by an engine and a vocabulary of bytes."""
    pytest.importorskip(request.param)
    vocabulary = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>"], frozenset([256]), (256,))
    engine = resolve(Plugins.load().entries("grammars")[request.param].target)(vocabulary, threads=1, whitespace=True)

    def whole(grammar: Grammar, text: str) -> bool:
        matcher = engine.compile(grammar).matcher()
        return all(engine.accept([matcher], [token])[0] for token in (*text.encode(), 256))

    return whole


def right_and_wrong(syntax: Any) -> tuple[list[str], list[str]]:
    """Replies that call tools, and such as do not, or not as they should."""
    one, two, other = Call("f", '{"a": 1}'), Call("g-2", "{}"), Call("h", "{}")
    right = [syntax.write([one]), syntax.write([two, one, two])]
    wrong = ["", "Hi.", f"Hi.{right[0]}", syntax.write([other]), syntax.write([Call("f", "{}")]), right[0][:-1]]
    return right, [*wrong, syntax.write([Call("f", '{"a": 1, "b": 2}')]), syntax.write([Call("g-2", '{"a": 1}')])]


@pytest.mark.parametrize("name", PARSERS)
def test_a_forced_reply_is_calls_and_nothing_else(name: str, accepts: Accepts) -> None:
    syntax = PARSERS[name].syntax
    right, wrong = right_and_wrong(syntax)
    grammar = forced(TOOLS, syntax, parallel=True)
    assert [text for text in right if not accepts(grammar, text)] == []
    assert [text for text in wrong if accepts(grammar, text)] == []
    single = forced(TOOLS, syntax, parallel=False)
    assert [accepts(single, text) for text in right] == [True, False]
    assert not accepts(forced(TOOLS[1:], syntax, parallel=True), right[0])


@pytest.mark.parametrize("name", PARSERS)
def test_a_free_reply_that_calls_a_strict_tool_fits_its_schema(name: str, accepts: Accepts) -> None:
    syntax = PARSERS[name].syntax
    grammar = allowed(STRICT, syntax)
    if not syntax.trigger:
        assert grammar is None
        return
    assert grammar is not None and allowed(TOOLS, syntax) is None
    right, _ = right_and_wrong(syntax)
    loose = syntax.write([Call("g-2", '{"any": [1]}')])
    assert all(accepts(grammar, text) for text in ("", "Hi.", right[0], f"Hi.\n{right[0]}\nBye.", loose))
    assert not accepts(grammar, "Hi." + syntax.write([Call("f", '{"a": "one"}')]))


@pytest.mark.parametrize("name", PARSERS)
def test_calls_or_another_format(name: str, accepts: Accepts) -> None:
    right, wrong = right_and_wrong(PARSERS[name].syntax)
    grammar = either(TOOLS, PARSERS[name].syntax, ANSWER, parallel=True)
    single = grammar.kind == "json_schema"
    assert all(accepts(grammar, text) for text in (*right[: 1 if single else 2], '{"x": true}'))
    assert not any(accepts(grammar, text) for text in (*wrong, '{"x": 1}', right[0] + '{"x": true}'))
    digits = either(TOOLS, PARSERS[name].syntax, Grammar("regex", "[0-9]+"), parallel=True)
    assert accepts(digits, "42") and accepts(digits, right[0]) and not accepts(digits, "x")
    with pytest.raises(RequestError, match="ebnf and tools exclude each other"):
        either(TOOLS, PARSERS[name].syntax, Grammar("ebnf", "root ::= 'a'"), parallel=True)
    if single:
        with pytest.raises(RequestError, match="a schema with \\$ref and tools exclude each other"):
            either(TOOLS, PARSERS[name].syntax, Grammar("json_schema", '{"$ref": "#"}'), parallel=True)


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_forced_is_what_is_read(name: str) -> None:
    from engine.conversation.parsers import assembled

    parser: type[ToolParser] = PARSERS[name]
    made = parser(["f", "g-2"], {"f": SCHEMA, "g-2": None})
    right, _ = right_and_wrong(parser.syntax)
    found = assembled([*made.feed(right[1]), *made.finish()])
    assert [(call.name, call.arguments) for call in found.calls] == [("g-2", "{}"), ("f", '{"a": 1}'), ("g-2", "{}")]
    assert found.content == ""


def test_a_family_without_a_syntax_of_its_own_is_forced_to_json() -> None:
    assert PARSERS["pythonic"].syntax is JSON_LIST


# ── a request ────────────────────────────────────────────────────────────────────────────────


def reading(template: str, reasoner: str | None, wanted: Wanted, sampling: SamplingParams, **options: Any) -> Reading:
    return reading_of(text_of(template, "hermes", reasoner), sampling, read_messages(HI), options, wanted)


FREE = SamplingParams()
JSON = SamplingParams(json_schema="{}")
FORCED = Wanted(TOOLS, "required")


@pytest.mark.parametrize("asked", [(Wanted(), JSON), (FORCED, FREE), (Wanted(STRICT), FREE), (Wanted(TOOLS), JSON)])
def test_a_grammar_begins_after_the_reasoning(asked: tuple[Wanted, SamplingParams]) -> None:
    for template, reasoner, kwargs, after, opening in (
        (PLAIN, None, {}, "", ""),
        (THINKING, "qwen3", {}, "</think>", "<think>\n"),  # opened, so that its end will come
        (THINKING, "qwen3", {"enable_thinking": True}, "</think>", "<think>\n"),
        (THINKING, "qwen3", {"enable_thinking": False}, "", ""),
        (PLAIN + "<think>\n", "qwen3", {}, "</think>", ""),
        (PLAIN + "<think>\n", "deepseek-r1", {}, "</think>", ""),
        (PLAIN, "deepseek-r1", {}, "</think>", ""),
        (PLAIN, "qwen3", {}, "", ""),  # no switch: it reasons only if it wants to, and so not here
        (PLAIN + "</think>", "deepseek-r1", {}, "", ""),
    ):
        found = reading(template, reasoner, *asked, template_kwargs=kwargs)
        assert found.grammar is not None
        assert (found.grammar.after, found.opening) == (after, opening), (template, reasoner, kwargs)


def test_without_a_grammar_the_prompt_stays_as_the_template_writes_it() -> None:
    found = reading(THINKING, "qwen3", Wanted(TOOLS), FREE)
    assert (found.grammar, found.opening, found.opened) == (None, "", None)


def test_a_continued_message_says_itself_whether_it_is_reasoning() -> None:
    text = text_of(THINKING, None, "qwen3")
    for said, opened in (("<think>\nHm", True), ("<think>Hm</think>Y", False), ("Yes", False)):
        messages = [*HI, {"role": "assistant", "content": said}]
        found = reading_of(text, FREE, read_messages(messages), {"continue_final_message": True}, Wanted())
        assert found.opened is opened


def test_where_a_call_is_forced_the_format_has_no_say() -> None:
    beside, alone = reading(PLAIN, None, FORCED, JSON), reading(PLAIN, None, FORCED, FREE)
    assert beside.grammar == alone.grammar is not None
    assert beside.grammar_names("response_format") == {"grammar": "tools"}


def test_nothing_to_read() -> None:
    for wanted in (Wanted(), Wanted(TOOLS, "none")):
        found = reading(PLAIN, None, wanted, FREE)
        assert found.reader() is None and found.job == {
            "sampling": FREE,
            "tools": None,
            "opening": "",
            "show_marks": False,
        }
    found = reading(THINKING, "qwen3", Wanted(), SamplingParams(detokenize=False))
    assert found.reader() is None
    assert reading_of(None, FREE, read_messages(HI), {}, FORCED).reader() is None  # still loading: refused later


def test_special_tokens_that_are_marks_stay_in_the_text() -> None:
    from tokenizers import AddedToken

    from engine.conversation.parsers import Parsers
    from engine.text.tokenizer import Text

    spec = open_checkpoint(Plugins.load(), "echo").text()
    spec.tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True), AddedToken("[OTHER]", special=True)])
    text = Text(spec, None, Parsers(PARSERS["mistral"]))
    ids = [97, 257, 258, 98]
    assert text.decode(ids, skip_special_tokens=False) == "a[TOOL_CALLS][OTHER]b"
    for marks, skip, said in (
        (False, True, "ab"),
        (True, True, "a[TOOL_CALLS]b"),
        (True, False, "a[TOOL_CALLS][OTHER]b"),
    ):
        reply = text.reply(show_marks=marks, skip_special_tokens=skip)
        assert reply.push(ids) + reply.flush() == said


def test_the_source_of_a_grammar_is_json() -> None:
    for grammar in (forced(TOOLS, JSON_LIST, parallel=True), either(TOOLS, JSON_LIST, ANSWER, parallel=False)):
        assert msgspec.json.decode(grammar.source)["type"] == grammar.kind == "structural_tag"
