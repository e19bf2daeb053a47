"""What coding agents send, through the clients that they are made with: Codex's tools, Claude Code's requests."""

import json
from typing import Any

import anthropic
import openai
import pytest
from http_front import FakeFront, serving, text_of
from test_http import HI, client, post
from test_http_choices import logprob, served
from test_http_tool_apis import claude, thinking
from test_http_tools import ARGUMENTS, PARAMETERS, PLAIN, front, grammar_of, pieces

from engine.messages.reply import Chunk, TokenLogprob

pytestmark = pytest.mark.anyio
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
INCLUDE: Any = ["message.output_text.logprobs"]
CALL = f'<tool_call>\n{{"name": "agents.get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
WEATHER = {"type": "function", "name": "get_weather", "description": "Now", "strict": False, "parameters": PARAMETERS}
CODEX: dict[str, Any] = {
    "model": "fake",
    "store": False,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    ],
    "tools": [
        WEATHER,
        {"type": "namespace", "name": "agents", "description": "Agents", "tools": [WEATHER]},
        {"type": "web_search", "external_web_access": False},
    ],
    "reasoning": {"summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
}


# ── Codex ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_function_in_a_namespace(streamed: bool) -> None:
    made = front(*pieces(CALL))
    async with serving(made) as url, client(url) as api:
        extra = {"client_metadata": {"x": "y"}}
        answer: Any = await api.responses.create(**CODEX, stream=streamed, extra_body=extra)
        if streamed:
            events = [event async for event in answer]
            done = [event for event in events if event.type == "response.function_call_arguments.done"]
            assert [event.name for event in done] == ["get_weather"]
            answer = events[-1].response
        (call,) = answer.output
        assert (call.name, call.namespace, call.arguments) == ("get_weather", "agents", ARGUMENTS)
        told = [tool["function"]["name"] for tool in made.asked[0].tools or ()]
        assert told == ["get_weather", "agents.get_weather"]
        returned = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
        await api.responses.create(**CODEX | {"input": [*CODEX["input"], call.to_dict(), returned]})
    calls = (made.asked[1].messages or [])[2]["tool_calls"]
    assert [one["function"]["name"] for one in calls] == ["agents.get_weather"]  # as the model called it


async def test_namespaces_are_stored_and_gone_on_from() -> None:
    made = front(*pieces(CALL))
    async with serving(made) as url, client(url) as api:
        asked = CODEX | {"store": True}
        first = await api.responses.create(**asked)
        kept = await api.responses.retrieve(first.id)
        assert kept.output == first.output
        returned: Any = [{"type": "function_call_output", "call_id": first.output[0].call_id, "output": "sun"}]
        second = await api.responses.create(**asked | {"input": returned, "previous_response_id": first.id})
        listed = await api.responses.input_items.list(second.id, order="asc")
    names = [(item.name, item.namespace) for item in listed.data if item.type == "function_call"]
    assert names == [("get_weather", "agents")]


async def test_a_function_in_a_namespace_can_be_forced() -> None:
    made = front(*pieces(CALL))
    async with serving(made) as url, client(url) as api:
        choice: Any = {"type": "function", "name": "agents.get_weather"}
        await api.responses.create(**CODEX | {"tool_choice": choice})
        allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [WEATHER_IN_AGENTS]}
        await api.responses.create(**CODEX | {"tool_choice": allowed})
    for asked in made.asked:
        assert [tag["begin"].split('"')[3] for tag in grammar_of(asked)["tags"]] == ["agents.get_weather"]


WEATHER_IN_AGENTS = {"type": "function", "name": "get_weather", "namespace": "agents"}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([WEATHER, WEATHER], "tools[1]"),
        ([{"type": "namespace", "name": "a", "tools": [WEATHER, WEATHER]}], "tools[1]"),
        ([{"type": "namespace", "name": "a.b", "tools": [WEATHER]}], "tools[0].name"),
        ([{"type": "namespace", "name": "a", "tools": [{"type": "mcp"}]}], "tools[0].tools[0].type"),
        ([WEATHER | {"parameters": {"type": "array"}}], "tools[0].parameters"),
        ([{"type": "namespace", "name": "a", "tools": [WEATHER | {"parameters": {"type": "array"}}]}],
         "tools[0].tools[0].parameters"),
        ([WEATHER | {"colour": 1}], "tools[0].colour"),
    ],
)  # fmt: skip
async def test_bad_tools(tools: Any, param: str) -> None:
    async with serving(front("x")) as url:
        status, answer = await post(url + RESPONSES, {"input": "x", "tools": tools})
    assert (status, answer["error"]["param"]) == (400, param), answer


async def test_a_forced_call_beside_a_format() -> None:
    made = front(*pieces(CALL.replace("agents.", "")))
    format: Any = {"format": {"type": "json_schema", "name": "P", "strict": True, "schema": PARAMETERS}}
    async with serving(made) as url, client(url) as api:
        choice: Any = {"type": "function", "name": "get_weather"}
        asked: Any = {"model": "fake", "input": "x", "tools": [WEATHER], "tool_choice": choice, "text": format}
        answer = await api.responses.create(**asked)
    assert [item.type for item in answer.output] == ["function_call"]
    assert [tag["begin"].split('"')[3] for tag in grammar_of(made.asked[0])["tags"]] == ["get_weather"]


# ── log-probabilities of a response ──────────────────────────────────────────────────────────


