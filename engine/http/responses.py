"""The OpenAI Responses API, for text: /v1/responses with streams, background replies and conversations by reference.

What is stored, and for how long, is `stored.py`'s; this file has the bodies, the handlers and the events. Left out,
and refused by name: tools, images and files, reasoning, prompt templates, `conversation`.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal, get_args

from aiohttp import web
from msgspec import Meta

from engine.errors import RequestError
from engine.http.grammars import NamedSchema, ObjectFormat, PlainFormat
from engine.http.openai import Priority, stop_strings
from engine.http.service import SERVICE, Service
from engine.http.sse import describe_error, send_events
from engine.http.stored import (
    STORE,
    Asked,
    InputItem,
    ObjectText,
    OutputItem,
    OutputText,
    PlainText,
    Response,
    ResponseObject,
    SchemaText,
    TextOptions,
)
from engine.http.wire import Body, Reply, check_served, json_response, to_json
from engine.messages import Chunk, Generate, SamplingParams
from engine.sampling import check_sampling

CLIENT_NAMES = {"max_tokens": "max_output_tokens", "json_schema": "text.format.schema"}
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


# ── bodies and replies ───────────────────────────────────────────────────────────────────────


class InputPart(Body):
    type: Literal["input_text", "output_text"]
    text: str
    # Ignored: an output item comes back as the client got it.
    annotations: Any = None
    logprobs: Any = None
    prompt_cache_breakpoint: Any = None


class InputMessage(Body):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputPart]
    type: Literal["message"] = "message"
    # Ignored, for the same reason.
    id: Any = None
    status: Any = None
    phase: Any = None


class SchemaTextBody(NamedSchema, tag_field="type", tag="json_schema", kw_only=True):
    """A named schema, without the object around it that chat completions have."""


class TextBody(Body):
    format: PlainFormat | ObjectFormat | SchemaTextBody | None = None
    verbosity: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}


class ResponsesBody(Body):
    """Null is the same as absent. `top_k`, `min_p`, `seed`, `stop` and `priority` are extensions."""

    input: str | list[InputMessage]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    priority: Priority | None = None
    text: TextBody | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: Metadata | None = None
    # Ignored: they change nothing that the engine does.
    max_tool_calls: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    stream_options: Any = None
    user: Any = None
    access_programs: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    include: Any = None
    moderation: Any = None
    prompt: Any = None
    reasoning: Any = None
    service_tier: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    truncation: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "include": ([],),
        "moderation": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "service_tier": ("auto", "default"),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }


class RetrieveQuery(Body):
    """A stream begins after the event with the number `starting_after`."""

    stream: bool = False
    starting_after: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    include_obfuscation: bool = False  # ignored: no padding is added


class ItemsQuery(Body):
    """Those after the item `after`, in the order of the conversation or, by default, from its end."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"


class ItemList(Reply, frozen=True):
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class DeletedReply(Reply, frozen=True):
    id: str
    object: Literal["response"]
    deleted: bool


class Event(Reply, kw_only=True, frozen=True):
    """Numbered from 0 on."""

    sequence_number: int


class StatusEvent(Event, kw_only=True, frozen=True):
    type: Literal[
        "response.queued", "response.created", "response.in_progress",
        "response.completed", "response.incomplete", "response.failed",
    ]  # fmt: skip
    response: ResponseObject


class ItemEvent(Event, kw_only=True, frozen=True):
    type: Literal["response.output_item.added", "response.output_item.done"]
    item: OutputItem
    output_index: int = 0


class InItem(Event, kw_only=True, frozen=True):
    """An event of the only content part of the only item."""

    item_id: str
    output_index: int = 0
    content_index: int = 0


class PartEvent(InItem, kw_only=True, frozen=True):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class DeltaEvent(InItem, kw_only=True, frozen=True):
    delta: str
    logprobs: tuple[()] = ()
    type: Literal["response.output_text.delta"] = "response.output_text.delta"


class TextEvent(InItem, kw_only=True, frozen=True):
    text: str
    logprobs: tuple[()] = ()
    type: Literal["response.output_text.done"] = "response.output_text.done"


AnyEvent = StatusEvent | ItemEvent | PartEvent | DeltaEvent | TextEvent
EVENTS = get_args(AnyEvent)


