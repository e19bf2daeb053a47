"""Fields of requests: served, hints that are ignored and told so, and what is refused."""

import logging
import typing
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import msgspec
import pytest
from anthropic.types.beta import message_create_params
from http_front import FakeFront, chunks, serving, written
from openai.types.responses import response_create_params
from test_http import HI, client, post
from test_http_tools import CALL_TIME, PARAMETERS, PLAIN, THINKING, TOOLS, front, grammar_of, pieces, said, talk

from engine.http.anthropic.messages import MessagesBody
from engine.http.app import ROUTES
from engine.http.fields import EMPTY, HEADER
from engine.http.fields_page import page
from engine.http.openapi import describe
from engine.http.responses.bodies import ResponsesBody
from engine.http.wire import Body, structs_in

pytestmark = pytest.mark.anyio
CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    TEXT: {"prompt": "x"},
    MESSAGES: {"messages": HI, "max_tokens": 4},
    RESPONSES: {"input": "x"},
}
CACHED = {"type": "ephemeral"}
EFFORT = PLAIN + "{{ reasoning_effort }}"
CLAUDE_TOOL: dict[str, Any] = {"name": "get_weather", "input_schema": PARAMETERS}
RESPONSE_TOOL: dict[str, Any] = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}


async def send(
    path: str, fields: dict[str, Any], made: FakeFront | None = None, **options: Any
) -> tuple[int, Any, str]:
    """The status, the answer and the header of ignored fields."""
    async with (
        serving(made or FakeFront(), **options) as url,
        aiohttp.ClientSession() as session,
        session.post(url + path, json={**ASKED[path], **fields}) as response,
    ):
        return response.status, await response.json(), response.headers.get(HEADER, "")


# ── the tables ───────────────────────────────────────────────────────────────────────────────


def bodies() -> set[type[Body]]:
    found: set[type[Body]] = set()
    waiting: list[Any] = [route.takes for route in ROUTES]
    while waiting:
        fresh = set(structs_in(waiting.pop(), Body)) - found
        found |= fresh
        waiting += [hint for kind in fresh for hint in typing.get_type_hints(kind).values()]
    return found


def test_every_rule_is_of_a_field_that_may_be_left_out() -> None:
    ruled = [body for body in bodies() if body.rules]
    assert len(ruled) > 20
    for body in ruled:
        fields = {field.name: field for field in msgspec.structs.fields(body)}
        assert all(fields[name].default is None for name in body.rules), body


def test_the_page_is_what_the_tables_say() -> None:
    assert (Path(__file__).parents[3] / "docs" / "fields.md").read_text() == page()


def test_the_document_says_what_is_ignored() -> None:
    schemas = describe(ROUTES, models=["fake"], keyed=False)["components"]["schemas"]
    assert schemas["ChatBody"]["properties"]["prediction"]["description"] == "ignored"
    assert (
        schemas["MessagesBody"]["properties"]["context_management"]["description"]
        == "ignored: edits of the types clear_*"
    )
    assert schemas["ChatBody"]["properties"]["use_beam_search"]["enum"] == [False, None]


def test_every_field_of_the_clients_is_known() -> None:
    for params, body in (
        (response_create_params.ResponseCreateParamsStreaming, ResponsesBody),
        (message_create_params.MessageCreateParamsStreaming, MessagesBody),
    ):
        assert set(typing.get_type_hints(params)) <= set(body.__struct_fields__)


# ── hints ────────────────────────────────────────────────────────────────────────────────────

