"""chat, stream, a forced call, a parsed schema, a response, a streamed response"""

import json
import os

from openai import OpenAI
from pydantic import BaseModel, Field

client = OpenAI(base_url=os.environ["ENGINE_URL"] + "/v1", api_key="none")
model = client.models.list().data[0].id
SAY = [{"role": "user", "content": "Say hello."}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "The weather of a city.", "parameters": CITY}


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


whole = client.chat.completions.create(model=model, messages=SAY, max_tokens=20)
assert whole.choices[0].message.content and whole.usage.completion_tokens <= 20

events = client.chat.completions.create(
    model=model, messages=SAY, max_tokens=20, stream=True, stream_options={"include_usage": True}
)
*texts, last = events
assert "".join(event.choices[0].delta.content or "" for event in texts) and last.usage.prompt_tokens

asked = [{"role": "user", "content": "What is the weather in Paris?"}]
tools = [{"type": "function", "function": TOOL}]
called = client.chat.completions.create(
    model=model, messages=asked, max_tokens=80, tools=tools, tool_choice="required", parallel_tool_calls=False
)
call = called.choices[0].message.tool_calls[0]
assert call.function.name == "weather" and json.loads(call.function.arguments)["city"]
asked += [called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
assert client.chat.completions.create(model=model, messages=asked, max_tokens=20, tools=tools).choices

parsed = client.chat.completions.parse(
    model=model, messages=[{"role": "user", "content": "Ann is 30."}], max_tokens=60, response_format=Person
)
assert parsed.choices[0].message.parsed.age >= 0

assert client.responses.create(model=model, input="Say hello.", max_output_tokens=20).output_text
with client.responses.stream(model=model, input="Say hello.", max_output_tokens=20) as stream:
    first, *_, last = stream
    assert first.type == "response.created" and last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text
assert client.responses.parse(
    model=model, input="Ann is 30.", max_output_tokens=60, text_format=Person
).output_parsed.name
