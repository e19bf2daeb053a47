"""Replies as OpenAI's chat.completion(.chunk) and text_completion objects: choices, log-probabilities, usage.

Choice i of several is reply i: the prompts in order, `n` replies to each. The structs are what is sent and what the
OpenAPI document describes. What stands around an event's text is encoded once, so that a chunk without
log-probabilities costs one string escape and one join.
"""

import time
from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from engine.conversation.parsers import Parsed, assembled
from engine.conversation.reading import NOTHING, Reader, Reading
from engine.errors import RequestError, Words
from engine.http.openai.bodies import SamplingBody, StreamOptions
from engine.http.openai.logprobs import (
    ChatLogprobs,
    ChatToken,
    PromptLogprobs,
    TextLogprobs,
    TextOffset,
    chat_token,
    prompt_tokens,
    text_logprobs,
)
from engine.http.service import SERVICE, answer, sampled
from engine.http.sse import DONE, data_event
from engine.http.streams import Around
from engine.http.wire import Reply, to_json
from engine.messages.reply import Chunk
from engine.messages.request import Generate
from engine.plugin.parsing import CallArguments, CallBegin, CallEnd, Content, Event, Reasoning

MARK = "\0"  # where an event's text will stand


# ── what is sent ─────────────────────────────────────────────────────────────────────────────

FinishReason = Literal["stop", "length", "tool_calls", "abort"] | None
Matched = int | str | None | UnsetType  # the stop string, expression or token id that ended a reply; an extension


TokenIds = list[int] | UnsetType  # if return_token_ids asks for them; an extension


class CalledFunction(Reply, frozen=True):
    name: str
    arguments: str


