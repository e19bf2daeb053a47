"""an agent that calls a tool, over chat completions and over responses; stream; an output type"""

import asyncio
import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=os.environ["ENGINE_URL"] + "/v1", api_key="none")
called = []


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    called.append(city)
    return f"Rain in {city}."


async def main() -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model=os.environ["ENGINE_MODEL"], openai_client=client)
        plain = ModelSettings(max_tokens=300, temperature=0)
        forced = plain.resolve(ModelSettings(tool_choice="required", parallel_tool_calls=False))
        talker = Agent("talker", instructions="Be brief.", model=model, model_settings=plain)
        assert (await Runner.run(talker, "Say hello.")).final_output
        stream = Runner.run_streamed(talker, "Say hello.")
        assert [event.type async for event in stream.stream_events()] and stream.final_output
        called.clear()
        caller = Agent("caller", model=model, tools=[weather], model_settings=forced)
        assert (await Runner.run(caller, "What is the weather in Paris?")).final_output and called
        reader = Agent("reader", model=model, output_type=Person, model_settings=plain)
        assert (await Runner.run(reader, "Ann is 30 years old.")).final_output.age >= 0


asyncio.run(main())
