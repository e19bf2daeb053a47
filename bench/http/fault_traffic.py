"""The clients of faults.py: good ones, ones that leave, slow ones, and a mixture of all that the API knows."""

import json
import random
import socket
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aiohttp
import anyio
from msgspec import Struct

PROMPTS = 12
TOKENS = (8, 24, 48)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
RECEIVE_BUFFER = 2048  # bytes, so that a slow reader is felt by the server


class Reply(Struct):
    """What came of one stream. `error` is empty where it ended well."""

    status: int = 0
    text: str = ""
    code: str = ""
    error: str = ""
    pieces: int = 0


async def stream(
    session: aiohttp.ClientSession,
    prompt: str,
    tokens: int,
    *,
    gaps: list[float] | None = None,
    leave_after: int | None = None,
) -> Reply:
    """One completion at temperature 0, streamed. `gaps` gets the milliseconds between its pieces; the client leaves in
    the middle after so many events."""
    reply, ended = Reply(), False
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    last = 0.0
    try:
        async with session.post("/v1/completions", json=body) as answer:
            reply.status = answer.status
            if answer.status != 200:
                return _failed(reply, (await answer.json())["error"])
            if leave_after == 0:
                return reply
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    ended = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    return _failed(reply, event["error"])
                now = time.perf_counter()
                if gaps is not None and reply.pieces:
                    gaps.append(1e3 * (now - last))
                last = now
                reply.pieces += 1
                reply.text += event["choices"][0]["text"] if event["choices"] else ""
                if reply.pieces == leave_after:
                    return reply
    except aiohttp.ClientError as error:
        return _failed(reply, {"message": f"the connection broke: {error!r}", "code": "connection"})
    if not ended and leave_after is None:
        return _failed(reply, {"message": "the stream stopped without [DONE]", "code": "cut"})
    return reply


def _failed(reply: Reply, error: dict[str, Any]) -> Reply:
    reply.error, reply.code = str(error.get("message") or "no message"), str(error.get("code"))
    return reply


async def references(session: aiohttp.ClientSession, streams: int) -> dict[str, tuple[str, int]]:
    """Prompt to the text of an undisturbed server and its tokens. A prompt whose text alone is not that among others is
    left out: sums of many rows are rounded differently, and where two tokens are about as likely that shows."""
    asked = {f"{number}. Tell me about the number {number * 7}": TOKENS[number % 3] for number in range(PROMPTS)}
    alone = {prompt: (await stream(session, prompt, tokens)).text for prompt, tokens in asked.items()}
    among: dict[str, set[str]] = {prompt: set() for prompt in asked}

    async def client(prompt: str, tokens: int) -> None:
        among[prompt].add((await stream(session, prompt, tokens)).text)

    async with anyio.create_task_group() as group:
        for index in range(3 * streams):
            group.start_soon(client, *list(asked.items())[index % PROMPTS])
    return {prompt: (text, asked[prompt]) for prompt, text in alone.items() if among[prompt] == {text}}


# ── slow ones ────────────────────────────────────────────────────────────────────────────────


