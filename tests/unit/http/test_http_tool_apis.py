"""Tools and reasoning over Anthropic's API and OpenAI's responses, through their clients; replies are scripted.

Also, for every API, that such replies are as the OpenAPI document describes them.
"""

import json
from typing import Any

import aiohttp
import anthropic
import pytest
from http_front import FakeFront, serving, written
from test_http import client, post
from test_http_responses import merged
from test_http_schemas import content, hold, hold_events
from test_http_tools import (
    ARGUMENTS,
    CALL,
    CALL_TIME,
    CHAT,
    HI,
    PARAMETERS,
    PLAIN,
    THINKING,
    TOOLS,
    front,
    grammar_of,
    pieces,
)

pytestmark = pytest.mark.anyio
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
READ = json.loads(ARGUMENTS)
ALL = f"<think>\nHm.\n</think>\n\nOne moment.\n{CALL}\n{CALL_TIME}"
CLAUDE_TOOLS: list[Any] = [
    {"name": "get_weather", "input_schema": PARAMETERS, "description": "?"},
    {"name": "get_time", "input_schema": {"type": "object", "properties": {}}},
]
RESPONSE_TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": None, "description": "?"},
    {"type": "function", "name": "get_time", "parameters": None, "strict": False},
]


def thinking(*texts: str) -> FakeFront:
    return front(*texts, template=THINKING, reasoning="qwen3")


# ── every API, as described ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("text", [ALL, CALL, "<think>\nHm.\n</think>\n\nYes.", "Yes.", "<think>Hm", ""])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI, "tools": TOOLS, "logprobs": True}),
        (MESSAGES, {"messages": HI, "max_tokens": 9, "tools": CLAUDE_TOOLS}),
        (RESPONSES, {"input": "x", "tools": RESPONSE_TOOLS, "tool_choice": "auto"}),
    ],
)
async def test_replies_are_as_described(path: str, body: dict[str, Any], text: str, streamed: bool) -> None:
    async with (
        serving(thinking(*pieces(text), "")) as url,
        aiohttp.ClientSession(url) as session,
        session.post(path, json={**body, "stream": streamed}) as response,
    ):
        assert response.status == 200, await response.text()
        described = content(path)[response.content_type]
        if streamed:
            assert hold_events(described, await response.text())
        else:
            hold(described["schema"], await response.json())


# ── Anthropic ────────────────────────────────────────────────────────────────────────────────


def claude(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="any", max_retries=0, timeout=20)


async def messaged(made: FakeFront, streamed: bool, **asked: Any) -> anthropic.types.Message:
    asked = {"model": "fake", "messages": HI, "max_tokens": 99, **asked}
    async with serving(made) as url, claude(url) as api:
        if not streamed:
            return await api.messages.create(**asked)
        async with api.messages.stream(**asked) as stream:
            return await stream.get_final_message()


