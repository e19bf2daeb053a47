"""Programs call a server with Anthropic's API: /v1/messages, whole or streamed.

It takes messages alone, tells no log-probabilities, and follows JSON schemas but no other grammar: what it cannot do is
refused before anything is sent. Left out: caching by hand (`cache_control`), and thinking, which is read but not asked
for.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import groupby
from typing import Any

import msgspec
from msgspec import Struct

from engine.client.client import changed
from engine.client.events import error_message
from engine.errors import ConfigError, WorkerError
from engine.lang.backend import Offer, Piece, Spoken
from engine.lang.remote import Remote
from engine.lang.tools import ToolCall
from engine.lang.transcript import Prompt
from engine.lang.values import Meta
from engine.params.sampling import SamplingParams
from engine.runtime.choices import Scores
from engine.runtime.decisions import Question

URL = "https://api.anthropic.com"
VERSION = "2023-06-01"
PATH = "/v1/messages"
NAMES = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_tokens": "max_tokens"}
NAMES |= {"stop": "stop_sequences"}
HAS = {*NAMES, "json_schema"}  # which it always takes strictly
ENDS = {"max_tokens": "length", "model_context_window_exceeded": "length"}


class Anthropic(Remote):
    """A server with Anthropic's API; `model` is what requests name, and `api_key` is sent as x-api-key."""

    def __init__(self, url: str = URL, *, model: str, api_key: str | None = None, timeout: float | None = None) -> None:
        """Raises ConfigError for a URL without http:// or https://, and for no model."""
        if not model:
            raise ConfigError("model is empty; name the one that requests are for")
        super().__init__(url, model=model, timeout=timeout)
        self._headers = {"anthropic-version": VERSION, **({"x-api-key": api_key} if api_key else {})}

    # ── what it can do ───────────────────────────────────────────────────────────────────────

    def check(self, prompt: Prompt, params: SamplingParams | None, *, separate: bool = False) -> None:
        if params is None:
            self._cannot("tells no log-probabilities, which select needs; let it answer with a gen of a JSON schema")
        if not prompt.messages:
            self._cannot("takes messages alone; write the program with user(...) and assistant(...)")
        self._check(params, HAS)
        for message in prompt.messages:
            kinds = {part["type"] for part in message["content"]} if isinstance(message["content"], list) else set()
            if "video_url" in kinds:
                self._cannot("takes no video; show pictures")

    @property
    def _who(self) -> str:
        return f"the server at {self.url}, with Anthropic's API,"

    # ── calls ────────────────────────────────────────────────────────────────────────────────

    async def reply(
        self, prompt: Prompt, params: SamplingParams, *, separate: bool, stream: bool, program: str
    ) -> AsyncGenerator[Piece, None]:
        body = self._body(prompt, params)
        if not stream:
            found = msgspec.json.decode(await self._ask(PATH, body), type=Said)
            yield Piece(found.told(separate), found.thought if separate else "", found.meta)
            return
        usage, finish, matched = Usage(), "", None
        async with aclosing(self._events(PATH, {**body, "stream": True})) as events:
            async for data in events:
                event = msgspec.json.decode(data, type=Event)
                if event.error is not None:
                    raise WorkerError(error_message(event.error))
                usage = usage.then(event.message.usage if event.message else event.usage)
                finish, matched = event.delta.stop_reason or finish, event.delta.stop_sequence or matched
                thought = event.delta.thinking
                yield Piece(event.delta.text if separate else thought + event.delta.text, thought if separate else "")
        if not finish:
            raise WorkerError(f"{self.url}{PATH} ended its reply without a stop reason")
        yield Piece("", "", usage.meta(finish, matched))

    async def answer(
        self, prompt: Prompt, params: SamplingParams, offer: Offer, *, separate: bool, program: str
    ) -> Spoken:
        functions: list[dict[str, Any]] = [tool.described["function"] for tool in offer.tools]
        tools = [
            {"name": each["name"], "description": each.get("description", ""), "input_schema": each["parameters"]}
            for each in functions
        ]
        choice = {"type": "any" if offer.choice == "required" else offer.choice}
        answer = await self._ask(PATH, {**self._body(prompt, params), "tools": tools, "tool_choice": choice})
        found = msgspec.json.decode(answer, type=Said)
        return Spoken(found.told(separate), found.thought if separate else "", found.calls, found.meta)

    async def scores(
        self, prompt: Prompt, choices: Sequence[str], *, alone: bool, program: str
    ) -> tuple[list[Scores], Meta]:
        self.check(prompt, None)
        raise AssertionError("a select is refused")

    async def decide(
        self, messages: Sequence[dict[str, Any]], question: Question, *, program: str
    ) -> tuple[list[float], Meta]:
        self._cannot("tells no log-probabilities, which decide needs; let it answer with a gen of a JSON schema")

    def _body(self, prompt: Prompt, params: SamplingParams) -> dict[str, Any]:
        fields = changed(params)
        body: dict[str, Any] = {"model": self.model_name, "max_tokens": params.max_tokens}
        body |= {NAMES[name]: value for name, value in fields.items() if name in NAMES}
        if (schema := fields.get("json_schema")) is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": msgspec.json.decode(schema)}}
        system = [each["content"] for each in prompt.messages if each["role"] == "system"]
        return {**body, **({"system": "\n\n".join(system)} if system else {}), "messages": list(turns(prompt.messages))}


