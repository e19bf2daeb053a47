"""Tools and reasoning over the chat API, as the real openai client sees them; replies are scripted."""

import json
from typing import Any

import msgspec
import pytest
from http_front import FakeFront, chunks, serving, text_of, written
from openai.types.chat import ChatCompletionMessage
from test_http import HI, client, post, stream

from engine.client.client import Client
from engine.errors import RequestError
from engine.messages.reply import Chunk
from engine.messages.request import Generate
from engine.params.sampling import SamplingParams

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKING = PLAIN + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS, "description": "?"}}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
NAMED: Any = {"type": "function", "function": {"name": "get_time"}}
ARGUMENTS = '{"city": "Zürich }", "days": 2}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
CALL_TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


def front(*texts: str, template: str = PLAIN, reasoning: str | None = None, **options: Any) -> FakeFront:
    """A front whose model speaks Hermes' language; it says `texts`."""
    made = FakeFront(chunks(*texts, **options))
    made.text = text_of(template, "hermes", reasoning)
    return made


def pieces(text: str, size: int = 3) -> list[str]:
    return [text[place : place + size] for place in range(0, len(text), size)]


async def talk(made: FakeFront, streamed: bool, **asked: Any) -> tuple[ChatCompletionMessage, str]:
    """The message and the finish reason, from a whole reply or from the events of a stream."""
    asked = {"model": "fake", "messages": HI, **asked}
    async with serving(made) as url, client(url) as api:
        if not streamed:
            (choice,) = (await api.chat.completions.create(**asked)).choices
            return choice.message, choice.finish_reason
        async with api.chat.completions.stream(**asked) as events:
            (choice,) = (await events.get_final_completion()).choices
            return choice.message, choice.finish_reason


def said(message: ChatCompletionMessage) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


def grammar_of(asked: Generate) -> dict[str, Any]:
    assert asked.grammar is not None and asked.grammar.kind == "structural_tag"
    return msgspec.json.decode(asked.grammar.source)["format"]


# ── tool_choice ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("streamed", [False, True])
async def test_auto_with_calls(streamed: bool) -> None:
    made = front(*pieces(f"One moment.\n{CALL}\n{CALL_TIME}"))
    message, finish = await talk(made, streamed, tools=TOOLS)
    assert (message.content, finish) == ("One moment.", "tool_calls")
    assert said(message) == [("get_weather", ARGUMENTS), ("get_time", "{}")]
    assert json.loads(ARGUMENTS)["city"] == "Zürich }"
    ids = [call.id for call in message.tool_calls or ()]
    assert len(set(ids)) == 2 and all(id.startswith("call_") for id in ids)
    (asked,) = made.asked
    assert asked.grammar is None and asked.show_marks
    assert asked.tools is not None and [tool["function"]["name"] for tool in asked.tools] == ["get_weather", "get_time"]
    assert asked.tools[0] == WEATHER


@pytest.mark.parametrize(("streamed", "choice"), [(True, "auto"), (False, "required")])
async def test_a_family_that_marks_arguments_reads_them_by_the_schema(streamed: bool, choice: Any) -> None:
    """The prompt opens the reasoning, as Qwen3.5's does."""
    values = "<parameter=city>\n12\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    call = f"<tool_call>\n<function=get_weather>\n{values}</function>\n</tool_call>"
    made = FakeFront(chunks(*pieces(f"Hm.\n</think>\n\n{call}")))
    made.text = text_of(PLAIN + "<think>\n", "qwen3_coder", "qwen3")
    message, finish = await talk(made, streamed, tools=TOOLS, tool_choice=choice)
    assert said(message) == [("get_weather", '{"city": "12", "days": 2}')]
    assert (message.content or None, finish) == (None, "tool_calls")
    assert getattr(message, "reasoning_content", "Hm.") == "Hm."
    (asked,) = made.asked
    if choice == "required":
        assert asked.grammar is not None and asked.grammar.after == "</think>"
        assert [tag["begin"] for tag in grammar_of(asked)["tags"]] == [
            "<tool_call>\n<function=get_weather>\n",
            "<tool_call>\n<function=get_time>\n",
        ]


@pytest.mark.parametrize("streamed", [False, True])
async def test_auto_without_a_call(streamed: bool) -> None:
    for text in ("It is 5 < 6.", "<tool_call> is a mark", CALL.replace('"name"', '"nome"')):
        message, finish = await talk(front(*pieces(text)), streamed, tools=TOOLS, tool_choice="auto")
        assert (message.content, message.tool_calls, finish) == (text, None, "stop")