# ── handlers ─────────────────────────────────────────────────────────────────────────────────


async def create(request: web.Request, body: ResponsesBody) -> web.StreamResponse:
    """Answer a conversation as a response: whole, streamed, or in the background."""
    service, store = request.app[SERVICE], request.app[STORE]
    service.check_model(body.model)
    keep = body.store is not False
    if body.background and not keep:
        raise RequestError("background is true and store is false; a background response is stored", param="store")
    sampling = sampling_of(body)
    earlier = [] if body.previous_response_id is None else store.conversation(body.previous_response_id)
    conversation = [*earlier, *messages_of(body.input)]
    response = Response(described(body, sampling, service.model), conversation)
    spoken = [{"role": "system", "content": body.instructions}] if body.instructions else []
    job = Generate(response.id, sampling, messages=[*spoken, *conversation], priority=body.priority or 0)
    if body.background:
        store.run(response, _generate(service, job))
        return await _follow(request, response) if body.stream else json_response(response.object())
    headers = {"X-Request-Id": response.id}
    async with aclosing(_recorded(request, response, job, keep=keep)) as chunks:
        if body.stream:
            events = ResponseEvents(response)
            return await send_events(request, chunks, events, headers, failure=events.failure)
        async for _ in chunks:
            pass
    return json_response(response.object(), headers=headers)


async def retrieve(request: web.Request, query: RetrieveQuery) -> web.StreamResponse:
    """Give a stored response as it is now, or stream a background one, from its beginning or later."""
    response = request.app[STORE].get(request.match_info["response_id"])
    if not query.stream:
        return json_response(response.object())
    if not response.background:
        message = f"the response {response.id!r} was not made with background: true; retrieve it without stream"
        raise RequestError(message, param="stream")
    return await _follow(request, response, query.starting_after)


async def cancel(request: web.Request) -> web.Response:
    """End a background response that still runs; one that has ended stays as it is."""
    response = request.app[STORE].get(request.match_info["response_id"])
    if not response.background:
        raise RequestError(
            f"the response {response.id!r} was not made with background: true; only such responses can be cancelled",
            code="not_cancellable",
        )
    await response.cancel()
    return json_response(response.object())


async def delete(request: web.Request) -> web.Response:
    """Forget a stored response; one that still runs is cancelled."""
    response = request.app[STORE].get(request.match_info["response_id"])
    await response.cancel()
    request.app[STORE].forget(response.id)
    return json_response(DeletedReply(response.id, "response", True))


async def input_items(request: web.Request, query: ItemsQuery) -> web.Response:
    """List the messages that a stored response answers, the last first."""
    response = request.app[STORE].get(request.match_info["response_id"])
    items = response.input_items()
    if query.order == "desc":
        items.reverse()
    begin = 0
    if query.after is not None:
        begin = next((place for place, item in enumerate(items, start=1) if item.id == query.after), 0)
        if not begin:
            raise RequestError(
                f"after is {query.after[:200]!r}, and the response has no such item; send the id of one", param="after"
            )
    page = items[begin : begin + query.limit]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return json_response(ItemList(page, first, last, begin + len(page) < len(items)))


def _generate(service: Service, job: Generate) -> AsyncGenerator[Chunk]:
    return service.metrics.watch(service.front.generate(job), "responses")


async def _recorded(request: web.Request, response: Response, job: Generate, *, keep: bool) -> AsyncGenerator[Chunk]:
    """The reply to `job`, taken down in `response`; stored, if `keep`, before its last chunk is passed on."""
    async with aclosing(_generate(request.app[SERVICE], job)) as chunks:
        async for chunk in chunks:
            response.add(chunk)
            if keep and response.ended:
                request.app[STORE].put(response)
            yield chunk


async def _follow(request: web.Request, response: Response, after: int = -1) -> web.StreamResponse:
    events = ResponseEvents(response, after)
    headers = {"X-Request-Id": response.id}
    async with aclosing(response.follow()) as chunks:
        return await send_events(request, chunks, events, headers, failure=events.failure)


# ── from a body to a Generate ────────────────────────────────────────────────────────────────


