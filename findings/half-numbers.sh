#!/bin/sh
# A tool call that is cut short reaches the caller of anthropic's `stream()` as a dictionary of what could be read. A string
# that was not finished is left out. A number that was not finished stays, as another number: of 1250 it is 12, of 12.5e3
# it is 12.5, and the input is valid by the tool's schema. Only `stop_reason` tells that the message was cut, and nothing
# tells which value was. While it streams, a number comes, goes and comes back: 12, then nothing for `12.`, then 12.5. Both
# are jiter's, whose partial mode is said to discard the last string. openai's `stream()` shows the same numbers, as
# `parsed_arguments` of its events, but raises at the end. So who runs a tool call once its input is valid pays 12 for 1250.
#
# Seen: anthropic 2.14.0, openai 3.57.0, jiter 0.19.0, jsonschema 4.26.0, Python 3.11, 2026-12-01.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    anthropic==2.14.0 openai==3.57.0 jiter==0.19.0 jsonschema==4.26.0
"$folder/venv/bin/python" - <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic
import jsonschema
import openai

PAY = {"type": "object", "required": ["amount"], "additionalProperties": False,
       "properties": {"amount": {"type": "number"}, "to": {"type": "string"}}}
ASKED = {"model": "m", "messages": [{"role": "user", "content": "Pay."}]}
body = b""  # what the server answers next


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
own = {"api_key": "none", "base_url": f"http://127.0.0.1:{server.server_port}", "max_retries": 0}


def by_anthropic(pieces):
    """The inputs that the stream showed in turn, and the final message's input with its reason."""
    global body
    message = {"id": "1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None,
               "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
    block = {"type": "tool_use", "id": "2", "name": "pay", "input": {}}
    events = [{"type": "message_start", "message": message},
              {"type": "content_block_start", "index": 0, "content_block": block}]
    for piece in pieces:
        delta = {"type": "input_json_delta", "partial_json": piece}
        events.append({"type": "content_block_delta", "index": 0, "delta": delta})
    ending = {"stop_reason": "max_tokens", "stop_sequence": None}
    events += [{"type": "content_block_stop", "index": 0},
               {"type": "message_delta", "delta": ending, "usage": {"output_tokens": 9}}, {"type": "message_stop"}]
    body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()
    tools = [{"name": "pay", "input_schema": PAY}]
    with anthropic.Anthropic(**own).messages.stream(**ASKED, max_tokens=9, tools=tools) as stream:
        shown = [event.snapshot for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens"
    return shown, final.content[0].input


def by_openai(pieces):
    """The arguments that the events showed in turn, and the name of the error at the end."""
    global body
    call = {"index": 0, "id": "2", "type": "function", "function": {"name": "pay", "arguments": ""}}
    deltas = [{"role": "assistant", "tool_calls": [call]}]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in pieces]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "length"})
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    lines = [json.dumps({**chunk, "choices": [choice]}) for choice in choices]
    body = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()
    tools = [{"type": "function", "function": {"name": "pay", "parameters": PAY, "strict": True}}]
    shown = []
    try:
        with openai.OpenAI(**own).chat.completions.stream(**ASKED, tools=tools) as stream:
            for event in stream:
                if event.type == "tool_calls.function.arguments.delta":
                    shown.append(event.parsed_arguments)
            stream.get_final_completion()
    except openai.LengthFinishReasonError as error:
        return shown, type(error).__name__
    return shown, None


valid = jsonschema.Draft202012Validator(PAY).is_valid
CASES = (  # what arrived before the cut, and the input of the final message
    (['{"to": "ann", ', '"amount": 12'], {"to": "ann", "amount": 12}),  # it would have been 1250
    (['{"amount": 12', ".5"], {"amount": 12.5}),  # and here 12.5e3
    (['{"amount": 1e1'], {"amount": 10.0}),  # and here 1e15
    (['{"amount": 12', "."], {}),
    (['{"amount": 1250, "to": "an'], {"amount": 1250}),
)
for pieces, expected in CASES:
    _, found = by_anthropic(pieces)
    print(f"{''.join(pieces):28} anthropic: {json.dumps(found):30} {'valid' if valid(found) else 'not valid'}")
    assert found == expected and valid(found) == ("amount" in expected)

steps = [{"amount": 1}, {"amount": 12}, {}, {"amount": 12.5}]
for ask, end in ((by_anthropic, {"amount": 12.5}), (by_openai, "LengthFinishReasonError")):
    shown, final = ask(['{"amount": 1', "2", ".", "5"])
    print(f"{ask.__name__}, as 1, 2, . and 5 arrive: {shown[-4:]}; at the end {final}")
    assert shown[-4:] == steps and final == end
PYTHON