@pytest.mark.parametrize("streamed", [False, True])
async def test_none_reads_no_calls_and_tells_of_no_tools(streamed: bool) -> None:
    made = front(*pieces(CALL))
    message, finish = await talk(made, streamed, tools=TOOLS, tool_choice="none")
    assert (message.content, message.tool_calls, finish) == (CALL, None, "stop")
    assert (made.asked[0].tools, made.asked[0].grammar, made.asked[0].show_marks) == (None, None, False)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "function": {"name": "get_weather"}}])
async def test_half_an_end_is_no_content(streamed: bool, choice: Any) -> None:
    """Of a reply that is cut off anywhere; where calls are forced, half a beginning is none either."""
    begun = CALL.index(ARGUMENTS)
    made = front()
    ask: dict[str, Any] = {"model": "fake", "messages": HI, "tools": TOOLS, "tool_choice": choice, "stream": streamed}
    async with serving(made) as url, client(url) as api:
        for end in range(1 if choice != "auto" else begun + 1, len(CALL)):
            made.script = chunks(*pieces(CALL[:end]), finish="length")
            answer = await api.chat.completions.create(**ask)
            if streamed:
                parts = [event.choices[0].delta async for event in answer]
                calls = [call.function.name for part in parts for call in part.tool_calls or () if call.function.name]
                content = "".join(part.content or "" for part in parts)
            else:
                calls, content = (
                    [name for name, _ in said(answer.choices[0].message)],
                    answer.choices[0].message.content,
                )
            assert (content or None, calls) == (None, ["get_weather"] * (end > begun)), CALL[:end]


@pytest.mark.parametrize("streamed", [False, True])
async def test_required(streamed: bool) -> None:
    made = front(*pieces(f"{CALL}\n{CALL_TIME}"))
    message, finish = await talk(made, streamed, tools=TOOLS, tool_choice="required")
    assert (message.content or None, finish, len(said(message))) == (None, "tool_calls", 2)
    calls = grammar_of(made.asked[0])
    assert (calls["type"], calls["at_least_one"], calls["stop_after_first"]) == ("tags_with_separator", True, False)
    first, second = calls["tags"]
    assert first["begin"] == '<tool_call>\n{"name": "get_weather", "arguments": '
    assert first["content"] == {"type": "json_schema", "json_schema": PARAMETERS}
    assert second["content"]["json_schema"] == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_named_tool(streamed: bool) -> None:
    made = front(*pieces(CALL_TIME))
    message, finish = await talk(made, streamed, tools=TOOLS, tool_choice=NAMED)
    assert (message.content or None, finish, said(message)) == (None, "tool_calls", [("get_time", "{}")])
    calls = grammar_of(made.asked[0])
    assert calls["stop_after_first"] and [tag["begin"] for tag in calls["tags"]] == [CALL_TIME.partition("{}")[0]]
    assert len(made.asked[0].tools or ()) == 2  # the model is told of all


