"""The Anthropic API through its real client, over the real actors and the echo model."""

import json
import typing
from typing import Any

import anthropic
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from house import counted
from test_http_routes import Site, open_site

from engine.conversation.reading import NOTHING
from engine.http.anthropic.messages import CountBody, MessagesBody
from engine.http.anthropic.reply import AnthropicReply
from engine.messages.reply import Chunk

pytestmark = pytest.mark.anyio
HI: list[Any] = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"model": "echo", "extra_body": {"temperature": 0}}


def client(site: Site) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=site.url, api_key="any", max_retries=0, timeout=20)


def test_every_field_of_the_client_is_known() -> None:
    asked = typing.get_type_hints(message_create_params.MessageCreateParamsStreaming)
    assert set(asked) <= set(MessagesBody.__struct_fields__)
    counts = typing.get_type_hints(message_count_tokens_params.MessageCountTokensParams)
    assert set(counts) <= set(CountBody.__struct_fields__)


async def test_a_message() -> None:
    async with open_site() as site, client(site) as api:
        answer = await api.messages.create(**GREEDY, messages=HI, max_tokens=4)
        assert (answer.type, answer.role, answer.model) == ("message", "assistant", "echo")
        assert [(block.type, block.text) for block in answer.content] == [("text", counted("\n", 4))]
        assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 4)
        stopped = await api.messages.create(**GREEDY, messages=HI, max_tokens=9, stop_sequences=["\x0d"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "\x0d")
        assert stopped.content[0].text == counted("\n", 2)
        await site.house.settled()


@pytest.mark.parametrize(("matched", "reason"), [(256, "end_turn"), (None, "end_turn"), ("x", "stop_sequence")])
def test_the_end_of_a_turn(matched: Any, reason: str) -> None:
    last = Chunk("r", "a", [], "stop", matched)
    assert json.loads(AnthropicReply("r", "m", NOTHING).whole(last))["stop_reason"] == reason


async def test_cached_tokens_are_not_input_tokens() -> None:
    async with open_site() as site, client(site) as api:
        said: list[Any] = [{"role": "user", "content": "x" * 20}, {"role": "assistant", "content": "y"}]
        await api.messages.create(**GREEDY, messages=said, max_tokens=1)
        again = await api.messages.create(**GREEDY, messages=said, max_tokens=1)
        assert again.usage.cache_read_input_tokens == 20
        assert again.usage.input_tokens + again.usage.cache_read_input_tokens == 22


async def test_what_becomes_the_prompt() -> None:
    text = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    async with open_site() as site, client(site) as api:

        async def count(**asked: Any) -> int:
            counted = (await api.messages.count_tokens(model="echo", **asked)).input_tokens
            usage = (await api.messages.create(model="echo", max_tokens=1, **asked)).usage
            assert usage.input_tokens + usage.cache_read_input_tokens == counted
            return counted

        assert await count(messages=HI) == len("hi\n")
        assert await count(messages=HI, system="be") == len("be\nhi\n")
        assert await count(messages=HI, system=[text, text]) == len("bb\nhi\n")
        assert await count(messages=[*HI, {"role": "user", "content": [text]}]) == len("hi\nb\n")  # one turn
        assert await count(messages=[*HI, {"role": "assistant", "content": "I"}]) == len("hi\nI")  # is continued


async def test_the_event_sequence() -> None:
    async with open_site() as site, client(site) as api:
        stream = await api.messages.create(**GREEDY, messages=HI, max_tokens=5, stream=True)
        events = [event async for event in stream]
        types = [event.type for event in events]
        deltas = [event for event in events if event.type == "content_block_delta"]
        assert types == [
            "message_start", "content_block_start", *["content_block_delta"] * len(deltas), "content_block_stop",
            "message_delta", "message_stop",
        ]  # fmt: skip
        start = events[0].message
        assert (start.content, start.stop_reason, start.usage.input_tokens) == ([], None, 3)
        assert "".join(event.delta.text for event in deltas) == counted("\n", 5)
        assert (events[-2].delta.stop_reason, events[-2].usage.output_tokens) == ("max_tokens", 5)
        async with api.messages.stream(**GREEDY, messages=HI, max_tokens=5) as helper:
            final = await helper.get_final_message()
        assert final.content[0].text == counted("\n", 5) and final.id.startswith("msg_")


async def test_a_failure_inside_a_stream() -> None:
    async with open_site(seconds=0.001) as site, client(site) as api:
        stream = await api.messages.create(**GREEDY, messages=HI, max_tokens=4000, stream=True)
        events = aiter(stream)
        await anext(events)
        await site.house.executor.lose("pulled the plug")
        with pytest.raises(anthropic.APIStatusError, match="pulled the plug") as caught:
            async for _ in events:
                pass
        assert caught.value.body["error"]["type"] == "overloaded_error"


async def test_an_abort_has_no_stop_reason() -> None:
    async with open_site(seconds=0.001) as site, client(site) as api:
        stream = await api.messages.create(**GREEDY, messages=HI, max_tokens=4000, stream=True)
        events = aiter(stream)
        start = await anext(events)
        assert (await site.post("/abort_request", {"rid": start.message.id}))[1] == {"aborted": 1}
        assert [event async for event in events][-2].delta.stop_reason is None
        await site.house.settled()


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"messages": HI}, 400, None, "missing required field `max_tokens`"),
        ({"messages": HI, "max_tokens": -1}, 400, "max_tokens", "max_tokens: expected `int` >= 1, got -1; correct"),
        ({"messages": HI, "max_tokens": 0}, 400, "max_tokens", ">= 1"),
        ({"messages": [], "max_tokens": 1}, 400, "messages", "length >= 1"),
        ({"messages": [{"role": "boss", "content": ""}], "max_tokens": 1}, 400, "messages[0].role", "'boss'"),
        ({"messages": HI, "max_tokens": 1, "model": "claude"}, 404, "model", "'claude' is not served"),
        ({"messages": HI, "max_tokens": 1, "stop_sequences": [""]}, 400, "stop_sequences", "none of them empty"),
        ({"messages": HI, "max_tokens": 1, "tools": [{}]}, 400, "tools[0]", "missing required field `name`"),
        ({"messages": HI, "max_tokens": 1, "container": "c"}, 400, "container", "not supported yet"),
        ({"messages": HI, "max_tokens": 1, "max_token": 1}, 400, "max_token", "did you mean max_tokens?"),
        ({"messages": HI, "max_tokens": 5000}, 400, "max_tokens", "exceed context limit: 3 + 5000 > 4096; "),
        (
            {"messages": [{"role": "user", "content": "x" * 5000}], "max_tokens": 1},
            400,
            "messages",
            "prompt is too long: 5001 tokens > 4095 maximum",
        ),
    ],
)
async def test_errors_in_anthropics_shape(body: dict, status: int, param: str | None, says: str) -> None:
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    async with open_site() as site:
        found, answer = await site.post("/v1/messages", body)
        assert (found, answer["type"], answer["error"]["type"]) == (status, "error", kinds[status])
        assert says in answer["error"]["message"] and answer["error"]["param"] == param
        found, answer = await site.get("/v1/messages")
        assert (found, answer["type"]) == (405, "error")
        await site.house.settled()