@pytest.mark.parametrize("streamed", [False, True])
async def test_blocks(streamed: bool) -> None:
    made = thinking(*pieces(ALL))
    answer = await messaged(made, streamed, tools=CLAUDE_TOOLS)
    thought, said, weather, time = answer.content
    assert (thought.type, thought.thinking, said.type, said.text) == ("thinking", "Hm.", "text", "One moment.")
    assert (weather.type, weather.name, weather.input) == ("tool_use", "get_weather", READ)
    assert (time.name, time.input, weather.id != time.id) == ("get_time", {}, True)
    assert (answer.stop_reason, answer.stop_sequence) == ("tool_use", None)
    assert [tool["function"]["name"] for tool in made.asked[0].tools or ()] == ["get_weather", "get_time"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_blocks_come_in_the_order_of_the_reply(streamed: bool) -> None:
    answer = await messaged(thinking(*pieces(f"One.\n{CALL}\nTwo.\n{CALL_TIME}")), streamed, tools=CLAUDE_TOOLS)
    assert [block.type for block in answer.content] == ["text", "tool_use", "text", "tool_use"]
    assert [block.text for block in answer.content if block.type == "text"] == ["One.", "Two."]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_use_that_a_stop_sequence_cuts_off_is_not_to_be_run(streamed: bool) -> None:
    made = front(*pieces(CALL[:60]), finish="stop", matched=",")
    answer = await messaged(made, streamed, tools=CLAUDE_TOOLS, stop_sequences=[","])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", ",")


async def test_the_events_of_blocks() -> None:
    async with serving(thinking(*pieces(ALL))) as url, claude(url) as api:
        stream = await api.messages.create(model="fake", messages=HI, max_tokens=99, tools=CLAUDE_TOOLS, stream=True)
        events = [event async for event in stream]
    assert merged([event.type for event in events]) == [
        "message_start",
        *["content_block_start", "content_block_delta", "content_block_stop"] * 4,
        "message_delta",
        "message_stop",
    ]
    assert [event.index for event in events if event.type == "content_block_start"] == [0, 1, 2, 3]
    parts = [event.delta for event in events if event.type == "content_block_delta" and event.index == 2]
    assert len(parts) > 5 and "".join(part.partial_json for part in parts) == ARGUMENTS


@pytest.mark.parametrize(
    ("choice", "forced", "single"),
    [
        ({"type": "any"}, ["get_weather", "get_time"], False),
        ({"type": "any", "disable_parallel_tool_use": True}, ["get_weather", "get_time"], True),
        ({"type": "tool", "name": "get_time"}, ["get_time"], True),
    ],
)
async def test_a_forced_use(choice: Any, forced: list[str], single: bool) -> None:
    made = front(CALL_TIME)
    answer = await messaged(made, False, tools=CLAUDE_TOOLS, tool_choice=choice)
    assert answer.stop_reason == "tool_use"
    calls = grammar_of(made.asked[0])
    assert [tag["begin"].split('"')[3] for tag in calls["tags"]] == forced and calls["stop_after_first"] is single
    await messaged(made, False, tools=CLAUDE_TOOLS, tool_choice={"type": "none"})
    assert made.asked[1].tools is None and made.asked[1].grammar is None


async def test_whether_to_think_is_for_the_template_to_say() -> None:
    made = thinking("Yes.")
    await messaged(made, False, thinking={"type": "disabled"})
    await messaged(made, False, thinking={"type": "enabled", "budget_tokens": 1024})
    await messaged(made, False)
    kwargs = [asked.template_kwargs for asked in made.asked]
    assert kwargs == [{"enable_thinking": on, "thinking": on} for on in (False, True)] + [None]


async def test_what_tools_returned() -> None:
    made = front("Sunny.")
    said: list[Any] = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "One moment."},
                {"type": "tool_use", "id": "1", "name": "get_weather", "input": READ},
                {"type": "tool_use", "id": "2", "name": "get_time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "tool_result", "tool_use_id": "2", "is_error": True},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    await messaged(made, False, messages=said, tools=CLAUDE_TOOLS)
    user, assistant, first, second, then = written(made.asked[0])
    assert (user["content"], assistant["content"], assistant["reasoning_content"]) == ("Weather?", "One moment.", "Hm.")
    assert [json.loads(call["function"]["arguments"]) for call in assistant["tool_calls"]] == [READ, {}]
    assert first == {"role": "tool", "tool_call_id": "1", "content": "sun"}
    assert second == {"role": "tool", "tool_call_id": "2", "content": ""}
    assert then == {"role": "user", "content": "Well?"}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice", "goes with a name"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice", "'f', which is no tool"),
        ({"tools": [*CLAUDE_TOOLS, CLAUDE_TOOLS[0]]}, "tools[2]", "two tools are called 'get_weather'"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema", "'array'"),
        ({"tools": [{"type": "bash", "name": "bash", "input_schema": {}}]}, "tools[0].type", "'bash'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type", "'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
         "messages[0].content[0]", "goes with the role assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "colour": 1}]}]},
         "messages[0].content[0].colour", "unknown field"),
    ],
)  # fmt: skip
async def test_bad_messages(body: dict[str, Any], param: str, says: str) -> None:
    async with serving(front("x")) as url:
        status, answer = await post(url + MESSAGES, {"messages": HI, "max_tokens": 9, **body})
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert says in answer["error"]["message"]