@pytest.mark.parametrize("streamed", [False, True])
async def test_no_parallel_calls(streamed: bool) -> None:
    made = front(*pieces(f"{CALL}\n{CALL_TIME}\nDone."))
    message, _ = await talk(made, streamed, tools=TOOLS, parallel_tool_calls=False)
    assert (message.content, said(message)) == ("Done.", [("get_weather", ARGUMENTS)])
    await talk(made, streamed, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert grammar_of(made.asked[1])["stop_after_first"]


async def test_strict_tools_are_held_to_their_schema_without_being_forced() -> None:
    made = front("Hi.")
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    await talk(made, False, tools=[strict, TIME])
    calls = grammar_of(made.asked[0])
    assert (calls["type"], calls["triggers"]) == ("triggered_tags", ["<tool_call>"])
    assert [tag["content"]["json_schema"] for tag in calls["tags"]] == [PARAMETERS, {"type": "object"}]


async def test_the_events_of_a_call() -> None:
    async with serving(front(*pieces(CALL))) as url:
        *events, done = await stream(url + CHAT, {"messages": HI, "tools": TOOLS})
    assert done == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    (begin,), *more = (delta["tool_calls"] for delta in deltas[1:-1])
    assert (begin["index"], begin["type"], begin["function"]) == (
        0,
        "function",
        {"name": "get_weather", "arguments": ""},
    )
    assert all(set(delta) == {"index", "function"} and delta["index"] == 0 for (delta,) in more)
    assert len(more) > 5 and "".join(delta["function"]["arguments"] for (delta,) in more) == ARGUMENTS


async def test_each_choice_has_calls_of_its_own() -> None:
    made = front(*pieces(CALL))
    async with serving(made) as url, client(url) as api:
        answer = await api.chat.completions.create(model="fake", messages=HI, tools=TOOLS, n=3)
        events = await api.chat.completions.create(model="fake", messages=HI, tools=TOOLS, n=3, stream=True)
        finishes = {choice.index: choice.finish_reason async for event in events for choice in event.choices}
    assert finishes == dict.fromkeys(range(3), "tool_calls")
    ids = {choice.message.tool_calls[0].id for choice in answer.choices}
    assert len(ids) == 3 and [said(choice.message) for choice in answer.choices] == [[("get_weather", ARGUMENTS)]] * 3


async def test_a_call_that_is_cut_off_ends_by_length() -> None:
    message, finish = await talk(front(CALL[:60], finish="length"), False, tools=TOOLS)
    assert (finish, said(message)) == ("length", [("get_weather", ARGUMENTS[: 60 - CALL.index(ARGUMENTS)])])


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_ends_by_calls_only_if_they_are_whole(streamed: bool) -> None:
    whole = CALL.removesuffix("\n</tool_call>")
    second = f"{CALL}\n{CALL_TIME[: CALL_TIME.index('}')]}"
    for text, reason in ((CALL[:60], "stop"), (second, "stop"), (whole, "tool_calls")):
        made = front(*pieces(text), finish="stop", matched="</tool_call>")
        _, finish = await talk(made, streamed, tools=TOOLS)
        assert finish == reason, text


async def test_logprobs_go_with_the_first_event_of_a_chunk() -> None:
    from engine.messages.reply import TokenLogprob

    scored = [
        msgspec.structs.replace(chunk, logprobs=(TokenLogprob(1, "x", b"x", -0.5),)) for chunk in chunks(*pieces(CALL))
    ]
    made = front()
    made.script = list(scored)
    async with serving(made) as url:
        body = {"messages": HI, "tools": TOOLS, "logprobs": True}
        whole = (await post(url + CHAT, body))[1]["choices"][0]["logprobs"]["content"]
        *events, _ = await stream(url + CHAT, body)
    told = [json.loads(event)["choices"][0] for event in events]
    streamed = [token for choice in told if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert streamed == whole and len(whole) == len(scored)


# ── messages ─────────────────────────────────────────────────────────────────────────────────

PAST: list[Any] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
]


async def test_past_calls_reach_the_template() -> None:
    made = front("Sunny.")
    message, _ = await talk(made, False, messages=PAST, tools=TOOLS)
    assert message.content == "Sunny."
    assert written(made.asked[0]) == [
        PAST[0],
        {"role": "assistant", "content": "", "tool_calls": PAST[1]["tool_calls"]},
        PAST[2],
    ]


async def test_a_reply_comes_back_as_it_was_sent() -> None:
    made = front(CALL)
    message, _ = await talk(made, False, tools=TOOLS)
    answered = [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in message.tool_calls or ()]
    await talk(made, False, messages=[*HI, message.model_dump(), *answered], tools=TOOLS)
    assert said(ChatCompletionMessage.model_validate(written(made.asked[1])[1])) == said(message)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"tools": [{}]}, "tools[0]", "missing required field `function`"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type", "'custom'"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name", "matching regex"),
        ({"tools": [{"function": {"name": "f", "colour": 1}}]}, "tools[0].function.colour", "unknown field"),
        ({"tools": [TIME, TIME]}, "tools[1]", "'get_time'"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters", "'string'; arguments come by name"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": NAMED}, "tool_choice", "'get_time', which is no tool of the request; its tools: none at all"),
        ({"tool_choice": NAMED, "tools": [WEATHER]}, "tool_choice", "its tools: get_weather"),
        ({"tool_choice": "any", "tools": TOOLS}, "tool_choice", "'any'"),
        ({"tools": TOOLS, "detokenize": False}, "detokenize", "read from the text"),
        ({"functions": [{"name": "f"}]}, "functions", "send tools"),
        ({"function_call": {"name": "f"}}, "function_call", "send tool_choice"),
        ({"messages": [{"role": "assistant", "function_call": {}}]}, "messages[0].function_call", "send tool_calls"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role", "'function'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "send the id"),
        ({"messages": [{**HI[0], "tool_call_id": "y"}]}, "messages[0].tool_call_id", "role tool"),
        ({"messages": [{**PAST[1], "role": "user", "content": "x"}]}, "messages[0].tool_calls", "role assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0]", "`function`"),
    ],
)  # fmt: skip
async def test_bad_requests(body: dict[str, Any], param: str, says: str) -> None:
    made = front("x")
    async with serving(made) as url:
        status, answer = await post(url + CHAT, {"messages": HI, **body})
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert says in answer["error"]["message"] and not made.asked


