"""Tools in chat templates: what a template is able to say, and what is said for it."""

import json
from typing import Any

import pytest
from http_front import text_of
from transformers.utils.chat_template_utils import render_jinja_template

from engine.conversation.parts import read_messages
from engine.conversation.template import Abilities, ChatTemplate
from engine.conversation.tools import introduction
from engine.errors import RequestError
from engine.plugin.registry import Plugins, resolve

HERMES = resolve(Plugins.load().entries("parsers")["hermes"].target).syntax
CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
TOLD = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if 'tool_calls' in m %}{% for c in m.tool_calls %}"
    "[{{ c.function.name }} {{ ARGUMENTS }}]{% endfor %}{% endif %}{% if m.role == 'tool' %}({{ m.name }}){% endif %}"
    "{{ '\\n' }}{% endfor %}"
)
OBJECT = TOLD + CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
TEXT = CALLS.replace("{{ ARGUMENTS }}", "{{ 'of ' + c.function.arguments }}")
ALONE = (
    "{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}"
    "<calls>{{ c.function.name + ' ' + c.function.arguments }}{{ '\\n' }}"
    "{% endfor %}{% else %}<{{ m.role }}>{{ m.content + '\\n' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PAST: list[dict[str, Any]] = [
    {"role": "user", "content": "Do."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "one"},
    {"role": "tool", "tool_call_id": "2", "content": "two"},
    {"role": "assistant", "content": "Done."},
]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, HERMES)


