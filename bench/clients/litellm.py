"""chat and stream through openai/, a forced call, a message through anthropic/"""

import json
import os

import litellm

URL, MODEL = os.environ["ENGINE_URL"], os.environ["ENGINE_MODEL"]
ours = {"model": f"openai/{MODEL}", "api_base": URL + "/v1", "api_key": "none"}
SAY = [{"role": "user", "content": "Say hello."}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}

assert litellm.completion(**ours, messages=SAY, max_tokens=20).choices[0].message.content
parts = litellm.completion(**ours, messages=SAY, max_tokens=20, stream=True)
assert "".join(part.choices[0].delta.content or "" for part in parts)
asked = [{"role": "user", "content": "What is the weather in Paris?"}]
called = litellm.completion(**ours, messages=asked, max_tokens=80, tools=[TOOL], tool_choice="required")
assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["city"]
theirs = {"model": f"anthropic/{MODEL}", "api_base": URL, "api_key": "none"}
assert litellm.completion(**theirs, messages=SAY, max_tokens=20).choices[0].message.content
