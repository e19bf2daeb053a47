"""a message, stream, a forced call and its result, tokens counted"""

import os

from anthropic import Anthropic

client = Anthropic(base_url=os.environ["ENGINE_URL"], api_key="none")
model = os.environ["ENGINE_MODEL"]
SAY = [{"role": "user", "content": "Say hello."}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS = [{"name": "weather", "description": "The weather of a city.", "input_schema": CITY}]

whole = client.messages.create(model=model, max_tokens=20, messages=SAY, system="Be brief.")
assert whole.content[0].text and whole.usage.output_tokens <= 20
with client.messages.stream(model=model, max_tokens=20, messages=SAY) as stream:
    assert "".join(stream.text_stream)
    assert stream.get_final_message().stop_reason in ("end_turn", "max_tokens")
asked = [{"role": "user", "content": "What is the weather in Paris?"}]
choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
called = client.messages.create(model=model, max_tokens=80, messages=asked, tools=TOOLS, tool_choice=choice)
(use,) = (block for block in called.content if block.type == "tool_use")
assert called.stop_reason == "tool_use" and use.input["city"]
result = {"type": "tool_result", "tool_use_id": use.id, "content": "Rain."}
asked += [{"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
assert client.messages.create(model=model, max_tokens=20, messages=asked, tools=TOOLS).content
assert client.messages.count_tokens(model=model, messages=asked, tools=TOOLS).input_tokens > 20
