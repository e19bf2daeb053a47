"""invoke, stream, bound tools, structured output by schema and by call"""

import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

chat = ChatOpenAI(
    base_url=os.environ["ENGINE_URL"] + "/v1", api_key="none", model=os.environ["ENGINE_MODEL"], max_tokens=80
)


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain in {city}."


assert chat.invoke("Say hello.").content
assert "".join(part.content for part in chat.stream("Say hello."))
called = chat.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False).invoke("The weather in Paris?")
assert called.tool_calls[0]["name"] == "weather", called
for method in ("json_schema", "function_calling"):
    assert chat.with_structured_output(Person, method=method).invoke("Ann is 30 years old.").age >= 0