PART = {"type": "text", "text": "hi", "cache_control": CACHED}
HINTS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    (CHAT, {"service_tier": "flex"}, "service_tier"),
    (CHAT, {"verbosity": "low"}, "verbosity"),
    (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
    (CHAT, {"mirostat": 0, "mirostat_tau": 5.0}, "mirostat_tau"),
    (CHAT, {"messages": [*HI, {"role": "assistant", "content": "x", "annotations": [{}]}]}, "messages[].annotations"),
    (RESPONSES, {"service_tier": "priority"}, "service_tier"),
    (RESPONSES, {"text": {"verbosity": "high"}}, "text.verbosity"),
    (RESPONSES, {"truncation": "auto"}, "truncation"),
    (RESPONSES, {"reasoning": {"effort": "high"}}, "reasoning.effort"),
    (RESPONSES, {"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    (RESPONSES, {"include": ["reasoning.encrypted_content"]}, "include"),
    (RESPONSES, {"client_metadata": {"a": "b"}}, "client_metadata"),
    (RESPONSES, {"tools": [RESPONSE_TOOL, {"type": "web_search", "filters": None}]}, "tools[].web_search"),
    (RESPONSES, {"tools": [{"type": "custom", "name": "x"}, {"type": "shell"}]}, "tools[].custom, tools[].shell"),
    (MESSAGES, {"output_config": {"effort": "max"}}, "output_config.effort"),
    (MESSAGES, {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
    (MESSAGES, {"diagnostics": {"previous_message_id": None}}, "diagnostics"),
    (MESSAGES, {"service_tier": "standard"}, "service_tier"),
    (MESSAGES, {"speed": "fast"}, "speed"),
    (MESSAGES, {"tools": [CLAUDE_TOOL | {"defer_loading": True}]}, "tools[].defer_loading"),
    (MESSAGES, {"tools": [CLAUDE_TOOL | {"allowed_callers": ["direct", "x"]}]}, "tools[].allowed_callers"),
    (MESSAGES, {"tools": [CLAUDE_TOOL, {"type": "tool_search_tool_bm25_20251119", "name": "s"}]}, "tools[].type"),
]  # fmt: skip
LABELS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"user": "me", "metadata": {"a": "b"}, "store": True}, "user, metadata, store"),
    (CHAT, {"prompt_cache_key": "k", "prompt_cache_retention": "24h"}, "prompt_cache_key, prompt_cache_retention"),
    (CHAT, {"cache_control": CACHED, "messages": [{"role": "user", "content": [PART, PART]}] * 2},
     "cache_control, messages[].content[].cache_control"),
    (CHAT, {"tools": [TOOLS[0] | {"cache_control": CACHED}]}, "tools[].cache_control"),
    (TEXT, {"user": "me"}, "user"),
    (RESPONSES, {"prompt_cache_key": "k"}, "prompt_cache_key"),
    (MESSAGES, {"metadata": {"user_id": "me"}}, "metadata"),
    (MESSAGES, {"system": [PART]}, "system[].cache_control"),
    (MESSAGES, {"messages": [{"role": "user", "content": [PART]}]}, "messages[].content[].cache_control"),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "named"), HINTS + LABELS)
async def test_a_hint_is_ignored_and_named(path: str, fields: dict[str, Any], named: str) -> None:
    status, answer, ignored = await send(path, fields, front("x"))
    assert (status, ignored) == (200, named), answer


@pytest.mark.parametrize(("path", "fields", "named"), HINTS)
async def test_strict_fields_refuse_hints(path: str, fields: dict[str, Any], named: str) -> None:
    status, answer, ignored = await send(path, fields, front("x"), strict_fields=True)
    assert (status, ignored, answer["error"]["code"]) == (400, "", "unsupported_parameter"), answer


@pytest.mark.parametrize(("path", "fields", "named"), LABELS)
async def test_strict_fields_take_labels(path: str, fields: dict[str, Any], named: str) -> None:
    assert (await send(path, fields, front("x"), strict_fields=True))[::2] == (200, named)


async def test_a_hint_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(FakeFront()) as url:
        with caplog.at_level(logging.INFO, "engine.http.fields"):
            for field in ("user", "user", "service_tier"):
                assert (await post(url + CHAT, {"messages": HI, field: "x"}))[0] == 200
    assert [record.args for record in caplog.records] == [(CHAT, "user"), (CHAT, "service_tier")]


