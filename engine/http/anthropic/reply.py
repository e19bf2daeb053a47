"""Replies in Anthropic's shape: a message of content blocks, whole or as its events, and errors.

A block is what the model thinks, what it says, or a call of a tool; they come in the order of the reply. Left out:
signatures of what it thinks, which are empty.
"""

from typing import Any, Literal, get_args

import msgspec
from msgspec import UNSET, Struct, UnsetType

from engine.conversation.parsers import assembled
from engine.conversation.reading import Reading
from engine.errors import Words
from engine.http.sse import describe_error
from engine.http.streams import Around
from engine.http.wire import Reply, to_json
from engine.messages.reply import Chunk
from engine.plugin.parsing import CallArguments, CallBegin, CallEnd, Content, Event, Reasoning

MARK = "\0"  # where an event's text will stand
THREADS = "thread_unsupported_request"  # makes a client go on without threads
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


# ── what is sent ─────────────────────────────────────────────────────────────────────────────


class ErrorDetails(Reply, frozen=True):
    error_code: str


class AnthropicErrorFields(Reply, frozen=True):
    """`details` are there where Anthropic's clients go by them."""

    type: str
    message: str
    param: str | None
    code: str | None
    details: ErrorDetails | UnsetType = UNSET


class AnthropicErrorReply(Reply, frozen=True):
    type: Literal["error"]
    error: AnthropicErrorFields


class TextContent(Reply, frozen=True, tag_field="type", tag="text"):
    text: str


class ThinkingContent(Reply, frozen=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class ToolUse(Reply, frozen=True, tag_field="type", tag="tool_use"):
    """A call; its `input` is what the model wrote, read as JSON, or empty where that is no JSON object."""

    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextContent | ThinkingContent | ToolUse


class MessageUsage(Reply, frozen=True):
    """Tokens so far; as Anthropic counts, `input_tokens` are those that the cache did not hold."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None


class Stop(Reply, frozen=True):
    """Why a message ended; null for one that /abort_request ended, as Anthropic has no word for that."""

    stop_reason: StopReason = None
    stop_sequence: str | None = None


class MessageReply(Stop, kw_only=True, frozen=True):
    id: str
    model: str
    content: list[ContentBlock]
    usage: MessageUsage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class MessageStart(Reply, frozen=True):
    message: MessageReply
    type: Literal["message_start"] = "message_start"


class BlockStart(Reply, frozen=True):
    content_block: ContentBlock
    index: int
    type: Literal["content_block_start"] = "content_block_start"


class TextDelta(Reply, frozen=True, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(Reply, frozen=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputDelta(Reply, frozen=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


BlockPart = TextDelta | ThinkingDelta | InputDelta


class BlockDelta(Reply, frozen=True):
    delta: BlockPart
    index: int
    type: Literal["content_block_delta"] = "content_block_delta"


class BlockStop(Reply, frozen=True):
    index: int
    type: Literal["content_block_stop"] = "content_block_stop"


class MessageDelta(Reply, frozen=True):
    delta: Stop
    usage: MessageUsage
    type: Literal["message_delta"] = "message_delta"


class MessageStop(Reply, frozen=True):
    type: Literal["message_stop"] = "message_stop"


AnyEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | AnthropicErrorReply
EVENTS: tuple[type[Struct], ...] = get_args(AnyEvent)


# ── from chunks ──────────────────────────────────────────────────────────────────────────────


def error_of(error: dict[str, Any], status: int) -> AnthropicErrorReply:
    """An OpenAI error object, worded as Anthropic's; `param` and `code` are kept beside it."""
    kind = ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    fields = error["error"] | {"type": kind}
    details = ErrorDetails(THREADS) if fields["code"] == THREADS else UNSET
    return AnthropicErrorReply("error", AnthropicErrorFields(**fields, details=details))


def failure_event(error: Exception, words: Words) -> bytes:
    """The last event of a stream that fails."""
    status, fields = describe_error(error, words)
    return _event(error_of(fields, status))


def _event(event: AnyEvent) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.type.encode(), to_json(event))


