"""a pipeline of a prompt and a chat generator; stream; a forced call; a schema"""

import os

from haystack import Pipeline
from haystack.components.builders import ChatPromptBuilder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


def generator(**generation) -> OpenAIChatGenerator:
    return OpenAIChatGenerator(
        api_key=Secret.from_token("none"),
        model=os.environ["ENGINE_MODEL"],
        api_base_url=os.environ["ENGINE_URL"] + "/v1",
        generation_kwargs={"max_tokens": 80, **generation},
    )


pipeline = Pipeline()
pipeline.add_component("prompt", ChatPromptBuilder(template=[ChatMessage.from_user("Say {{word}}.")]))
pipeline.add_component("llm", generator())
pipeline.connect("prompt.prompt", "llm.messages")
assert pipeline.run({"prompt": {"word": "hello"}})["llm"]["replies"][0].text

heard = []
said = [ChatMessage.from_user("Ann is 30 years old.")]
assert generator().run(said, streaming_callback=heard.append)["replies"][0].text and heard
city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
weather = Tool(name="weather", description="The weather of a city.", parameters=city, function=lambda city: "Rain.")
asked = [ChatMessage.from_user("What is the weather in Paris?")]
reply = generator(tool_choice="required").run(asked, tools=[weather])["replies"][0]
assert reply.tool_calls and reply.tool_calls[0].arguments["city"]
assert Person.model_validate_json(generator(response_format=Person).run(said)["replies"][0].text)
