"""The OpenAI Responses API: /v1/responses with streams, background replies and conversations by reference.

What is stored, and for how long, is `stored.py`'s; events are `response_events.py`'s. Left out, and refused by name:
tools that the server runs, images and files, how much to reason, prompt templates, `conversation`.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from aiohttp import web
from msgspec import Meta

from engine.call_grammar import Tool
from engine.errors import RequestError
from engine.grammar import check_nesting, grammar_of
from engine.http.conversation import FEW_MESSAGES, FEW_TOOLS, ToolName, checked, tool_of
from engine.http.grammars import NamedSchema, ObjectFormat, PlainFormat
from engine.http.items import InputItem
from engine.http.openai import Priority, stop_strings
from engine.http.reading import Wanted, reading_of
from engine.http.request_id import called
from engine.http.response_events import ResponseEvents
from engine.http.service import SERVICE, Service, in_client_words
from engine.http.sse import send_events
from engine.http.stored import (
    STORE,
    Asked,
    ChosenTool,
    FunctionTool,
    ObjectText,
    PlainText,
    Response,
    ResponseStore,
    SchemaText,
    TextOptions,
    Told,
)
from engine.http.wire import Body, Reply, check_served, json_response, to_json
from engine.messages import Chunk, Generate, SamplingParams
from engine.sampling import SamplingDefaults, check_sampling

CLIENT_NAMES = {"max_tokens": "max_output_tokens", "json_schema": "text.format.schema"}
ALSO_TAKEN = {("reasoning", "content"), ("function_call_output", "name")}  # beside what an item needs
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


# ── bodies and replies ───────────────────────────────────────────────────────────────────────


class InputPart(Body):
    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    # Ignored: an output item comes back as the client got it.
    annotations: Any = None
    logprobs: Any = None
    prompt_cache_breakpoint: Any = None


class InputItemBody(Body):
    """An item of the input: a message, a call of a tool, what one returned, or what the model thought.

    A message has `role` and `content`, a call `call_id`, `name` and `arguments`, and what it returned `call_id` and
    `output`."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    # Ignored: an output item comes back as the client got it.
    id: Any = None
    status: Any = None
    phase: Any = None
    summary: Any = None
    encrypted_content: Any = None


class ResponseTool(Body):
    name: ToolName
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    type: Literal["function"] = "function"
    allowed_callers: Any = None
    defer_loading: Any = None
    output_schema: Any = None  # ignored: what a tool returns is not looked at

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {"allowed_callers": (["direct"],), "defer_loading": (False,)}


class NamedResponseTool(Body):
    name: str
    type: Literal["function"] = "function"


class SchemaTextBody(NamedSchema, tag_field="type", tag="json_schema", kw_only=True):
    """A named schema, without the object around it that chat completions have."""


class TextBody(Body):
    format: PlainFormat | ObjectFormat | SchemaTextBody | None = None
    verbosity: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}


class ResponsesBody(Body):
    """Null is the same as absent. `top_k`, `min_p`, `seed`, `stop` and `priority` are extensions."""

    input: str | Annotated[list[InputItemBody], FEW_MESSAGES]
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
    tools: Annotated[list[ResponseTool], FEW_TOOLS] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    # Ignored: they change nothing that the engine does.
    max_tool_calls: Any = None
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
    wanted = wanted_of(body)
    spoken = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages = [*spoken, *conversation]
    reading = reading_of(
        service.front.text, sampling, messages, {}, wanted, names=CLIENT_NAMES | {"grammar": "text.format"}
    )
    defaults = SamplingDefaults() if service.front.text is None else service.front.text.defaults
    response = Response(described(body, defaults.under(sampling), service.model, wanted), conversation, reading)
    job = Generate(response.id, sampling, messages=messages, priority=body.priority or 0, **reading.job)
    asked = None if grammar_of(sampling) is None else "text.format"
    chunks = _generate(service, called(request, response.id), job, CLIENT_NAMES | reading.grammar_names(asked))
    if body.background:
        store.run(response, chunks)
        return await _follow(request, response) if body.stream else json_response(response.object())
    async with aclosing(_recorded(chunks, response, store if keep else None)) as told:
        if body.stream:
            events = ResponseEvents(response)
            return await send_events(request, told, events, failure=events.failure)
        async for _ in told:
            pass
    return json_response(response.object())


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


