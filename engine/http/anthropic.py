"""The Anthropic API: /v1/messages and /v1/messages/count_tokens, for text.

A last message of the assistant's is continued; successive messages of one role are one. Left out, and refused by
name: tools, images and documents, thinking, batches.
"""

from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from aiohttp import web
from msgspec import Meta

from engine.http.openapi import Reply
from engine.http.service import SERVICE
from engine.http.sse import describe_error, send_events
from engine.http.tokens import size_of, with_text
from engine.http.wire import Body, check_served, json_response, to_json
from engine.messages import Chunk, Generate, SamplingParams
from engine.sampling import INT32_MAX, check_sampling

PREFIX = "/v1/messages"
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
CLIENT_NAMES = {"stop": "stop_sequences"}


# ── bodies and replies ───────────────────────────────────────────────────────────────────────


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: Any = None  # ignored: every prefix is cached
    citations: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {"citations": ([],)}


class AnthropicMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[TextBlock]


class CountBody(Body):
    """What a prompt is made of. Null is the same as absent."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    cache_control: Any = None  # ignored
    user_profile_id: Any = None  # ignored
    workspace_id: Any = None  # ignored
    output_config: Any = None
    speed: Any = None
    thinking: Any = None
    tools: Any = None
    tool_choice: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        "output_config": ({},),
        "speed": ("standard",),
        "thinking": ({"type": "disabled"},),
        "tools": ([],),
        "tool_choice": ({"type": "auto"}, {"type": "none"}),
    }


class MessagesBody(CountBody, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: Any = None  # ignored
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    service_tier: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        **CountBody.unserved,
        "container": (),
        "diagnostics": (),
        "inference_geo": (),
        "service_tier": ("auto", "standard_only"),
    }


class CountReply(Reply):
    input_tokens: int


class AnthropicErrorFields(Reply):
    type: str
    message: str
    param: str | None
    code: str | None


class AnthropicErrorReply(Reply):
    type: Literal["error"]
    error: AnthropicErrorFields


# ── handlers ─────────────────────────────────────────────────────────────────────────────────


async def messages(request: web.Request, body: MessagesBody) -> web.StreamResponse:
    """Answer a conversation in Anthropic's shape, whole or streamed."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    given = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(body, name)) is not None}
    sampling = SamplingParams(max_tokens=body.max_tokens, stop=tuple(body.stop_sequences or ()), **given)
    check_sampling(sampling, CLIENT_NAMES)
    conversation = conversation_of(body)
    going_on = conversation[-1]["role"] == "assistant"
    rid = f"msg_{uuid4().hex}"
    job = Generate(
        rid, sampling, messages=conversation, add_generation_prompt=not going_on, continue_final_message=going_on
    )
    headers = {"X-Request-Id": rid, "Request-Id": rid}
    reply = AnthropicReply(rid, service.model)
    async with aclosing(service.metrics.watch(service.front.generate(job), "messages")) as chunks:
        if body.stream:
            return await send_events(request, chunks, reply, headers, failure=failure_event)
        texts = []
        async for chunk in chunks:
            texts.append(chunk.text)
    return json_response(reply.whole("".join(texts), chunk), headers=headers)


async def count_tokens(request: web.Request, body: CountBody) -> web.Response:
    """Count the tokens of a conversation as /v1/messages would read it."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    conversation = conversation_of(body)
    going_on = conversation[-1]["role"] == "assistant"
    ids = await with_text(
        service,
        size_of(conversation),
        lambda text: text.encode_chat(conversation, continue_final_message=going_on),
    )
    return json_response(CountReply(len(ids)))


def conversation_of(body: CountBody) -> list[dict[str, Any]]:
    """The messages as a chat template takes them: the system's first, no two of one role in a row."""
    turns = [("system", _text(body.system, "system"))] if body.system else []
    for index, message in enumerate(body.messages):
        turns.append((message.role, _text(message.content, f"messages[{index}].content")))
    conversation: list[dict[str, Any]] = []
    for role, text in turns:
        if conversation and conversation[-1]["role"] == role:
            conversation[-1]["content"] += "\n" + text
        else:
            conversation.append({"role": role, "content": text})
    return conversation


def _text(content: str | list[TextBlock], path: str) -> str:
    if isinstance(content, str):
        return content
    for index, block in enumerate(content):
        check_served(block, f"{path}[{index}].")
    return "".join(block.text for block in content)


# ── replies ──────────────────────────────────────────────────────────────────────────────────


def error_of(error: dict[str, Any], status: int) -> dict[str, Any]:
    """An OpenAI error object, worded as Anthropic's; `param` and `code` are kept beside it."""
    fields = error["error"]
    kind = ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**fields, "type": kind}}


def failure_event(error: Exception) -> bytes:
    """The last event of a stream that fails."""
    status, fields = describe_error(error)
    return _event(error_of(fields, status))


def _event(fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (fields["type"].encode(), to_json(fields))


class AnthropicReply:
    """Chunks as a message, or as its events: start, one content block, what ended it, stop."""

    def __init__(self, rid: str, model: str) -> None:
        self._head: dict[str, Any] = {"id": rid, "type": "message", "role": "assistant", "model": model}
        self._started = False

    def event(self, chunk: Chunk) -> bytes:
        """The events of `chunk`."""
        events = b""
        if not self._started:
            self._started = True
            opened: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(chunk)}
            block = {"type": "text", "text": ""}
            events = _event({"type": "message_start", "message": self._head | opened})
            events += _event({"type": "content_block_start", "index": 0, "content_block": block})
        if chunk.text:
            delta = {"type": "text_delta", "text": chunk.text}
            events += _event({"type": "content_block_delta", "index": 0, "delta": delta})
        if chunk.finish is not None:
            events += _event({"type": "content_block_stop", "index": 0})
            events += _event({"type": "message_delta", "delta": _stop(chunk), "usage": _usage(chunk)})
            events += _event({"type": "message_stop"})
        return events

    def whole(self, text: str, last: Chunk) -> bytes:
        """The message that is not streamed."""
        content = [{"type": "text", "text": text}] if text else []
        return to_json({**self._head, "content": content, **_stop(last), "usage": _usage(last)})


def _stop(last: Chunk) -> dict[str, Any]:
    """Why the message ended; Anthropic has no word for a request that /abort_request ended, so that is null."""
    if last.finish == "stop" and isinstance(last.matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": last.matched}
    reasons = {"stop": "end_turn", "length": "max_tokens"}
    return {"stop_reason": reasons.get(last.finish or ""), "stop_sequence": None}


def _usage(chunk: Chunk) -> dict[str, int]:
    """Tokens so far; as Anthropic counts, `input_tokens` are those that the cache did not hold."""
    return {
        "input_tokens": chunk.prompt_tokens - chunk.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": chunk.cached_tokens,
        "output_tokens": chunk.completion_tokens,
    }
