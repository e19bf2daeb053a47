"""The real model is made to call tools, through the real client; its template knows no tools, and it is very small."""

import json
from typing import Any

import openai
import pytest
from real_server import real_server

pytestmark = pytest.mark.anyio
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 5},
            },
            "required": ["unit", "days"],
            "additionalProperties": False,
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
ASKED: Any = [{"role": "user", "content": "Will it rain in Paris tomorrow?"}]


async def test_calls_that_are_forced() -> None:
    async with (
        real_server() as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=90) as api,
    ):
        await check_calls(api)


async def check_calls(api: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": "smollm2-135m", "messages": ASKED, "temperature": 1, "max_tokens": 200}
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = await api.chat.completions.create(**asked, tools=[WEATHER, NOW], tool_choice=named, seed=1)
    for choice in answer.choices:
        (call,) = choice.message.tool_calls or ()
        assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "get_weather")
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"unit", "days"} and arguments["unit"] in ("celsius", "fahrenheit")
        assert 1 <= arguments["days"] <= 5
    async with api.chat.completions.stream(
        **asked, tools=[NOW], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        (choice,) = (await stream.get_final_completion()).choices
    (call,) = choice.message.tool_calls or ()
    assert (choice.finish_reason, call.function.name, json.loads(call.function.arguments)) == ("tool_calls", "now", {})