@pytest.mark.parametrize(
    ("source", "abilities"),
    [
        (CHATML, Abilities(tools=False, calls=False, system=True)),
        (OBJECT, Abilities(tools=True, calls=True, system=True)),
        (TEXT, Abilities(tools=False, calls=True, system=True, text_arguments=True)),
        (ALONE, Abilities(tools=False, calls=True, system=True, text_arguments=True, alone=True)),
        (NO_SYSTEM, Abilities(tools=False, calls=False, system=False)),
        ("{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + CHATML, Abilities(False, False, True)),
        ("{{ undefined.attribute }}", Abilities(False, False, False)),
    ],
)
def test_what_a_template_is_able_to_say(source: str, abilities: Abilities) -> None:
    assert template(source).abilities == abilities


def test_a_template_gets_what_it_asks_for() -> None:
    rendered = template(OBJECT).render(read_messages(PAST), tools=[TOOL])
    assert rendered == (
        f'{json.dumps(TOOL)}\n<user>Do.\n<assistant>[f {{"a": "é"}}][g {{}}]\n<tool>one(f)\n<tool>two(g)\n'
        "<assistant>Done.\n"
    )
    assert '[f of {"a": "é"}]' in template(TEXT).render(read_messages(PAST))


def test_calls_that_stand_alone() -> None:
    said = [PAST[0], {**PAST[1], "content": "Yes."}, *PAST[2:4]]
    calls = '<calls>f {"a": "é"}\n<calls>g {}\n<tool>one\n<tool>two\n'
    assert template(ALONE).render(read_messages(said)) == f"<user>Do.\n<assistant>Yes.\n{calls}"
    assert template(ALONE).render(read_messages(PAST[:4])) == f"<user>Do.\n{calls}"


def test_arguments_that_are_no_json_are_passed_on() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{oops"}}
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert template(OBJECT).render(read_messages(said)) == '<assistant>[f "{oops"]\n'
    as_object = {"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}  # as the offline API may have it
    assert '[f of {"a": 1}]' in template(TEXT).render(read_messages([said[0] | {"tool_calls": [as_object]}]))


def test_an_empty_list_of_calls_is_none() -> None:
    said = [{"role": "assistant", "content": "x", "tool_calls": []}]
    assert template("{{ 'tool_calls' in messages[0] }}").render(read_messages(said)) == "False"


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_what_a_template_cannot_say_is_said_in_messages(system: str | None) -> None:
    spoken = [{"role": "system", "content": system}] if system else []
    rendered = template(CHATML).render(read_messages([*spoken, *PAST]), tools=[TOOL])
    words = introduction([TOOL], HERMES)
    assert json.dumps(TOOL["function"]) in words and HERMES.begin.partition("NAME")[0] in words
    begin = f"<system>{system}\n\n{words}" if system else f"<system>{words}"
    assert rendered == (
        f"{begin}\n<user>Do.\n"
        '<assistant><tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
        "<user><tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>\n"
        "<assistant>Done.\n"
    )


def test_without_a_system_role_the_first_message_introduces_the_tools() -> None:
    rendered = template(NO_SYSTEM).render(read_messages(PAST[:1]), tools=[TOOL])
    assert rendered == f"<user>{introduction([TOOL], HERMES)}\n\nDo.\n"


def test_a_template_that_writes_calls_but_tells_of_no_tools() -> None:
    rendered = template(TEXT).render(read_messages(PAST), tools=[TOOL])
    assert introduction([TOOL], HERMES) in rendered and '[f of {"a": "é"}]' in rendered


def test_a_conversation_without_tools_is_left_alone() -> None:
    assert template(CHATML).render(read_messages(PAST[:1])) == "<user>Do.\n"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"tool_calls": "f"}, "has the tool call 'f'"),
        ({"tool_calls": [{"function": {"name": 1}}]}, "has the tool call"),
        ({"tool_calls": [{"function": {"name": "f"}}]}, "a call of 'f' without arguments"),
        ({"tool_calls": [{"id": [], "function": {"name": "f", "arguments": "{}"}}]}, r"a call of 'f' with the id \[\]"),
        ({"tool_call_id": {}}, r"has tool_call_id \{\}"),
    ],
)
def test_malformed_calls_are_refused(message: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        template(OBJECT).render(read_messages([{"role": "assistant", "content": "", **message}]))


@pytest.mark.parametrize("source", [CHATML, OBJECT, ALONE])
@pytest.mark.parametrize("said", ["", "Yes."])
def test_no_reply_goes_on_from_a_call(source: str, said: str) -> None:
    with pytest.raises(RequestError, match="append what the tool returned"):
        template(source).render(read_messages([PAST[0], {**PAST[1], "content": said}]), continue_final_message=True)


@pytest.mark.parametrize("source", [CHATML, OBJECT, ALONE])
def test_a_reply_goes_on_after_calls_and_what_they_returned(source: str) -> None:
    assert (
        template(source)
        .render(read_messages(PAST), tools=[TOOL], continue_final_message=True)
        .endswith("<assistant>Done.")
    )


# ── how a prompt ends ────────────────────────────────────────────────────────────────────────

AFTER_TOOL = (
    CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
    + "{% if messages[-1].role != 'tool' %}<think>{% if over %}</think>\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "messages", "variables", "open"),
    [
        (CHATML, PAST[:1], {}, None),
        (CHATML + "<think>\n", PAST[:1], {}, True),
        (CHATML + "<think>\n\n</think>\n\n", PAST[:1], {}, False),
        (AFTER_TOOL, PAST[:1], {}, True),
        (AFTER_TOOL, PAST[:1], {"over": True}, False),
        (AFTER_TOOL, PAST[:4], {"over": True}, None),
        ("{{ raise_exception('no') }}", PAST[:1], {}, None),
        (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", PAST[:1], {"add": False}, True),
    ],
)
def test_whether_a_prompt_ends_inside_of_reasoning(
    source: str, messages: Any, variables: Any, open: bool | None
) -> None:
    found = template(source).reasoning_open("<think>", "</think>", read_messages(messages), template_kwargs=variables)
    assert found is open


def test_the_text_of_a_model_knows_its_parsers() -> None:
    text = text_of(CHATML, "mistral", "qwen3")
    assert set(text.parsers.special) == {"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<think>", "</think>"}
    assert "[TOOL_CALLS] [" in text.render_chat(read_messages(PAST[:2]))
    assert text.reasoning_open("<think>", "</think>", read_messages(PAST[:1]), chat_template=CHATML + "<think>") is True


# ── the language, as transformers has it ─────────────────────────────────────────────────────

SAID: list[dict[str, Any]] = [{"role": "user", "content": "é <b>"}, {"role": "assistant", "content": " I say "}]
WHOLE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
TRIMMED = WHOLE.replace("m.content", "m.content | trim")
SCOPED = (
    "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.content }}{{ x }}{% endgeneration %}"
    "{{ x }}{% endfor %}{{ x }}"
)


@pytest.mark.parametrize(
    "source",
    [
        WHOLE,
        TRIMMED,
        SCOPED,
        "{{ messages | tojson }}",
        "{{ messages | tojson(4) }}",
        "{{ messages | tojson(true) }}",
        "{{ messages | tojson(false, 2) }}",
        "{{ messages | tojson(false, none, [',', ':']) }}",
        "{{ messages | tojson(false, 2, none, true) }}",
        "{{ messages | tojson(indent=2, sort_keys=true) }}",
        "{{ bos_token }}{{ pad_token }}{% if eos_token is defined %}no{% endif %}",
    ],
)
def test_a_template_renders_as_in_transformers(source: str) -> None:
    tokens = {"bos_token": "<s>", "pad_token": "<pad>"}
    (expected,), _ = render_jinja_template([SAID], chat_template=source, add_generation_prompt=True, **tokens)
    assert ChatTemplate(source, tokens, HERMES).render(read_messages(SAID)) == expected


@pytest.mark.parametrize("source", [WHOLE, TRIMMED, "{{ messages[-1].content.rstrip() }} end", SCOPED])
@pytest.mark.parametrize("begun", ["I say", " I say ", "I say\n\n", "", "  "])
def test_a_message_goes_on_as_in_transformers(source: str, begun: str) -> None:
    messages = [SAID[0], {"role": "assistant", "content": begun}]
    (expected,), _ = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    assert template(source).render(read_messages(messages), continue_final_message=True) == expected


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ messages[-1].content.split('</think>')[-1] }}"])
def test_a_message_that_the_template_cuts_cannot_go_on(source: str) -> None:
    messages = [SAID[0], {"role": "assistant", "content": "<think>a</think>b"}]
    with pytest.raises(ValueError, match="does not appear"):
        render_jinja_template([messages], chat_template=source, continue_final_message=True)
    with pytest.raises(RequestError, match="leaves out the last message, or a part of it"):
        template(source).render(read_messages(messages), continue_final_message=True)
