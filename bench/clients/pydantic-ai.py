"""an agent: text, stream, output by call and by native schema"""

import asyncio
import os

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=os.environ["ENGINE_URL"] + "/v1", api_key="none")
model = OpenAIChatModel(os.environ["ENGINE_MODEL"], provider=provider)
LIMIT = {"max_tokens": 80}


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


async def streamed() -> str:
    async with Agent(model, model_settings=LIMIT).run_stream("Say hello.") as run:
        return "".join([part async for part in run.stream_text(delta=True)])


assert Agent(model, model_settings=LIMIT).run_sync("Say hello.").output
assert asyncio.run(streamed())
for output in (Person, NativeOutput(Person)):
    assert Agent(model, output_type=output, model_settings=LIMIT).run_sync("Ann is 30 years old.").output.age >= 0
