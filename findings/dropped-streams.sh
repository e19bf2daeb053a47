#!/bin/sh
# Whether a reply goes on once its caller has left the loop depends on the client. After `break`, or an error raised in the
# loop, anthropic and huggingface_hub close the connection at once, and the server can stop. openai's Stream and its
# iterator hold each other, so the connection stays until the cyclic garbage collector comes by, with asyncio as well: the
# server generates on, often to the end, for nobody, though the source says that its `finally` closes the response even if
# the consumer does not read all data. `with stream:`, or its close(), is needed. huggingface_hub errs the other way: nothing
# holds the client but its caller, and its end is the end of its streams. A function that makes a client and returns
# `chat_completion(…, stream=True)` returns a stream that raises at the first event; openai's and anthropic's go on.
#
# The server sends up to 300 events, one each 5 ms, and notes after how many of them the connection was closed.
#
# Seen: openai 3.57.0, anthropic 2.14.0, huggingface_hub 2.4.0, httpx2 2.16.2, Python 3.11, 2026-12-01.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    openai==3.57.0 anthropic==2.14.0 huggingface_hub==2.4.0 httpx2==2.16.2
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import gc
import json
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic
import openai
from huggingface_hub import AsyncInferenceClient, InferenceClient

EVENTS = 300
sent = queue.Queue()  # how many events each reply sent until it ended
text = {"index": 0, "delta": {"content": "a"}, "finish_reason": None}
chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [text]}
block = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}
CHUNK = b"data: %b\n\n" % json.dumps(chunk).encode()
BLOCK = b"event: content_block_delta\ndata: %b\n\n" % json.dumps(block).encode()


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        number = 0
        try:
            while number < EVENTS:
                self.wfile.write(BLOCK if self.path.endswith("messages") else CHUNK)
                number += 1
                time.sleep(0.005)
        except OSError:
            pass
        sent.put(number)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"
asked = {"messages": [{"role": "user", "content": "Go on."}], "stream": True}
of_model = {"model": "m", **asked}
own = {"api_key": "none", "base_url": url, "max_retries": 0}
hub = {"api_key": "none", "base_url": url}


def by_openai(client=None):
    return (client or openai.OpenAI(**own)).chat.completions.create(**of_model)


def by_anthropic(client=None):
    return (client or anthropic.Anthropic(**own)).messages.create(**of_model, max_tokens=9)


def by_hub(client=None):
    return (client or InferenceClient(**hub)).chat_completion(**asked)


def take_two(stream):
    for number, _ in enumerate(stream):
        if number == 1:
            break


async def take_two_of(opening):
    number = 0
    async for _ in await opening:
        number += 1
        if number == 2:
            break


def broken_off(name, closed, after=lambda: None):
    """`closed` says whether the reply was to end early."""
    after()
    number = sent.get(timeout=30)
    print(f"{name:44} {number:3} of {EVENTS} events sent")
    assert (number < EVENTS // 2) is closed, name


async def asynchronous():
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # of generators that it closes at its end
    clients = openai.AsyncOpenAI(**own), anthropic.AsyncAnthropic(**own), AsyncInferenceClient(**hub)
    for ask, client in zip((by_openai, by_anthropic, by_hub), clients):
        await take_two_of(ask(client))
        await asyncio.to_thread(broken_off, f"{ask.__name__}, asyncio, after break", ask is not by_openai)


gc.disable()  # it comes at its own time, often soon, which would make this a matter of luck
clients = openai.OpenAI(**own), anthropic.Anthropic(**own), InferenceClient(**hub)
for ask, client in zip((by_openai, by_anthropic, by_hub), clients):
    take_two(ask(client))
    broken_off(f"{ask.__name__}, after break", ask is not by_openai)
take_two(by_openai(clients[0]))
broken_off("by_openai, after break and gc.collect()", True, gc.collect)
with by_openai(clients[0]) as stream:
    take_two(stream)
broken_off("by_openai, after break in `with stream`", True)
asyncio.run(asynchronous())

gc.enable()
for ask in (by_openai, by_anthropic, by_hub):
    try:
        found = sum(1 for _ in ask())  # its client has no other name
    except Exception as error:
        found = type(error).__name__
    print(f"{ask.__name__}, the client is gone: {found}")
    assert found == ("StreamClosed" if ask is by_hub else EVENTS)
PYTHON