async def test_a_server_without_a_tool_parser() -> None:
    made = front(CALL)
    made.text = text_of(PLAIN)
    message, finish = await talk(made, False, tools=TOOLS)
    assert (message.content, finish) == (CALL, "stop") and made.asked[0].tools
    async with serving(made) as url:
        status, answer = await post(url + CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": "required"})
    assert (status, answer["error"]["code"]) == (400, "unsupported_parameter")
    assert "--tool-parser none" in answer["error"]["message"]


# ── reasoning ────────────────────────────────────────────────────────────────────────────────

THOUGHT = "<think>\nHm <b>.\n</think>\n\nYes."
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


async def reasoned(made: FakeFront, streamed: bool, **asked: Any) -> tuple[str | None, str | None]:
    """The reasoning and the content; None where there is no such field."""
    async with serving(made) as url:
        if not streamed:
            message = (await post(url + CHAT, {"messages": HI, **asked}))[1]["choices"][0]["message"]
            return message.get("reasoning_content"), message["content"]
        *events, _ = await stream(url + CHAT, {"messages": HI, **asked})
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    thoughts = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    return "".join(thoughts) or None, "".join(delta.get("content", "") for delta in deltas)


@pytest.mark.parametrize("streamed", [False, True])
async def test_reasoning_is_told_apart(streamed: bool) -> None:
    made = front(*pieces(THOUGHT, 2), template=THINKING, reasoning="qwen3")
    assert await reasoned(made, streamed) == ("Hm <b>.", "Yes.")
    assert made.asked[0].show_marks and made.asked[0].opening == ""
    assert await reasoned(made, streamed, separate_reasoning=False) == (None, THOUGHT)
    assert await reasoned(made, streamed, **NO_THINKING) == (None, THOUGHT)  # the template says that it is over
    made = front(*pieces("Just this."), template=THINKING, reasoning="qwen3")
    assert await reasoned(made, streamed) == (None, "Just this.")


@pytest.mark.parametrize("streamed", [False, True])
async def test_reasoning_that_the_prompt_has_opened(streamed: bool) -> None:
    for name in ("qwen3", "deepseek-r1"):
        made = front(*pieces("Hm.\n</think>\n\nYes."), template=PLAIN + "<think>\n", reasoning=name)
        assert await reasoned(made, streamed) == ("Hm.", "Yes.")
    made = front("Hm.", template=PLAIN, reasoning="deepseek-r1")
    assert await reasoned(made, streamed) == ("Hm.", "")  # cut off before its end


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_call_after_reasoning(streamed: bool) -> None:
    made = front(*pieces(f"<think>\nNot {CALL_TIME}\n</think>\n\n{CALL}"), template=THINKING, reasoning="qwen3")
    message, finish = await talk(made, streamed, tools=TOOLS)
    assert (said(message), finish) == ([("get_weather", ARGUMENTS)], "tool_calls")
    assert message.model_extra and message.model_extra["reasoning_content"] == f"Not {CALL_TIME}"


@pytest.mark.parametrize("streamed", [False, True])
async def test_reasoning_that_stays_in_the_content_holds_no_calls(streamed: bool) -> None:
    thought = f"<think>\n{CALL_TIME}\n</think>\n\n"
    made = front(*pieces(thought + CALL), template=THINKING, reasoning="qwen3")
    message, _ = await talk(made, streamed, tools=TOOLS, extra_body={"separate_reasoning": False})
    assert (message.content, said(message)) == (thought, [("get_weather", ARGUMENTS)])
    assert not message.model_extra


async def test_reasoning_goes_back_to_the_template() -> None:
    made = front("x", template=THINKING, reasoning="qwen3")
    spoken: list[Any] = [{"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, *HI]
    await talk(made, False, messages=spoken)
    assert written(made.asked[0]) == spoken


@pytest.mark.parametrize("streamed", [False, True])
async def test_reasoning_tokens(streamed: bool) -> None:
    made = front(template=THINKING, reasoning="qwen3")
    assert made.text is not None
    made.text.id_of = {"<think>": 901, "</think>": 902}.get  # type: ignore[method-assign,assignment]
    parts = [("<think>", [901]), ("Hm", [1, 2]), (".</think>Y", [3, 902, 4]), ("es.", [5])]
    counts = {"prompt_tokens": 7, "cached_tokens": 4, "completion_tokens": 7}
    made.script = [Chunk("r", text, ids, None, None, **counts) for text, ids in parts]
    made.script.append(Chunk("r", "", [2], "stop", 2, **counts))
    asked: Any = {"messages": HI, "stream": streamed} | (
        {"stream_options": {"include_usage": True}} if streamed else {}
    )
    async with serving(made) as url:
        if streamed:
            usage = json.loads((await stream(url + CHAT, asked))[-2])["usage"]
        else:
            usage = (await post(url + CHAT, asked))[1]["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}


async def test_a_response_format_beside_tools_and_reasoning() -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    made = front("{}", template=THINKING, reasoning="qwen3")
    await talk(made, False, tools=TOOLS, response_format=schema)
    await talk(made, False, response_format=schema)
    both, alone = (asked.grammar for asked in made.asked)
    assert [one["type"] for one in grammar_of(made.asked[0])["elements"]] == ["tags_with_separator", "json_schema"]
    assert both and alone and (alone.kind, both.after, alone.after) == ("json_schema", "</think>", "</think>")
    async with serving(made) as url:
        body = {"messages": HI, "tools": TOOLS, "tool_choice": "required", "response_format": schema}
        assert (await post(url + CHAT, body))[0] == 200
    assert grammar_of(made.asked[2])["type"] == "tags_with_separator"  # a call is forced, so the format has no say


async def test_a_tool_that_no_grammar_can_hold_to_is_refused_by_its_name() -> None:
    made = front()
    made.script = [RequestError("the schema has the keyword x; leave it out", param="grammar", code="invalid_grammar")]
    for path, fields in (
        (CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": "required"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 9, "tools": [{"name": "f", "input_schema": {}}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "f"}], "tool_choice": "required"}),
    ):
        async with serving(made) as url:
            status, answer = await post(url + path, fields)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "tools", "invalid_grammar"), path


@pytest.mark.parametrize(("part", "called"), [("grammar", "tools"), ("format", None)])
async def test_what_is_refused_beside_tools_is_named_by_its_own_field(part: str, called: str | None) -> None:
    made = front()
    made.script = [RequestError("the schema has the keyword x; leave it out", param=part, code="invalid_grammar")]
    schema: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    text = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}
    for path, fields, name in (
        (CHAT, {"messages": HI, "tools": TOOLS, "response_format": schema}, "response_format"),
        (CHAT, {"messages": HI, "tools": TOOLS, "regex": "a"}, "regex"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "f"}], "text": text}, "text.format"),
    ):
        async with serving(made) as url:
            status, answer = await post(url + path, fields)
        assert (status, answer["error"]["param"]) == (400, called or name), (path, name)


async def test_a_format_is_named_as_such_where_tools_are_not_looked_for() -> None:
    made = front()
    made.text = text_of(PLAIN)
    made.script = [RequestError("the schema has the keyword x; leave it out", param="grammar", code="invalid_grammar")]
    async with serving(made) as url:
        _, answer = await post(url + CHAT, {"messages": HI, "tools": TOOLS, "regex": "a"})
        assert answer["error"]["param"] == "regex"
    async with serving(front()) as url:
        _, answer = await post(url + CHAT, {"messages": HI, "tools": TOOLS, "ebnf": 'root ::= "a"'})
    assert answer["error"]["param"] == "ebnf" and "ebnf and tools exclude each other" in answer["error"]["message"]


async def test_our_own_client_shows_reasoning_as_it_comes() -> None:
    made = front(*pieces(THOUGHT), template=THINKING, reasoning="qwen3")
    async with serving(made) as url, Client(url) as ours:
        said = [chunk.text async for chunk in ours.chat(HI, SamplingParams())]
    assert "".join(said) == "Hm <b>.Yes."
