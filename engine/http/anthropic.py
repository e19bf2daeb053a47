"""The Anthropic API: /v1/messages and /v1/messages/count_tokens, for text.

A last message of the assistant's is continued; successive messages of one role are one. Left out, and refused by
name: tools, images and documents, thinking, batches.
"""

from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal, get_args
from uuid import uuid4

from aiohttp import web
from msgspec import Meta

from engine.http.service import SERVICE
from engine.http.sse import describe_error, send_events
from engine.http.tokens import size_of, with_text
from engine.http.wire import Body, Reply, check_served, json_response, to_json
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


class CountReply(Reply, frozen=True):
    input_tokens: int


class AnthropicErrorFields(Reply, frozen=True):
    type: str
    message: str
    param: str | None
    code: str | None


class AnthropicErrorReply(Reply, frozen=True):
    type: Literal["error"]
    error: AnthropicErrorFields


class TextContent(Reply, frozen=True):
    text: str
    type: Literal["text"] = "text"


class MessageUsage(Reply, frozen=True):
    """Tokens so far; as Anthropic counts, `input_tokens` are those that the cache did not hold."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0


class Stop(Reply, frozen=True):
    """Why a message ended; null for one that /abort_request ended, as Anthropic has no word for that."""

    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"] | None = None
    stop_sequence: str | None = None


class MessageReply(Stop, kw_only=True, frozen=True):
    id: str
    model: str
    content: list[TextContent]
    usage: MessageUsage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class MessageStart(Reply, frozen=True):
    message: MessageReply
    type: Literal["message_start"] = "message_start"


class BlockStart(Reply, frozen=True):
    content_block: TextContent
    index: int = 0
    type: Literal["content_block_start"] = "content_block_start"


class TextDelta(Reply, frozen=True):
    text: str
    type: Literal["text_delta"] = "text_delta"


class BlockDelta(Reply, frozen=True):
    delta: TextDelta
    index: int = 0
    type: Literal["content_block_delta"] = "content_block_delta"


class BlockStop(Reply, frozen=True):
    index: int = 0
    type: Literal["content_block_stop"] = "content_block_stop"


class MessageDelta(Reply, frozen=True):
    delta: Stop
    usage: MessageUsage
    type: Literal["message_delta"] = "message_delta"


class MessageStop(Reply, frozen=True):
    type: Literal["message_stop"] = "message_stop"


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | AnthropicErrorReply
EVENTS = get_args(Event)


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


def error_of(error: dict[str, Any], status: int) -> AnthropicErrorReply:
    """An OpenAI error object, worded as Anthropic's; `param` and `code` are kept beside it."""
    kind = ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return AnthropicErrorReply("error", AnthropicErrorFields(**error["error"] | {"type": kind}))


def failure_event(error: Exception) -> bytes:
    """The last event of a stream that fails."""
    status, fields = describe_error(error)
    return _event(error_of(fields, status))


def _event(event: Event) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.type.encode(), to_json(event))


class AnthropicReply:
    """Chunks as a message, or as its events: start, one content block, what ended it, stop."""

    def __init__(self, rid: str, model: str) -> None:
        self._rid = rid
        self._model = model
        self._started = False

    def event(self, chunk: Chunk) -> bytes:
        """The events of `chunk`."""
        events = b""
        if not self._started:
            self._started = True
            opened = MessageReply(id=self._rid, model=self._model, content=[], usage=_usage(chunk))
            events = _event(MessageStart(opened)) + _event(BlockStart(TextContent("")))
        if chunk.text:
            events += _event(BlockDelta(TextDelta(chunk.text)))
        if chunk.finish is not None:
            delta = MessageDelta(Stop(*_stop(chunk)), _usage(chunk))
            events += _event(BlockStop()) + _event(delta) + _event(MessageStop())
        return events

    def whole(self, text: str, last: Chunk) -> bytes:
        """The message that is not streamed."""
        content = [TextContent(text)] if text else []
        reason, sequence = _stop(last)
        return to_json(
            MessageReply(
                id=self._rid,
                model=self._model,
                content=content,
                usage=_usage(last),
                stop_reason=reason,
                stop_sequence=sequence,
            )
        )


def _stop(last: Chunk) -> tuple[Literal["end_turn", "max_tokens", "stop_sequence"] | None, str | None]:
    """Why the message ended, and at which stop sequence."""
    match last.finish, last.matched:
        case "stop", str(matched):
            return "stop_sequence", matched
        case "stop", _:
            return "end_turn", None
        case "length", _:
            return "max_tokens", None
        case _:
            return None, None


def _usage(chunk: Chunk) -> MessageUsage:
    fresh = chunk.prompt_tokens - chunk.cached_tokens
    return MessageUsage(fresh, chunk.cached_tokens, chunk.completion_tokens)