async def test_logprobs_of_a_response() -> None:
    async with served() as (url, _), client(url) as api:
        ask: dict[str, Any] = {"model": "echo", "input": "hi", "max_output_tokens": 4, "include": INCLUDE}
        ask |= {"top_logprobs": 2, "temperature": 0}
        answer = await api.responses.create(**ask)
        assert answer.top_logprobs == 2
        (token, *rest) = answer.output[0].content[0].logprobs
        assert len(rest) == 3 and bytes(token.bytes).decode() == token.token
        assert token.logprob == pytest.approx(logprob(token.bytes[0], len("hi\n")))
        assert [len(one.top_logprobs) for one in (token, *rest)] == [2] * 4
        kept = await api.responses.retrieve(answer.id)
        assert kept.output == answer.output
        events = [event async for event in await api.responses.create(**ask, stream=True)]
        deltas = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
        (done,) = (event for event in events if event.type == "response.output_text.done")
        assert deltas == [one.token for one in done.logprobs] == [one.token for one in (token, *rest)]
        assert events[-1].response.output[0].content == answer.output[0].content
        plain = await api.responses.create(**{**ask, "include": [], "top_logprobs": 0})
        assert plain.output[0].content[0].logprobs == []
        for fields, param in (
            ({"top_logprobs": 3}, "top_logprobs"),
            ({"include": INCLUDE, "top_logprobs": 21}, "top_logprobs"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                await api.responses.create(model="echo", input="hi", **fields)
            assert refused.value.param == param


def scored(text: str, number: int, finish: Any = None) -> Chunk:
    token = TokenLogprob(id=number, text=text, bytes=text.encode(), logprob=-0.5, rank=1)
    return Chunk("r", text, [number], finish, None, 7, 4, number, logprobs=(token,))


async def test_logprobs_are_those_of_what_is_said() -> None:
    """Neither of what the model thinks, nor of its calls; what a parser holds back comes with its text."""
    texts = ["<think>", "Hm", "</think>", "\n\n", "Yes", " <to", "ol", " is.", ""]
    made = FakeFront([scored(text, number, "stop" if number == 9 else None) for number, text in enumerate(texts, 1)])
    made.text = text_of(PLAIN, "hermes", "qwen3")
    async with serving(made) as url, client(url) as api:
        ask: dict[str, Any] = {"model": "fake", "input": "x", "tools": [WEATHER], "include": INCLUDE}
        thought, message = (await api.responses.create(**ask)).output
    assert (thought.type, message.type) == ("reasoning", "message")
    said = "".join(token.token for token in message.content[0].logprobs)
    assert said.strip() == message.content[0].text == "Yes <tool is."


# ── Claude Code ──────────────────────────────────────────────────────────────────────────────

TOOL: Any = {"name": "get_weather", "input_schema": PARAMETERS, "defer_loading": True}


async def test_a_format_of_anthropics_clients() -> None:
    made = front('{"city": "Z"}')
    async with serving(made) as url, claude(url) as api:
        config: Any = {"format": {"type": "json_schema", "schema": PARAMETERS}, "effort": "high"}
        answer = await api.messages.create(model="fake", messages=HI, max_tokens=9, output_config=config)  # type: ignore[arg-type]
        assert answer.content[0].text == '{"city": "Z"}'  # type: ignore[union-attr]
        await api.messages.create(  # type: ignore[call-overload]
            model="fake", messages=HI, max_tokens=9, output_config=config, tools=[TOOL], tool_choice={"type": "any"}
        )
        counted = await api.messages.count_tokens(model="fake", messages=HI, output_config=config)  # type: ignore[arg-type]
        assert counted.input_tokens > 0
    assert made.asked[0].grammar is not None and json.loads(made.asked[0].grammar.source) == PARAMETERS
    assert made.asked[0].grammar is not None and made.asked[0].grammar.kind == "json_schema"
    assert made.asked[1].grammar is not None and made.asked[1].grammar.kind == "structural_tag"  # the call wins


async def test_a_format_that_no_grammar_can_hold_to_is_named() -> None:
    async with serving(FakeFront()) as url:
        for schema, param in (
            ({"type": "x" * 600_000}, "output_config.format.schema"),
            (3, "output_config.format.schema"),
        ):
            body = {
                "messages": HI,
                "max_tokens": 9,
                "output_config": {"format": {"type": "json_schema", "schema": schema}},
            }
            status, answer = await post(url + MESSAGES, body)
            assert (status, answer["error"]["param"]) == (400, param)


async def test_a_tool_that_a_search_has_found() -> None:
    made = front("x")
    reference: Any = {"type": "tool_reference", "tool_name": "get_weather"}
    said: Any = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "search", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [reference]}]},
    ]
    async with serving(made) as url, claude(url) as api:
        await api.messages.create(model="fake", messages=said, max_tokens=9, tools=[TOOL])
    result = (made.asked[0].messages or [])[2]
    assert (result["role"], result["content"]) == ("tool", "The tool get_weather can be called.\n")
    assert [tool["function"]["name"] for tool in made.asked[0].tools or ()] == ["get_weather"]


async def test_thinking_of_any_type() -> None:
    made = thinking("Yes.")
    async with serving(made) as url, anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as api:
        for kind in ("adaptive", "between_tools", "disabled"):
            await api.messages.create(model="fake", messages=HI, max_tokens=9, thinking={"type": kind})  # type: ignore[arg-type]
    off = {"enable_thinking": False, "thinking": False}
    assert [asked.template_kwargs for asked in made.asked] == [None, None, off]
