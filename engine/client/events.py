"""Server-sent events of a reply, as OpenAI's streams and SGLang's native one have them, read into one shape.

Left out: the wire beneath (engine/client/client.py, engine/client/bench/wire.py), and events of other APIs.
"""

from collections.abc import Callable
from typing import Any, Literal

import msgspec
from msgspec import Struct

from engine.errors import WorkerError

FinishReason = Literal["stop", "length", "abort"]
DONE = b"[DONE]"
# A reason of another server that is none of ours ended the reply without a stop of ours.
FINISHES: dict[str, FinishReason] = {"stop": "stop", "tool_calls": "stop", "length": "length"}


class _Delta(Struct):
    """Reasoning is shown as it comes, like the content; servers have two names for it."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def thought(self) -> str:
        return self.reasoning_content or self.reasoning or ""

    @property
    def text(self) -> str:
        return self.thought + (self.content or "")


class _Choice(Struct):
    """An event of a chat has a `delta`, a whole reply a `message`."""

    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None


class _Details(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Completion(Struct):
    """An event of either kind of OpenAI stream, or a reply that is not streamed."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Meta(Struct):
    finish_reason: dict[str, Any] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class _Generated(Struct):
    """An event of a native stream: the reply so far."""

    text: str = ""
    meta_info: _Meta | None = None
    error: Any = None


_COMPLETION = msgspec.json.Decoder(_Completion)
_GENERATED = msgspec.json.Decoder(_Generated)


class Reading:
    """What the events of one reply have said so far. A server that counts nothing leaves the counts 0."""

    def __init__(self, api: str) -> None:
        self.take: Callable[[bytes], str] = self._native if api == "native" else self._openai
        self.finish: FinishReason | None = None
        self.matched: int | str | None = None  # what stopped it, where the server says so
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.reasoning = ""  # how the text that the last event added begins
        self._so_far = 0

    def _openai(self, data: bytes) -> str:
        """The text that an event adds; a whole reply is one event. Raises WorkerError where it tells of an error."""
        event = _COMPLETION.decode(data)
        if event.error is not None:
            raise WorkerError(error_message(event.error))
        if (usage := event.usage) is not None:
            self.prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens
            self.cached_tokens = (usage.prompt_tokens_details or _Details()).cached_tokens or 0
        text = thought = ""
        for choice in event.choices:
            said = choice.delta or choice.message
            text += said.text if said else choice.text or ""
            thought = said.thought if said else ""
            self.matched = choice.matched_stop
            self._end(choice.finish_reason)
        self.reasoning = thought
        return text

    def _native(self, data: bytes) -> str:
        """As `_openai`."""
        event = _GENERATED.decode(data)
        if event.error is not None:
            raise WorkerError(error_message(event.error))
        if (meta := event.meta_info) is not None:
            self.prompt_tokens, self.completion_tokens = meta.prompt_tokens, meta.completion_tokens
            self.cached_tokens = meta.cached_tokens
            self._end((meta.finish_reason or {}).get("type"))
        text = event.text[self._so_far :]
        self._so_far = len(event.text)
        return text

    def _end(self, reason: str | None) -> None:
        if reason:
            self.finish = FINISHES.get(reason, "abort")


def error_message(error: Any) -> str:
    """The message of an error object, as the servers we know word it."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def refusal(body: bytes) -> str:
    """What an error answer says."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace")[:500]
    if isinstance(said, dict):
        said = said.get("error") or said.get("detail") or said
    return error_message(said)