def sampling_of(body: ResponsesBody) -> SamplingParams:
    """The checked SamplingParams of `body`."""
    fields = ("temperature", "top_p", "top_k", "min_p", "seed")
    given = {name: value for name in fields if (value := getattr(body, name)) is not None}
    match body.text and body.text.format:
        case ObjectFormat():
            given["json_object"] = True
        case SchemaTextBody() as asked:
            given |= {"json_schema": to_json(asked.schema).decode(), "strict_schema": asked.strict is not False}
    if body.text is not None:
        check_served(body.text, "text.")
    sampling = SamplingParams(max_tokens=body.max_output_tokens, stop=stop_strings(body.stop), **given)
    check_sampling(sampling, CLIENT_NAMES)
    return sampling


def format_of(body: ResponsesBody) -> PlainText | ObjectText | SchemaText:
    """The format of `body`, as a response object tells it."""
    match body.text and body.text.format:
        case ObjectFormat():
            return ObjectText()
        case SchemaTextBody() as asked:
            return SchemaText(asked.name, asked.schema, asked.strict, asked.description)
    return PlainText()


def messages_of(input: str | list[InputMessage]) -> list[dict[str, Any]]:
    """`input` as a chat template takes it."""
    if isinstance(input, str):
        return [{"role": "user", "content": input}]
    if not input:
        raise RequestError("input is empty; send at least one message", param="input")
    messages = []
    for message in input:
        role = "system" if message.role == "developer" else message.role
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        messages.append({"role": role, "content": text})
    return messages


def described(body: ResponsesBody, sampling: SamplingParams, model: str) -> Asked:
    """The fields of a response object that only say what was asked."""
    return Asked(
        model=model,
        instructions=body.instructions,
        previous_response_id=body.previous_response_id,
        max_output_tokens=body.max_output_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        background=bool(body.background),
        store=body.store is not False,
        metadata=body.metadata or {},
        text=TextOptions(format_of(body)),
    )


# ── events ───────────────────────────────────────────────────────────────────────────────────


class ResponseEvents:
    """Chunks as the events of a response, numbered; those up to number `after` are left out."""

    def __init__(self, response: Response, after: int = -1) -> None:
        self._response = response
        self._after = after
        self._number = 0
        self._text: list[str] = []

    def event(self, chunk: Chunk) -> bytes:
        """The events of `chunk`: what opens a response before the first, what closes it after the last."""
        events = [] if self._number else self._opening()
        if chunk.text:
            self._text.append(chunk.text)
            events += [self._next(DeltaEvent, item_id=self._response.item_id, delta=chunk.text)]
        if chunk.finish is not None:
            events += self._closing()
        return b"".join(events)

    def failure(self, error: Exception) -> bytes:
        """The last event of a stream that fails."""
        if not self._response.ended:
            self._response.fail(describe_error(error))
        return self._status("failed", self._response.object())

    def _opening(self) -> list[bytes]:
        response = self._response
        waiting = response.object(status="in_progress")
        queued = [self._status("queued", response.object(status="queued"))] if response.background else []
        return [
            *queued,
            self._status("created", waiting),
            self._status("in_progress", waiting),
            self._item("added", response.item("in_progress", None)),
            self._part("added", ""),
        ]

    def _closing(self) -> list[bytes]:
        response, text = self._response, "".join(self._text)
        status: Literal["completed", "incomplete"] = "completed" if response.status == "completed" else "incomplete"
        return [
            self._next(TextEvent, item_id=response.item_id, text=text),
            self._part("done", text),
            self._item("done", response.item(status, text)),
            self._status(status, response.object()),
        ]

    def _status(self, status: str, response: ResponseObject) -> bytes:
        return self._next(StatusEvent, type=f"response.{status}", response=response)

    def _item(self, what: str, item: OutputItem) -> bytes:
        return self._next(ItemEvent, type=f"response.output_item.{what}", item=item)

    def _part(self, what: str, text: str) -> bytes:
        part, item = OutputText(text), self._response.item_id
        return self._next(PartEvent, type=f"response.content_part.{what}", item_id=item, part=part)

    def _next(self, kind: type[AnyEvent], **fields: Any) -> bytes:
        """The event of the next number; nothing, if that is not asked for."""
        number = self._number
        self._number += 1
        if number <= self._after:
            return b""
        event = kind(sequence_number=number, **fields)
        return b"event: %b\ndata: %b\n\n" % (event.type.encode(), to_json(event))