async def test_a_stream_and_an_error_name_hints_too() -> None:
    async with serving(FakeFront()) as url, aiohttp.ClientSession(url) as session:
        for fields, status in (({"stream": True}, 200), ({"temperature": 3}, 400)):
            async with session.post(CHAT, json={"messages": HI, "user": "me", **fields}) as response:
                assert (response.status, response.headers[HEADER]) == (status, "user")


NEUTRAL: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"use_beam_search": False, "length_penalty": 1.0, "mirostat": 0, "best_of": 1, "early_stopping": False}),
    (CHAT, {"modalities": ["text"], "service_tier": "auto", "verbosity": "medium", "store": False}),
    (CHAT, {"reasoning_effort": "none", "functions": [], "function_call": "auto"}),
    (CHAT, {"metadata": {}, "user": "", "cache_control": None, "typical_p": 1, "dry_multiplier": 0.0}),
    (TEXT, {"best_of": 1, "suffix": "", "use_beam_search": False}),
    (RESPONSES, {"include": [], "reasoning": {}, "truncation": "disabled", "top_logprobs": 0}),
    (RESPONSES, {"reasoning": {"effort": "none", "summary": None}, "context_management": []}),
    (MESSAGES, {"output_config": {}, "speed": "standard", "context_management": {"edits": []}, "thread": None}),
    (MESSAGES, {"thinking": {"type": "disabled"}, "tools": [CLAUDE_TOOL | {"type": "custom"}]}),
]  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("path", "fields"), NEUTRAL)
async def test_what_is_done_anyway_is_no_hint(path: str, fields: dict[str, Any], strict: bool) -> None:
    status, answer, ignored = await send(path, fields, front("x"), strict_fields=strict)
    assert (status, ignored) == (200, ""), answer


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"use_beam_search": True}, "use_beam_search"),
        (CHAT, {"use_beam_search": 0}, "use_beam_search"),  # JSON tells false from 0
        (CHAT, {"length_penalty": 2.0}, "length_penalty"),
        (CHAT, {"mirostat": 2}, "mirostat"),
        (CHAT, {"best_of": 2}, "best_of"),
        (CHAT, {"web_search_options": {}}, "web_search_options"),
        (CHAT, {"messages": [*HI, {"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[1].audio"),
        (CHAT, {"reasoning_effort": "hgih"}, "reasoning_effort"),
        (RESPONSES, {"include": ["everything"]}, "include[0]"),
        (RESPONSES, {"context_management": [{"type": "compaction"}]}, "context_management"),
        (RESPONSES, {"tools": [{"type": "mcp", "server_url": "x"}]}, "tools[0].type"),
        (RESPONSES, {"tools": [RESPONSE_TOOL | {"allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
        (RESPONSES, {"tools": [RESPONSE_TOOL | {"allowed_callers": 3}]}, "tools[0].allowed_callers"),
        (RESPONSES, {"truncation": [3]}, "truncation"),
        (MESSAGES, {"context_management": 3}, "context_management"),
        (MESSAGES, {"context_management": {"edits": [3]}}, "context_management"),
        (MESSAGES, {"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management"),
        (MESSAGES, {"context_management": {"edits": "x"}}, "context_management"),
        (MESSAGES, {"mcp_servers": [{}]}, "mcp_servers"),
        (MESSAGES, {"inference_geo": "eu"}, "inference_geo"),
        (MESSAGES, {"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        (MESSAGES, {"output_config": {"effort": "huge"}}, "output_config.effort"),
    ],
)  # fmt: skip
async def test_what_would_make_the_reply_wrong_is_refused(path: str, fields: dict[str, Any], param: str) -> None:
    status, answer, _ = await send(path, fields)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_empty_is_not_false() -> None:
    assert all(not isinstance(value, bool | int) for value in EMPTY)


# ── served ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("template", "effort", "variables", "ignored"),
    [
        (THINKING, "none", {"enable_thinking": False}, ""),
        (THINKING, "minimal", {"enable_thinking": False}, ""),
        (THINKING, "high", {"enable_thinking": True}, "reasoning_effort"),
        (EFFORT, "low", {"reasoning_effort": "low"}, ""),
        (PLAIN, "low", None, "reasoning_effort"),
        (PLAIN, "none", None, ""),
    ],
)
async def test_effort_is_for_the_template_to_say(template: str, effort: str, variables: Any, ignored: str) -> None:
    made = front("x", template=template)
    assert (await send(CHAT, {"reasoning_effort": effort}, made))[::2] == (200, ignored)
    assert made.asked[0].template_kwargs == variables
    named = ignored and "reasoning.effort"
    assert (await send(RESPONSES, {"reasoning": {"effort": effort}}, made))[::2] == (200, named)
    assert made.asked[1].template_kwargs == variables


async def test_what_the_request_says_to_the_template_wins_over_its_effort() -> None:
    made = front("x", template=THINKING)
    await send(CHAT, {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, made)
    assert made.asked[0].template_kwargs == {"enable_thinking": True}


async def test_anthropics_effort_turns_nothing_on_or_off() -> None:
    made = front("x", template=THINKING)
    assert (await send(MESSAGES, {"output_config": {"effort": "low"}}, made))[2] == "output_config.effort"
    assert made.asked[0].template_kwargs is None
    made = front("x", template=EFFORT)
    assert (await send(MESSAGES, {"output_config": {"effort": "low"}}, made))[2] == ""
    assert made.asked[0].template_kwargs == {"reasoning_effort": "low"}


async def test_past_reasoning_by_both_names() -> None:
    made = front("x")
    for fields in ({"reasoning": "y"}, {"reasoning_content": "y"}, {"reasoning": "y", "reasoning_content": "y"}):
        await send(CHAT, {"messages": [*HI, {"role": "assistant", "content": "x", **fields}, *HI]}, made)
        assert written(made.asked[-1])[1]["reasoning_content"] == "y"
    twice = {"role": "assistant", "content": "x", "reasoning": "y", "reasoning_content": "z"}
    for message, param in ((twice, "messages[0].reasoning"), (HI[0] | {"reasoning": "y"}, "messages[0].reasoning")):
        status, answer, _ = await send(CHAT, {"messages": [message]}, made)
        assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize("streamed", [False, True])
async def test_reasoning_that_is_left_out(streamed: bool) -> None:
    made = front(*pieces("<think>\nHm.\n</think>\n\nYes."), template=THINKING, reasoning="qwen3")
    message, _ = await talk(made, streamed, extra_body={"include_reasoning": False})
    assert (message.content, getattr(message, "reasoning_content", None)) == ("Yes.", None)
    status, answer, _ = await send(CHAT, {"include_reasoning": False, "separate_reasoning": False}, made)
    assert (status, answer["error"]["param"]) == (400, "include_reasoning")


async def test_two_names_of_one_penalty() -> None:
    made = FakeFront()
    for fields in ({"repeat_penalty": 1.5}, {"repeat_penalty": 1.5, "repetition_penalty": 1.5}):
        assert (await send(CHAT, fields, made))[0] == 200
        assert made.asked[-1].sampling.repetition_penalty == 1.5
    for fields, param in (({"repeat_penalty": 1.5, "repetition_penalty": 1}, "repeat_penalty"),
                          ({"repeat_penalty": 0}, "repeat_penalty")):  # fmt: skip
        status, answer, _ = await send(TEXT, fields)
        assert (status, answer["error"]["param"]) == (400, param)


async def test_allowed_tools() -> None:
    made = front(*pieces(CALL_TIME))
    one: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}

    def chat(*tools: Any, mode: str = "auto") -> dict[str, Any]:
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}

    message, _ = await talk(made, False, tools=TOOLS, tool_choice=chat(one))
    assert said(message) == [("get_time", "{}")]
    held = grammar_of(made.asked[0])  # no other is called, though the reply is free
    assert (held["type"], [tag["begin"].split('"')[3] for tag in held["tags"]]) == ("triggered_tags", ["get_time"])
    assert [tool["function"]["name"] for tool in made.asked[0].tools or ()] == ["get_time"]
    await talk(made, False, tools=TOOLS, tool_choice=chat(one, mode="required"))
    assert [tag["begin"].split('"')[3] for tag in grammar_of(made.asked[1])["tags"]] == ["get_time"]
    other = {"type": "function", "function": {"name": "f"}}
    for choice in (chat(), chat(other)):
        status, answer, _ = await send(CHAT, {"tools": TOOLS, "tool_choice": choice}, made)
        assert (status, answer["error"]["param"]) == (400, "tool_choice.allowed_tools.tools")
    tools = [RESPONSE_TOOL, {"type": "function", "name": "get_time"}]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}
    status, answer, _ = await send(RESPONSES, {"tools": tools, "tool_choice": allowed}, made)
    assert status == 200 and [tool["name"] for tool in answer["tools"]] == ["get_time"]


async def test_a_tool_that_is_left_out_cannot_be_forced() -> None:
    for choice in ("required", {"type": "function", "name": "x"}):
        fields = {"tools": [{"type": "custom", "name": "x"}], "tool_choice": choice}
        status, answer, _ = await send(RESPONSES, fields, front("x"))
        assert (status, answer["error"]["param"]) == (400, "tool_choice")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TURNED = {"required": ["a"], "properties": {"a": {"type": "integer"}}, "type": "object"}


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"guided_json": SCHEMA, "json_schema": TURNED}, 200),
        ({"guided_json": SCHEMA, "response_format": {"type": "json_schema", "json_schema": {"schema": TURNED}}}, 200),
        ({"regex": "a+", "structured_outputs": {"regex": "a+"}}, 200),
        ({"choice": ["a", "b"], "guided_choice": ["a", "b"]}, 200),
        ({"guided_json": SCHEMA, "json_schema": {"type": "object"}}, 400),
        ({"regex": "a+", "guided_regex": "a*"}, 400),
        ({"choice": ["a", "b"], "guided_choice": ["b", "a", "c"]}, 400),
        ({"regex": "{}", "guided_json": {}}, 400),
    ],
)
async def test_one_grammar_named_twice_is_one(fields: dict[str, Any], status: int) -> None:
    assert (await send(CHAT, fields))[0] == status


# ── prompts and ids ──────────────────────────────────────────────────────────────────────────


async def test_a_client_of_openai_sends_them_all() -> None:
    made = FakeFront(chunks("a", "b"))
    extra = {"truncate_prompt_tokens": 5, "add_special_tokens": False, "return_token_ids": True, "request_id": "mine"}
    async with serving(made) as url, client(url) as api:
        await api.chat.completions.create(
            model="fake", messages=HI, extra_body=extra, prediction={"type": "content", "content": "x"},
            service_tier="flex", verbosity="low", reasoning_effort="low", metadata={"a": "b"}, store=True,
        )  # fmt: skip
    asked = made.asked[0]
    assert (asked.last, asked.special, asked.tell_prompt) == (5, False, True)


async def test_a_client_of_anthropic_goes_on_without_threads() -> None:
    async with serving(FakeFront()) as url, anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as api:
        with pytest.raises(anthropic.BadRequestError) as refused:
            await api.beta.messages.create(model="fake", messages=HI, max_tokens=4, thread={"type": "create"})  # type: ignore[typeddict-item,list-item]
        assert refused.value.error_code == "thread_unsupported_request"