async def _generate(service: Service, id: str, job: Generate, names: dict[str, str]) -> AsyncGenerator[Chunk]:
    """The reply to `job`, which is known as `id` too; errors name fields by `names`."""
    with in_client_words(names), service.known_as(id, job.rid, [job]):
        async with aclosing(service.metrics.watch(service.front.generate(job), "responses")) as chunks:
            async for chunk in chunks:
                yield chunk


async def _recorded(
    chunks: AsyncGenerator[Chunk], response: Response, store: ResponseStore | None
) -> AsyncGenerator[Told]:
    """`chunks`, taken down in `response`, which is put into `store` before the last one is passed on."""
    async with aclosing(chunks):
        async for chunk in chunks:
            told = response.add(chunk)
            if store is not None and response.ended:
                store.put(response)
            yield told


async def _follow(request: web.Request, response: Response, after: int = -1) -> web.StreamResponse:
    events = ResponseEvents(response, after)
    called(request, response.id)
    async with aclosing(response.follow()) as chunks:
        return await send_events(request, chunks, events, failure=events.failure)


# ── from a body to a Generate ────────────────────────────────────────────────────────────────


def sampling_of(body: ResponsesBody) -> SamplingParams:
    """The checked SamplingParams of `body`."""
    fields = ("temperature", "top_p", "top_k", "min_p", "seed")
    given = {name: value for name in fields if (value := getattr(body, name)) is not None}
    match body.text and body.text.format:
        case ObjectFormat():
            given["json_object"] = True
        case SchemaTextBody() as asked:
            check_nesting(asked.schema, "text.format.schema")
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


def messages_of(input: str | list[InputItemBody]) -> list[dict[str, Any]]:
    """`input` as a chat template takes it: calls and reasoning are part of what the assistant said."""
    if isinstance(input, str):
        return [{"role": "user", "content": input}]
    if not input:
        raise RequestError("input is empty; send at least one message", param="input")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(input):
        message = _message(item, f"input[{index}]")
        last = messages[-1] if messages else {}
        if last.get("role") == message["role"] == "assistant" and ("tool_calls" in message or not last["content"]):
            calls = last.get("tool_calls", [])  # made here, so it may grow
            calls += message.get("tool_calls", ())
            last.update(message, content=last["content"] + message["content"])
            if calls:
                last["tool_calls"] = calls
        else:
            messages.append(message)
    return messages


def _message(item: InputItemBody, path: str) -> dict[str, Any]:
    """One item as a message."""
    needs = {
        "message": ("role", "content"),
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
        "reasoning": (),
    }[item.type]
    for field in ("role", "content", "call_id", "name", "arguments", "output"):
        given = getattr(item, field) is not None
        if field in needs and not given:
            raise RequestError(f"{path}.{field} is missing; a {item.type} needs one", param=f"{path}.{field}")
        if field not in needs and given and (item.type, field) not in ALSO_TAKEN:
            raise RequestError(f"{path}.{field} does not go with the type {item.type}", param=f"{path}.{field}")
    match item.type:
        case "function_call":
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
        case "reasoning":
            return {"role": "assistant", "content": "", "reasoning_content": _text(item.content)}
    return {"role": "system" if item.role == "developer" else item.role, "content": _text(item.content)}


def _text(content: str | list[InputPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def wanted_of(body: ResponsesBody) -> Wanted:
    """What `body` says of tools."""
    tools: list[Tool] = []
    for index, tool in enumerate(body.tools or ()):
        check_served(tool, f"tools[{index}].")
        path = f"tools[{index}].parameters"
        tools.append(tool_of(tool.name, tool.parameters, tool.description, tool.strict, path))
    choice, parallel = body.tool_choice, body.parallel_tool_calls is not False
    if isinstance(choice, NamedResponseTool):
        return Wanted(checked(tools), "required", choice.name, parallel)
    return Wanted(checked(tools), choice or "auto", None, parallel)


def described(body: ResponsesBody, used: SamplingDefaults, model: str, wanted: Wanted) -> Asked:
    """The fields of a response object that only say what was asked; `used` are the sampling values in force."""
    return Asked(
        model=model,
        instructions=body.instructions,
        previous_response_id=body.previous_response_id,
        max_output_tokens=body.max_output_tokens,
        temperature=used.temperature,
        top_p=used.top_p,
        background=bool(body.background),
        store=body.store is not False,
        metadata=body.metadata or {},
        parallel_tool_calls=wanted.parallel,
        tool_choice=wanted.mode if wanted.named is None else ChosenTool(wanted.named),
        tools=tuple(FunctionTool(one.name, one.description, one.parameters, one.strict) for one in wanted.tools),
        text=TextOptions(format_of(body)),
    )
