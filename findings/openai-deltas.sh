#!/bin/sh
# What a server repeats in each chunk of a chat stream is right for a client that reads the chunks, and wrong for one that uses
# openai's own helper. `chat.completions.stream()` joins every field of a delta but `index` and `type`: text is appended, and
# numbers are added, so that true and true make 2. With the role, or a call's id and name, in each chunk, the message's role
# is `assistantassistant`, and its call is to `looklook` with the id `call_1call_1`. A token's id as an extension becomes the
# sum of all ids. A list of objects without `index` ends the stream with a RuntimeError at its second chunk. Lists of
# numbers are appended. A server that was tested with `create(stream=True)` alone so breaks the tools of every
# program that uses the helper: send role, id and name once, and numbers of your own outside of the delta.
#
# The script gives the client a transport without a network.
#
# Seen: openai 3.57.0, Python 3.11, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openai==3.57.0
"$folder/venv/bin/python" - <<'PYTHON'
import json

import httpx2
import openai


def client(deltas):
    shared = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunks = [shared | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    events = [*map(json.dumps, chunks), "[DONE]"]
    answer = httpx2.Response(
        200, headers={"content-type": "text/event-stream"}, text="".join(f"data: {event}\n\n" for event in events)
    )
    transport = httpx2.MockTransport(lambda request: answer)
    return openai.OpenAI(api_key="k", base_url="http://server/v1", http_client=httpx2.Client(transport=transport))


def seen(name, deltas):
    """The field as the helper has it in the end, and the last that a reader of chunks is shown."""
    with client(deltas).chat.completions.stream(model="m", messages=[]) as stream:
        joined = stream.get_final_completion().choices[0].message.to_dict()[name]
    chunks = client(deltas).chat.completions.create(model="m", messages=[], stream=True)
    last = [chunk.choices[0].delta.to_dict()[name] for chunk in chunks][-1]
    print(f"{name:12} helper {json.dumps(joined)}\n{'':12} last chunk {json.dumps(last)}")
    return joined, last


def call(arguments):
    function = {"name": "look", "arguments": arguments}
    return {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]}


assert seen("role", [{"role": "assistant"}] * 3) == ("assistant" * 3, "assistant")
joined, last = seen("tool_calls", [call('{"at":'), call(" 1}")])
assert (joined[0]["id"], joined[0]["function"]["name"]) == ("call_1call_1", "looklook")
assert joined[0]["function"]["arguments"] == '{"at": 1}' and joined[0]["type"] == "function"
assert (last[0]["id"], last[0]["function"]["name"]) == ("call_1", "look")
assert seen("token_id", [{"token_id": id} for id in (5, 7, 11)]) == (23, 11)
assert seen("cached", [{"cached": True}] * 2) == (2, True)
assert seen("token_ids", [{"token_ids": [5]}, {"token_ids": [7]}]) == ([5, 7], [7])
try:
    seen("sources", [{"sources": [{"url": "a"}]}, {"sources": [{"url": "b"}]}])
except RuntimeError as error:
    print(f"sources      helper RuntimeError: {error}")
else:
    raise AssertionError("a RuntimeError was expected")
PYTHON
