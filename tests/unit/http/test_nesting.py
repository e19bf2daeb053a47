"""JSON that nests deeper than Python recurses: refused by its name, whichever field holds it, and harmless."""

import json
from typing import Any

import pytest
from house import counted, open_house, prompt
from test_http_routes import HI, open_site

from engine.conversation.parts import read_messages
from engine.errors import RequestError
from engine.messages.request import Generate
from engine.params.grammar import MAX_NESTING
from engine.params.sampling import SamplingParams

pytestmark = pytest.mark.anyio
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": "NESTED"}}
FORMAT = {"type": "json_schema", "json_schema": {"schema": "NESTED"}}
CALLED = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": "NESTED"}]}


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": HI, "tools": [FUNCTION]}, "tools[0].function.parameters"),
        (CHAT, {"messages": HI, "chat_template_kwargs": "NESTED"}, "chat_template_kwargs"),
        (CHAT, {"messages": HI, "response_format": FORMAT}, "response_format"),
        (CHAT, {"messages": HI, "guided_json": "NESTED"}, "guided_json"),
        (CHAT, {"messages": HI, "structured_outputs": {"json": "NESTED"}}, "structured_outputs.json"),
        (MESSAGES, {"max_tokens": 1, "messages": [*HI, CALLED, *HI]}, "messages[1].content[0].input"),
        (
            MESSAGES,
            {"max_tokens": 1, "messages": HI, "tools": [{"name": "f", "input_schema": "NESTED"}]},
            "tools[0].input_schema",
        ),
        (
            RESPONSES,
            {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": "NESTED"}]},
            "tools[0].parameters",
        ),
        (
            RESPONSES,
            {"input": "x", "text": {"format": {"type": "json_schema", "schema": "NESTED"}}},
            "text.format.schema",
        ),
        ("/tokenize", {"messages": HI, "tools": [FUNCTION]}, "tools[0].function.parameters"),
    ],
)
async def test_it_is_refused(path: str, body: dict[str, Any], param: str) -> None:
    async with open_site() as site:
        for depth in (MAX_NESTING + 1, *range(900, 1000, 10)):  # from where some of our own code could not walk it
            data = json.dumps(body).replace('"NESTED"', nested(depth))
            async with site.session.post(path, data=data) as response:
                error = (await response.json())["error"]
            assert response.status == 400
            unread = depth > 900 and error["message"].startswith("the request body is nested too deeply")
            assert unread or (error["param"], "nests deeper than 200" in error["message"]) == (param, True), error
        assert await site.house.text(prompt("a", max_tokens=5)) == counted("a", 5)


async def test_what_other_clients_nest_ends_their_request_alone() -> None:
    arguments: dict[str, Any] = {}
    for _ in range(3000):
        arguments = {"a": arguments}
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    said = [*HI, {"role": "assistant", "content": "", "tool_calls": [call]}]
    async with open_house() as house:
        with pytest.raises(RequestError, match="nests too deeply"):
            read_messages(said)
        with pytest.raises(RequestError, match="nests too deeply"):
            tool = {"type": "function", "function": {"name": "f", "parameters": arguments}}
            await house.text(Generate("deep", SamplingParams(), messages=read_messages(HI), tools=[tool]))
        assert await house.text(prompt("a", max_tokens=5)) == counted("a", 5)
