"""The OpenAI Responses API: /v1/responses with streams, background replies and conversations by reference.

What is stored, and for how long, is `store.py`'s; events are `events.py`'s, tools `tools.py`'s.
Left out: files, prompt templates, `conversation`.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from aiohttp import web

from engine.conversation.parts import said
from engine.conversation.reading import Wanted, reading_of
from engine.errors import RequestError, Words
from engine.http.effort import with_effort
from engine.http.fields import ignore
from engine.http.grammars import ObjectFormat
from engine.http.keys import owner_of
from engine.http.openapi import Route
from engine.http.passing import id_at
from engine.http.request_id import called
from engine.http.responses.bodies import FORMATS, ItemsQuery, ResponsesBody, RetrieveQuery, SchemaTextBody, messages_of
from engine.http.responses.events import EVENTS, ResponseEvents
from engine.http.responses.items import InputItem
from engine.http.responses.objects import (
    Asked,
    ChosenTool,
    FunctionTool,
    ObjectText,
    PlainText,
    Reasoning,
    ResponseObject,
    SchemaText,
    TextOptions,
)
from engine.http.responses.store import STORE, Response, ResponseStore, Told
from engine.http.responses.tools import wanted_tools
from engine.http.service import SERVICE, Service, sampling_of, session_of
from engine.http.sse import CALLED, send_events, words_of
from engine.http.streams import send_replies
from engine.http.turns import in_turn
from engine.http.wire import Reply, json_response
from engine.messages.reply import Chunk
from engine.messages.request import Generate
from engine.params.sampling import RESPONSES, SamplingDefaults, SamplingParams
from engine.runtime.mailbox import joined, whole_parts

RESPONSE_WORDS = Words(
    {
        **RESPONSES.names,
        "prompt": "input",
        "messages": "input",
        "chat_template_kwargs": "reasoning.effort",
        "grammar": "tools",
    }
)
LOGPROBS = "message.output_text.logprobs"


# ── replies ───────────────────────────────────────────────────────────────────────


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


# ── handlers ─────────────────────────────────────────────────────────────────────────────────


async def create(request: web.Request, body: ResponsesBody) -> web.StreamResponse:
    """Answer a conversation as a response: whole, streamed, or in the background."""
    service, store = request.app[SERVICE], request.app[STORE]
    service.check_model(body.model)
    keep = body.store is not False
    if body.background and not keep:
        raise RequestError("background is true and store is false; a background response is stored", param="store")
    sampling, field = asked_of(request, body)
    owner = owner_of(request)
    earlier = [] if body.previous_response_id is None else store.conversation(body.previous_response_id, owner)
    conversation = [*earlier, *messages_of(body.input)]
    wanted = wanted_of(body)
    spoken = [said("system", body.instructions)] if body.instructions else []
    messages = [*spoken, *conversation]
    options = options_of(request, body, wanted)
    reading = reading_of(service.front.text, sampling, messages, options, wanted)
    request[CALLED] |= reading.grammar_names(field)
    defaults = SamplingDefaults() if service.front.text is None else service.front.text.defaults
    asked = described(body, defaults.under(sampling), service.model, wanted)
    id = id_at(service.front.peers.number, "resp")
    response = Response(asked, conversation, reading, scored=sampling.logprobs is not None, id=id, owner=owner)
    job = Generate(
        response.id,
        messages=messages,
        priority=body.priority or 0,
        session=session_of(request, body.session_id),
        **options,
        **reading.job,
    )
    if body.background:
        store.run(response, _generate(service, owner, called(request, response.id), job), words_of(request))
        return await _follow(request, response) if body.stream else json_response(response.object())
    recorded = Recorded(response, store if keep else None)
    opened = service.replies(request, response.id, [job], endpoint="responses")
    if body.stream:
        return await send_replies(request, opened, recorded, failure=recorded.events.failure)
    async with opened as (box,):
        parts = await in_turn(request, whole_parts(box))
    # Log-probabilities are of what is said, which is told apart part by part.
    for part in parts if sampling.logprobs is not None else [joined(parts)]:
        recorded.add(part)
    return json_response(response.object())


async def retrieve(request: web.Request, query: RetrieveQuery) -> web.StreamResponse:
    """Give a stored response as it is now, or stream a background one, from its beginning or later."""
    response = _stored(request)
    if not query.stream:
        return json_response(response.object())
    if not response.background:
        message = f"the response {response.id!r} was not made with background: true; retrieve it without stream"
        raise RequestError(message, param="stream")
    return await _follow(request, response, query.starting_after)


async def cancel(request: web.Request) -> web.Response:
    """End a background response that still runs; one that has ended stays as it is."""
    response = _stored(request)
    if not response.background:
        raise RequestError(
            f"the response {response.id!r} was not made with background: true; only such responses can be cancelled",
            code="not_cancellable",
        )
    await response.cancel()
    return json_response(response.object())


async def delete(request: web.Request) -> web.Response:
    """Forget a stored response; one that still runs is cancelled."""
    response = _stored(request)
    await response.cancel()
    request.app[STORE].forget(response.id)
    return json_response(DeletedReply(response.id, "response", True))


async def input_items(request: web.Request, query: ItemsQuery) -> web.Response:
    """List the messages that a stored response answers, the last first."""
    response = _stored(request)
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


def _stored(request: web.Request) -> Response:
    """The response that `request` names. Raises RequestError (404) where its owner has none such."""
    return request.app[STORE].get(request.match_info["response_id"], owner_of(request))


async def _generate(service: Service, owner: bytes, id: str, job: Generate) -> AsyncGenerator[Chunk]:
    """The reply to `job` of `owner`, which is known as `id` too."""
    with service.known_as(owner, {id, job.rid}, [job]):
        async with aclosing(service.generate(job, "responses")) as chunks:
            async for chunk in chunks:
                yield chunk


class Recorded:
    """The events of a reply that is taken down in `response`, which is put into `store` before the last is sent."""

    def __init__(self, response: Response, store: ResponseStore | None) -> None:
        self.events = ResponseEvents(response)
        self._response = response
        self._store = store

    def add(self, chunk: Chunk) -> Told:
        """Take down `chunk`; what is told of it."""
        told = self._response.add(chunk)
        if self._store is not None and self._response.ended:
            self._store.put(self._response)
        return told

    def event(self, part: tuple[int, Chunk]) -> bytes:
        """The events of a chunk of the one reply."""
        return self.events.event(self.add(part[1]))

    def plain(self, index: int) -> None:
        """All is taken down, so no tokens are plain."""


async def _follow(request: web.Request, response: Response, after: int = -1) -> web.StreamResponse:
    events = ResponseEvents(response, after)
    called(request, response.id)
    async with aclosing(response.follow()) as chunks:
        return await send_events(request, chunks, events, failure=events.failure)


# ── from a body to a Generate ────────────────────────────────────────────────────────────────


def asked_of(request: web.Request, body: ResponsesBody) -> tuple[SamplingParams, str]:
    """The checked SamplingParams of `body`, and what the client calls their grammar."""
    fields, names = RESPONSES.given(body)
    field = ""
    if body.text is not None:
        fields["grammar"], field = FORMATS.asked(body.text, "text.")
    likeliest = fields.pop("logprobs", None)
    if LOGPROBS in (body.include or ()):
        fields["logprobs"] = likeliest or 0
    elif likeliest:
        message = f'top_logprobs is {likeliest}; it needs include: ["{LOGPROBS}"]'
        raise RequestError(message, param="top_logprobs")
    return sampling_of(request, RESPONSE_WORDS, fields, called=names, grammar=field), field


def format_of(body: ResponsesBody) -> PlainText | ObjectText | SchemaText:
    """The format of `body`, as a response object tells it."""
    match body.text and body.text.format:
        case ObjectFormat():
            return ObjectText()
        case SchemaTextBody() as asked:
            return SchemaText(asked.name, asked.schema, asked.strict, asked.description)
    return PlainText()


def wanted_of(body: ResponsesBody) -> Wanted:
    """What `body` says of tools."""
    return wanted_tools(body.tools, body.tool_choice, body.parallel_tool_calls)


def options_of(request: web.Request, body: ResponsesBody, wanted: Wanted) -> dict[str, Any]:
    """How the template writes the conversation: with what effort it is told to think. What it cannot say of that, and
    what is included but always empty, is ignored."""
    if any(name != LOGPROBS for name in body.include or ()):
        ignore(request, "include")
    if body.reasoning is None or (effort := body.reasoning.effort) is None:
        return {}
    options, whole = with_effort(request.app[SERVICE].front.text, {}, effort, tools=bool(wanted.offered))
    if not whole:
        ignore(request, "reasoning.effort")
    return options


def described(body: ResponsesBody, used: SamplingDefaults, model: str, wanted: Wanted) -> Asked:
    """The fields of a response object that only say what was asked; `used` are the sampling values in force."""
    given, _ = RESPONSES.given(body)
    return Asked(
        model=model,
        instructions=body.instructions,
        previous_response_id=body.previous_response_id,
        max_output_tokens=given.get("max_tokens"),
        temperature=used.temperature,
        top_p=used.top_p,
        background=bool(body.background),
        store=body.store is not False,
        metadata=body.metadata or {},
        parallel_tool_calls=wanted.parallel,
        reasoning=Reasoning(body.reasoning.effort if body.reasoning else None),
        top_logprobs=given.get("logprobs", 0),
        tool_choice=wanted.mode if wanted.named is None else ChosenTool(wanted.named),
        tools=tuple(FunctionTool(one.name, one.description, one.parameters, one.strict) for one in wanted.tools),
        text=TextOptions(format_of(body)),
    )


ROUTES = (
    Route(
        "POST",
        "/v1/responses",
        create,
        takes=ResponsesBody,
        gives=ResponseObject,
        events=EVENTS,
        done=False,
        kept="previous_response_id",
    ),
    Route(
        "GET",
        "/v1/responses/{response_id}",
        retrieve,
        takes=RetrieveQuery,
        gives=ResponseObject,
        events=EVENTS,
        done=False,
        kept="response_id",
    ),
    Route("DELETE", "/v1/responses/{response_id}", delete, gives=DeletedReply, kept="response_id"),
    Route("POST", "/v1/responses/{response_id}/cancel", cancel, gives=ResponseObject, kept="response_id"),
    Route(
        "GET",
        "/v1/responses/{response_id}/input_items",
        input_items,
        takes=ItemsQuery,
        gives=ItemList,
        kept="response_id",
    ),
)