def _address(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None
    return parts.hostname, parts.port or 80


async def dribble(url: str, whole: bytes, rest: bytes, seconds: float) -> str:
    """Send `whole`, and then `rest` a byte in half a second; how that ended: the server's status, or what it did."""
    until = time.monotonic() + seconds
    try:
        async with await anyio.connect_tcp(*_address(url)) as connection:
            await connection.send(whole)
            for byte in rest:
                if time.monotonic() > until:
                    return "still open"
                await connection.send(bytes([byte]))
                with anyio.move_on_after(0.5):
                    return f"status {(await connection.receive()).split()[1].decode()}"
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        return "closed"
    return "sent"


async def trickle(url: str, prompt: str, seconds: float) -> int:
    """Ask for a long stream and read a byte a second of it; how many came."""
    body = json.dumps({"prompt": prompt, "max_tokens": 512, "temperature": 0, "stream": True, "ignore_eos": True})
    head = f"{HEAD.decode()}Content-Length: {len(body)}\r\n\r\n"
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    sock.setblocking(False)
    count, until = 0, time.monotonic() + seconds
    with sock, suppress(ConnectionError):
        with suppress(BlockingIOError):
            sock.connect(_address(url))
        await anyio.wait_writable(sock)
        sock.sendall((head + body).encode())
        while time.monotonic() < until:
            with anyio.move_on_after(1.0):
                await anyio.wait_readable(sock)
                count += len(sock.recv(1))
                await anyio.sleep_forever()  # the rest of the second
    return count


# ── a mixture ────────────────────────────────────────────────────────────────────────────────

Answered = tuple[str, int, bool]


async def one_of_many(session: aiohttp.ClientSession, rng: random.Random) -> Answered:
    """One request of a kind drawn at random: its kind, the status, and whether that is right for it."""
    kind = rng.choice(list(KINDS))
    try:
        status, good = await KINDS[kind](session, rng)
    except aiohttp.ClientError as error:
        return f"{kind} ({error!r})", 0, False
    return kind, status, good


async def _post(session: aiohttp.ClientSession, path: str, body: object) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with session.post(path, data=data, headers={"Content-Type": "application/json"}) as answer:
        text = await answer.text()
    return answer.status, json.loads(text) if text.startswith("{") else text


def _chat(rng: random.Random, **more: Any) -> dict[str, Any]:
    said = f"Tell me {rng.randrange(10**6)} things about {rng.choice(('rivers', 'trains', 'bread'))}."
    return {"messages": [{"role": "user", "content": said}], "max_tokens": rng.choice((4, 12, 24)), **more}


async def _plain(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
    status, body = await _post(session, "/v1/chat/completions", _chat(rng, temperature=rng.random()))
    return status, status == 200 and bool(body["choices"])


async def _several(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
    status, body = await _post(session, "/v1/chat/completions", _chat(rng, n=3, seed=rng.randrange(100)))
    return status, status == 200 and len(body["choices"]) == 3


async def _logprobs(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
    more = {"logprobs": True, "top_logprobs": 3, "logit_bias": {"5": 2}, "frequency_penalty": 0.5}
    status, body = await _post(session, "/v1/chat/completions", _chat(rng, **more))
    return status, status == 200 and bool(body["choices"][0]["logprobs"]["content"])


async def _streamed(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
    reply = await stream(session, f"Number {rng.random()}", 16)
    return reply.status, not reply.error


async def _left(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
    reply = await stream(session, f"Number {rng.random()}", 64, leave_after=rng.randrange(1, 9))
    return reply.status, not reply.error


async def _schema(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
    """A schema that no one has sent before."""
    names = [f"field_{rng.randrange(10**9)}" for _ in range(rng.randrange(1, 5))]
    properties = {name: rng.choice(({"type": "integer"}, {"type": "boolean"}, {"enum": ["a", name]})) for name in names}
    schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    wish = {"type": "json_schema", "json_schema": {"name": "made", "schema": schema, "strict": True}}
    body = _chat(rng, response_format=wish, temperature=0) | {"max_tokens": 160}
    status, answer = await _post(session, "/v1/chat/completions", body)
    if status != 200:
        return status, False
    choice = answer["choices"][0]
    if choice["finish_reason"] == "length":
        return status, True
    return status, sorted(json.loads(choice["message"]["content"])) == sorted(names)


async def _tools(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
    name = f"tool_{rng.randrange(10**9)}"
    parameters = {"type": "object", "properties": {"place": {"enum": ["here", "there"]}}, "required": ["place"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}}]
    body = _chat(rng, tools=tools, tool_choice="required", temperature=0) | {"max_tokens": 64}
    status, answer = await _post(session, "/v1/chat/completions", body)
    if status != 200:
        return status, False
    choice = answer["choices"][0]
    calls = choice["message"].get("tool_calls") or []
    return status, choice["finish_reason"] == "length" or [call["function"]["name"] for call in calls] == [name]


async def _regex(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
    word = f"x{rng.randrange(10**9)}"
    body = {"text": "Say it:", "sampling_params": {"regex": f"{word}(yes|no)", "max_new_tokens": 32}}
    status, answer = await _post(session, "/generate", body)
    return status, status == 200 and answer["text"] in (f"{word}yes", f"{word}no")


async def _tokenize(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
    status, _ = await _post(session, "/tokenize", {"prompt": "word " * rng.randrange(1, 2000)})
    return status, status == 200


def _refused(path: str, body: Callable[[random.Random], object]) -> "Kind":
    async def send(session: aiohttp.ClientSession, rng: random.Random) -> tuple[int, bool]:
        status, answer = await _post(session, path, body(rng))
        return status, status == 400 and bool(answer["error"]["message"])

    return send


Kind = Callable[[aiohttp.ClientSession, random.Random], Awaitable[tuple[int, bool]]]
KINDS: dict[str, Kind] = {
    "chat": _plain,
    "n": _several,
    "logprobs": _logprobs,
    "stream": _streamed,
    "left": _left,
    "schema": _schema,
    "tools": _tools,
    "regex": _regex,
    "tokenize": _tokenize,
    "embeddings": _refused("/v1/embeddings", lambda rng: {"input": f"text {rng.random()}"}),
    "bad json": _refused("/v1/chat/completions", lambda rng: b'{"messages": [' + bytes([rng.randrange(32, 127)])),
    "bad field": _refused("/v1/chat/completions", lambda rng: _chat(rng, temperature="hot")),
    "bad schema": _refused(
        "/v1/chat/completions",
        lambda rng: _chat(
            rng, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": rng.random()}}}
        ),
    ),
    "too long": _refused("/v1/completions", lambda rng: {"prompt": "word " * 20_000, "max_tokens": 4}),
}