class AnthropicReply:
    """Chunks as a message, or as its events: start, blocks one after another, what ended it, stop."""

    def __init__(self, rid: str, model: str, reading: Reading) -> None:
        self._rid = rid
        self._model = model
        self._reader = reading.reader()
        self._started = False
        self._index = -1
        self._open: type[ContentBlock] | None = None  # the kind of the block that is open
        self._around: Around | None = None  # of a text in it

    def event(self, part: tuple[int, Chunk]) -> bytes:
        """The events of a chunk of the one reply."""
        _, chunk = part
        events = b""
        if not self._started:
            self._started = True
            opened = MessageReply(id=self._rid, model=self._model, content=[], usage=_usage(chunk))
            events = _event(MessageStart(opened))
        for told in self._read(chunk):
            events += self._told(told)
        if chunk.finish is not None:
            events += self._close() + _event(MessageDelta(Stop(*self._stop(chunk)), _usage(chunk)))
            events += _event(MessageStop())
        return events

    def plain(self, index: int) -> Around | None:
        """The event of the text of plain tokens, in the block of text that is open."""
        if self._open is not TextContent or (self._reader is not None and not self._reader.plain):
            return None
        if self._around is None:
            before, _, after = _event(BlockDelta(TextDelta(MARK), self._index)).rpartition(to_json(MARK))
            self._around = before, after
        return self._around

    def whole(self, reply: Chunk) -> bytes:
        """The message that is not streamed, of its chunks joined."""
        events = self._read(reply)
        calls = iter(assembled(events).calls)
        content: list[ContentBlock] = []
        for told in events:
            match told:
                case Content(text):
                    content.append(TextContent(text))
                case Reasoning(text):
                    content.append(ThinkingContent(text))
                case CallBegin():
                    call = next(calls)
                    content.append(ToolUse(call.id, call.name, _object(call.arguments)))
        reason, sequence = self._stop(reply)
        return to_json(
            MessageReply(
                id=self._rid,
                model=self._model,
                content=content,
                usage=_usage(reply),
                stop_reason=reason,
                stop_sequence=sequence,
            )
        )

    def _read(self, chunk: Chunk) -> list[Event]:
        if self._reader is None:
            return [Content(chunk.text)] if chunk.text else []
        return self._reader.read(chunk)

    def _told(self, event: Event) -> bytes:
        """What a parser tells, in the block that it belongs to."""
        match event:
            case Content(text):
                return self._in(TextContent, TextContent(""), TextDelta(text))
            case Reasoning(text):
                return self._in(ThinkingContent, ThinkingContent(""), ThinkingDelta(text))
            case CallBegin(_, id, name):
                return self._begin(ToolUse, ToolUse(id, name, {}))
            case CallArguments(_, text):
                return _event(BlockDelta(InputDelta(text), self._index))
            case CallEnd():
                return self._close()

    def _in(self, kind: type[ContentBlock], empty: ContentBlock, part: BlockPart) -> bytes:
        begin = b"" if self._open is kind else self._begin(kind, empty)
        return begin + _event(BlockDelta(part, self._index))

    def _begin(self, kind: type[ContentBlock], block: ContentBlock) -> bytes:
        closed = self._close()
        self._open, self._around = kind, None
        self._index += 1
        return closed + _event(BlockStart(block, self._index))

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event(BlockStop(self._index))

    def _stop(self, last: Chunk) -> tuple[StopReason, str | None]:
        """Why the message ended, and at which stop sequence."""
        reason = last.finish if self._reader is None else self._reader.finish_reason(last.finish)
        match reason, last.matched:
            case "tool_calls", _:
                return "tool_use", None
            case "stop", str(matched):
                return "stop_sequence", matched
            case "stop", _:
                return "end_turn", None
            case "length", _:
                return "max_tokens", None
            case _:
                return None, None


def _object(arguments: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}


def _usage(chunk: Chunk) -> MessageUsage:
    fresh = chunk.prompt_tokens - chunk.cached_tokens
    return MessageUsage(fresh, chunk.cached_tokens, chunk.completion_tokens)