class ToolCall(Reply, frozen=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AssistantMessage(Reply, frozen=True):
    """The content is null where there are only calls. `reasoning_content` is there if the server tells reasoning apart,
    null if there is none."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class FunctionDelta(Reply, frozen=True):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Reply, frozen=True):
    """The first of a call has its id and its name, those after it more of the arguments."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Reply, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChoice(Reply, frozen=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason = None
    matched_stop: Matched = UNSET
    token_ids: TokenIds = UNSET


class DeltaChoice(Reply, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason = None
    matched_stop: Matched = UNSET
    token_ids: TokenIds = UNSET


class TextChoice(Reply, frozen=True):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason = None
    matched_stop: Matched = UNSET
    prompt_logprobs: PromptLogprobs = UNSET
    prompt_token_ids: TokenIds = UNSET
    token_ids: TokenIds = UNSET


class PromptTokensDetails(Reply, frozen=True):
    """Tokens of images and of video are told where there are any."""

    cached_tokens: int
    image_tokens: int | UnsetType = UNSET
    video_tokens: int | UnsetType = UNSET


class CompletionTokensDetails(Reply, frozen=True):
    reasoning_tokens: int


class Usage(Reply, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET  # if the server tells reasoning apart


class ChatCompletion(Reply, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs = UNSET
    prompt_token_ids: TokenIds = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class ChatCompletionChunk(Reply, frozen=True):
    """The usage is null but in an event of its own at the end, or absent, as stream_options say."""

    id: str
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs = UNSET
    prompt_token_ids: TokenIds = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextCompletion(Reply, frozen=True):
    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    object: Literal["text_completion"] = "text_completion"


class TextCompletionChunk(Reply, frozen=True):
    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


# ── from chunks ──────────────────────────────────────────────────────────────────────────────


class Wording(Struct, frozen=True, kw_only=True):
    """What the answers to one request hold. `usage` adds an event of it at the end of a stream, `continuous_usage` one
    to each event; `echo` says that log-probabilities begin with the prompt's."""

    chat: bool
    samples: int = 1  # replies to each prompt
    choices: int = 1
    usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    token_ids: bool = False
    echo: bool = False


async def complete(
    request: web.Request,
    body: SamplingBody,
    prompts: list[Generate],
    wording: Wording,
    reading: Reading = NOTHING,
    *,
    words: Callable[[int], Words] | None = None,
) -> web.StreamResponse:
    """Answer with `body.n` replies to each of `prompts`, worded as `wording` and the stream's options say. Errors of a
    prompt are told in the `words` for its number."""
    options = body.stream_options or StreamOptions()
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    rid, samples = prompts[0].rid, 1 if body.n is None else body.n
    jobs = sampled(prompts, samples)
    wording = msgspec.structs.replace(
        wording,
        samples=samples,
        choices=len(jobs),
        token_ids=bool(body.return_token_ids),
        usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
    )
    reply = OpenAIReply(rid, request.app[SERVICE].model, wording, reading)
    place, stream = "chat" if wording.chat else "completions", bool(body.stream)
    return await answer(request, rid, jobs, reply, endpoint=place, stream=stream, samples=samples, words=words)


class OpenAIReply:
    """The replies to one request, chunk by chunk or whole."""

    def __init__(self, rid: str, model: str, wording: Wording, reading: Reading = NOTHING) -> None:
        self._wording = wording
        self._reading = reading
        self._readers = [reading.reader() for _ in range(wording.choices)]
        self._head = (rid, int(time.time()), model)
        self._last: list[Chunk | None] = [None] * wording.choices
        self._finished = 0
        self._offsets = [TextOffset() for _ in range(wording.choices)] if wording.logprobs and not wording.chat else []
        self._detailed = wording.logprobs or wording.prompt_logprobs or wording.continuous_usage or wording.token_ids
        self._around: dict[tuple[int, Hashable], tuple[bytes, bytes]] = {}

    def event(self, part: tuple[int, Chunk]) -> bytes:
        """The events of one choice's chunk: a chat's opens with the role and ends with its finish; the usage, if asked
        for, and DONE follow the last choice."""
        index, chunk = part
        chat = self._wording.chat
        opens = self._last[index] is None
        self._last[index] = chunk
        events = b""
        if chat and opens:
            events = self._event(DeltaChoice(index, Delta("assistant", "")))
        reader = self._readers[index]
        if reader is not None and not reader.plain:
            events += self._read_events(index, chunk, reader)
        elif self._detailed:
            if chunk.text or self._has_details(chunk):
                events += self._detailed_event(index, chunk)
        elif chunk.text:
            events += self._text_event(index, Content, Content(chunk.text))
        if chunk.finish is not None:
            self._finished += 1
            end = (None, chunk.finish if reader is None else reader.finish_reason(chunk.finish), chunk.matched)
            events += self._event(DeltaChoice(index, Delta(), *end) if chat else TextChoice(index, "", *end))
            if self._finished == self._wording.choices:
                if self._wording.usage:
                    events += self._event(None, usage=self._usage())
                events += DONE
        return events

    def _read_events(self, index: int, chunk: Chunk, reader: Reader) -> bytes:
        """The events of what a parser finds in `chunk`; log-probabilities go with the first of them."""
        found = reader.read(chunk)
        if not self._detailed:
            return b"".join([self._told_event(index, told) for told in found])
        deltas = [_delta(told) for told in found if not isinstance(told, CallEnd)]
        if not (deltas or self._has_details(chunk)):
            return b""
        first, *others = deltas or [Delta()]
        choice = DeltaChoice(index, first, self._chat_logprobs(chunk), token_ids=self._ids(chunk))
        events = self._event(choice, prompt=None if index else chunk)
        return events + b"".join([self._event(DeltaChoice(index, delta)) for delta in others])

    def _told_event(self, index: int, told: Event) -> bytes:
        """The event of what a parser tells, if it is told to clients."""
        match told:
            case Content() | Reasoning():
                return self._text_event(index, type(told), told)
            case CallArguments(number):
                return self._text_event(index, number, told)
            case CallBegin():
                return self._event(DeltaChoice(index, _delta(told)))
            case CallEnd():
                return b""

    def plain(self, index: int) -> Around | None:
        """The event of the text of plain tokens of choice `index`, where there is no more to tell of them."""
        reader = self._readers[index]
        if self._detailed or (reader is not None and not reader.plain):
            return None
        return self._text_around(index, Content, Content(MARK))

    def _text_event(self, index: int, kind: Hashable, told: Content | Reasoning | CallArguments) -> bytes:
        """An event of choice `index` with a text alone."""
        before, after = self._text_around(index, kind, told)
        return before + to_json(told.text) + after

    def _text_around(self, index: int, kind: Hashable, told: Content | Reasoning | CallArguments) -> Around:
        """What stands around such a text: the same for all of a `kind`."""
        around = self._around.get((index, kind))
        if around is None:
            marked = msgspec.structs.replace(told, text=MARK)
            plain = DeltaChoice(index, _delta(marked)) if self._wording.chat else TextChoice(index, MARK)
            before, _, after = self._event(plain).rpartition(to_json(MARK))
            around = self._around[index, kind] = before, after
        return around

    def _has_details(self, chunk: Chunk) -> bool:
        """Whether `chunk` has something to tell beside its text."""
        return bool(chunk.logprobs or chunk.prompt_logprobs or (self._wording.token_ids and chunk.ids))

    def _detailed_event(self, index: int, chunk: Chunk) -> bytes:
        ids = self._ids(chunk)
        if self._wording.chat:
            choice = DeltaChoice(index, Delta(content=chunk.text), self._chat_logprobs(chunk), token_ids=ids)
            return self._event(choice, prompt=None if index else chunk)
        about_prompt = self._prompt_logprobs(chunk), self._prompt_ids(chunk)
        logprobs = self._text_logprobs(index, chunk)
        return self._event(TextChoice(index, chunk.text, logprobs, None, UNSET, *about_prompt, ids))

    def _event(
        self,
        choice: DeltaChoice | TextChoice | None,
        *,
        usage: Usage | None = None,
        prompt: Chunk | None = None,
    ) -> bytes:
        """One event with `choice`, and what there is beside it: `usage`, or what is told in every event, and what the
        chunk `prompt` says of a chat's prompt."""
        told: Usage | UnsetType | None = usage or (None if self._wording.usage else UNSET)
        if self._wording.continuous_usage:
            told = self._usage()
        payload: ChatCompletionChunk | TextCompletionChunk
        if self._wording.chat:
            assert not isinstance(choice, TextChoice)
            about_prompt = () if prompt is None else (self._prompt_logprobs(prompt), self._prompt_ids(prompt))
            payload = ChatCompletionChunk(*self._head, [choice] if choice else [], told, *about_prompt)
        else:
            assert not isinstance(choice, DeltaChoice)
            payload = TextCompletionChunk(*self._head, [choice] if choice else [], told)
        return data_event(to_json(payload))

    def whole(self, replies: Sequence[Chunk]) -> bytes:
        """The object of replies that are not streamed, each joined into one chunk."""
        self._last = list(replies)
        if self._wording.chat:
            chats = [self._chat(index, reply) for index, reply in enumerate(replies)]
            about_prompt = self._prompt_logprobs(replies[0]), self._prompt_ids(replies[0])
            return to_json(ChatCompletion(*self._head, chats, self._usage(), *about_prompt))
        texts = [
            TextChoice(
                index,
                reply.text,
                self._text_logprobs(index, reply),
                reply.finish,
                reply.matched,
                self._prompt_logprobs(reply),
                self._prompt_ids(reply),
                self._ids(reply),
            )
            for index, reply in enumerate(replies)
        ]
        return to_json(TextCompletion(*self._head, texts, self._usage()))

    def _chat(self, index: int, reply: Chunk) -> ChatChoice:
        """A whole reply."""
        logprobs, ids = self._chat_logprobs(reply), self._ids(reply)
        if (reader := self._readers[index]) is None:
            said = AssistantMessage("assistant", reply.text)
            return ChatChoice(index, said, logprobs, reply.finish, reply.matched, ids)
        message = _message(assembled(reader.read(reply)), separate=self._reading.separate)
        return ChatChoice(index, message, logprobs, reader.finish_reason(reply.finish), reply.matched, ids)

    def _chat_logprobs(self, chunk: Chunk) -> ChatLogprobs | None:
        return ChatLogprobs(self._tokens(chunk)) if self._wording.logprobs else None

    def _tokens(self, chunk: Chunk) -> list[ChatToken]:
        return [chat_token(token, ids=self._wording.token_ids) for token in chunk.logprobs]

    def _text_logprobs(self, index: int, chunk: Chunk) -> TextLogprobs | None:
        if not self._wording.logprobs:
            return None
        tokens = (*chunk.prompt_logprobs, *chunk.logprobs) if self._wording.echo else chunk.logprobs
        told = text_logprobs(tokens, self._offsets[index])
        return msgspec.structs.replace(told, content=self._tokens(chunk)) if self._wording.token_ids else told

    def _prompt_logprobs(self, chunk: Chunk) -> PromptLogprobs:
        """Those in `chunk`, in the first one of a reply, if the client asked for them."""
        if not self._wording.prompt_logprobs or not chunk.prompt_logprobs:
            return UNSET
        return [prompt_tokens(token, ids=self._wording.token_ids) for token in chunk.prompt_logprobs]

    def _prompt_ids(self, chunk: Chunk) -> TokenIds:
        """Those in `chunk`, the first one of a reply, if the client asked for them."""
        return array("i", chunk.prompt_ids).tolist() if chunk.prompt_ids else UNSET

    def _ids(self, chunk: Chunk) -> TokenIds:
        return chunk.ids if self._wording.token_ids else UNSET

    def _usage(self) -> Usage:
        """What there is so far; a prompt counts once, however many replies it has."""
        prompts = [
            next((chunk for chunk in self._last[first : first + self._wording.samples] if chunk is not None), None)
            for first in range(0, self._wording.choices, self._wording.samples)
        ]
        asked = sum(chunk.prompt_tokens for chunk in prompts if chunk is not None)
        replied = sum(chunk.completion_tokens for chunk in self._last if chunk is not None)
        cached = sum(chunk.cached_tokens for chunk in prompts if chunk is not None)
        details: CompletionTokensDetails | UnsetType = UNSET
        if self._reading.separate and self._reading.marks is not None:
            details = CompletionTokensDetails(sum(reader.reasoning_tokens for reader in self._readers if reader))
        shown = [sum(chunk.shown[kind] for chunk in prompts if chunk is not None) or UNSET for kind in (0, 1)]
        return Usage(asked, replied, asked + replied, PromptTokensDetails(cached, *shown), details)


def _delta(event: Event) -> Delta:
    """What a parser tells, as a stream's delta."""
    match event:
        case Content(text):
            return Delta(content=text)
        case Reasoning(text):
            return Delta(reasoning_content=text)
        case CallBegin(index, id, name):
            return Delta(tool_calls=[ToolCallDelta(index, FunctionDelta("", name), id, "function")])
        case CallArguments(index, text):
            return Delta(tool_calls=[ToolCallDelta(index, FunctionDelta(text))])
    raise AssertionError(f"{event} is no delta")


def _message(parsed: Parsed, *, separate: bool) -> AssistantMessage:
    calls = [ToolCall(call.id, CalledFunction(call.name, call.arguments)) for call in parsed.calls]
    return AssistantMessage(
        "assistant",
        parsed.content if parsed.content or not calls else None,
        reasoning_content=parsed.reasoning or None if separate else UNSET,
        tool_calls=calls or UNSET,
    )