# ── responses ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("streamed", [False, True])
async def test_items(streamed: bool) -> None:
    made = thinking(*pieces(ALL))
    asked: Any = {"model": "fake", "input": "x", "tools": RESPONSE_TOOLS, "parallel_tool_calls": True}
    async with serving(made) as url, client(url) as api:
        if streamed:
            async with api.responses.stream(**asked) as stream:
                answer: Any = await stream.get_final_response()
        else:
            answer = await api.responses.create(**asked)
        kept = await api.responses.retrieve(answer.id)
        assert [item.id for item in kept.output] == [item.id for item in answer.output]
    thought, said, weather, time = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Hm.")
    assert (said.type, said.content[0].text, answer.output_text) == ("message", "One moment.", "One moment.")
    assert (weather.type, weather.name, weather.arguments) == ("function_call", "get_weather", ARGUMENTS)
    assert (time.name, time.arguments) == ("get_time", "{}")
    assert len({item.id for item in answer.output}) == 4 and weather.call_id != time.call_id
    assert {item.status for item in answer.output} == {"completed"} and answer.status == "completed"
    assert [tool.name for tool in answer.tools] == ["get_weather", "get_time"] and answer.tool_choice == "auto"


async def test_the_events_of_items() -> None:
    async with serving(thinking(*pieces(ALL))) as url, client(url) as api:
        stream = await api.responses.create(model="fake", input="x", tools=RESPONSE_TOOLS, stream=True)
        events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    part = ["response.content_part.added", "response.{0}.delta", "response.{0}.done", "response.content_part.done"]
    call = ["response.function_call_arguments.delta", "response.function_call_arguments.done"]
    inside = [[step.format(kind) for step in part] for kind in ("reasoning_text", "output_text")] + [call, call]
    assert merged([event.type for event in events]) == [
        "response.created",
        "response.in_progress",
        *[step for steps in inside for step in ("response.output_item.added", *steps, "response.output_item.done")],
        "response.completed",
    ]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == events[-1].response.output
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [event.output_index for event in added] == [0, 1, 2, 3] and added[2].item.arguments == ""


async def test_a_conversation_with_calls() -> None:
    made = thinking(*pieces(ALL))
    async with serving(made) as url, client(url) as api:
        first = await api.responses.create(model="fake", input="Weather?", tools=RESPONSE_TOOLS)
        returned: list[Any] = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "sun"}
            for item in first.output
            if item.type == "function_call"
        ]
        by_reference = await api.responses.create(model="fake", input=returned, previous_response_id=first.id)
        spoken: list[Any] = [{"role": "user", "content": "Weather?"}, *(item.to_dict() for item in first.output)]
        await api.responses.create(model="fake", input=[*spoken, *returned])
        listed = await api.responses.input_items.list(by_reference.id, order="asc")
    referred, sent = (written(asked) for asked in made.asked[1:])
    assert referred == sent
    user, assistant, *results = referred
    assert user == {"role": "user", "content": "Weather?"}
    assert (assistant["content"], assistant["reasoning_content"]) == ("One moment.", "Hm.")
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [ARGUMENTS, "{}"]
    assert [result["role"] for result in results] == ["tool", "tool"]
    assert [item.type for item in listed.data] == [
        "message", "reasoning", "message", "function_call", "function_call", "function_call_output",
        "function_call_output",
    ]  # fmt: skip


async def test_a_forced_call() -> None:
    made = front(CALL_TIME)
    async with serving(made) as url, client(url) as api:
        named: Any = {"type": "function", "name": "get_time"}
        for choice, forced in (("required", 2), (named, 1)):
            answer = await api.responses.create(model="fake", input="x", tools=RESPONSE_TOOLS, tool_choice=choice)
            assert len(grammar_of(made.asked[-1])["tags"]) == forced
            assert [item.type for item in answer.output] == ["function_call"]
        assert answer.tool_choice.name == "get_time"


async def test_a_response_that_is_cut_off() -> None:
    made = front(CALL[:60], finish="length")
    async with serving(made) as url, client(url) as api:
        answer = await api.responses.create(model="fake", input="x", tools=RESPONSE_TOOLS)
        events = [
            event
            async for event in await api.responses.create(model="fake", input="x", tools=RESPONSE_TOOLS, stream=True)
        ]
    assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")
    assert (
        events[-1].type == "response.incomplete"
        and events[-1].response.output[0].arguments == answer.output[0].arguments
    )


async def test_a_plain_template_is_enough() -> None:
    made = front("x", template=PLAIN)
    async with serving(made) as url:
        status, _ = await post(url + RESPONSES, {"input": "x", "tools": RESPONSE_TOOLS, "tool_choice": "required"})
    assert status == 200