def turns(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`messages` of OpenAI's shape as Anthropic's: of blocks, and what tools returned is said by the user."""
    spoken = [each for each in messages if each["role"] != "system"]
    for role, run in groupby(spoken, key=lambda each: "assistant" if each["role"] == "assistant" else "user"):
        yield {"role": role, "content": [block for message in run for block in blocks(message)]}


def blocks(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The blocks of one message."""
    content = message["content"]
    if message["role"] == "tool":
        yield {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": content}
        return
    parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] == "image_url":
            yield {"type": "image", "source": source_of(part["image_url"]["url"])}
        elif part["text"]:
            yield part
    for call in message.get("tool_calls", ()):
        arguments = msgspec.json.decode(call["function"]["arguments"] or "{}")
        yield {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments}


def source_of(url: str) -> dict[str, Any]:
    """Where a picture comes from."""
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "base64", "media_type": kind, "data": data}


# ── what it answers ──────────────────────────────────────────────────────────────────────────


class Usage(Struct, frozen=True):
    """Tokens; `input_tokens` are those that no cache held."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

    def then(self, later: "Usage | None") -> "Usage":
        """What is known once `later` is told, too."""
        told = {} if later is None else {n: v for n, v in msgspec.structs.asdict(later).items() if v is not None}
        return msgspec.structs.replace(self, **told)

    def meta(self, reason: str, matched: str | None) -> Meta:
        cached = self.cache_read_input_tokens or 0
        read = (self.input_tokens or 0) + cached + (self.cache_creation_input_tokens or 0)
        return Meta(ENDS.get(reason, "stop"), matched, read, cached, self.output_tokens or 0)


class Block(Struct, frozen=True):
    """A block of a reply."""

    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")


class Said(Struct, frozen=True):
    """A whole reply."""

    content: list[Block] = []
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: Usage = Usage()

    @property
    def thought(self) -> str:
        return "".join(block.thinking for block in self.content)

    def told(self, separate: bool) -> str:
        """Its text; unless `separate`, what it thought is a part of that."""
        return "".join(block.text if separate else block.thinking + block.text for block in self.content)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        made = [block for block in self.content if block.type == "tool_use"]
        return tuple(ToolCall(block.name, bytes(block.input).decode(), block.id) for block in made)

    @property
    def meta(self) -> Meta:
        return self.usage.meta(self.stop_reason or "", self.stop_sequence)


class Delta(Struct, frozen=True):
    """What is new of a block, or of the reply."""

    text: str = ""
    thinking: str = ""
    stop_reason: str | None = None
    stop_sequence: str | None = None


class Event(Struct, frozen=True):
    """An event of a stream."""

    delta: Delta = Delta()
    message: Said | None = None
    usage: Usage | None = None
    error: Any = None
