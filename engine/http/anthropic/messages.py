"""The Anthropic API: /v1/messages and /v1/messages/count_tokens, for text and tools.

A last message of the assistant's is continued; successive messages of one role are one. What replies look like is in
reply.py. Left out, and refused by name: documents, tools that the server runs, batches.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from aiohttp import web
from msgspec import Meta

from engine.conversation.calls import Tool
from engine.conversation.parts import Call, Image, Message, Part, Result, Shown, Text, alternating, said
from engine.conversation.reading import Wanted, reading_of
from engine.errors import RequestError, Words
from engine.http.anthropic.reply import EVENTS, AnthropicErrorReply, AnthropicReply, MessageReply, failure_event
from engine.http.effort import with_effort
from engine.http.fields import ECHO, LABEL, Only, Rule, hint, ignore, label, unserved
from engine.http.native.tokenize import tokenized
from engine.http.openapi import Route
from engine.http.service import SERVICE, sampling_of, session_of
from engine.http.sse import WORDS
from engine.http.streams import send_replies
from engine.http.tools import CALLED_DIRECTLY, FEW_MESSAGES, FEW_TOOLS, Effort, ToolName, checked, tool_of
from engine.http.turns import in_turn
from engine.http.wire import ENCODER, Body, Reply, json_response
from engine.messages.request import Generate
from engine.messages.text import Tokenize
from engine.params.grammar import Ask, GrammarFields, check_nesting
from engine.params.lengths import ANTHROPIC_PHRASES
from engine.params.sampling import ANTHROPIC, INT32_MAX
from engine.runtime.mailbox import whole

PREFIX = "/v1/messages"
ANTHROPIC_WORDS = Words(
    {
        **ANTHROPIC.names,
        "prompt": "messages",
        "grammar": "tools",
        "continue_final_message": "messages",  # what a last message of the assistant's asks for
        "chat_template_kwargs": "thinking",
    },
    ANTHROPIC_PHRASES,
)
SEARCHES = ("tool_search_tool_regex_20251119", "tool_search_tool_bm25_20251119")


# ── bodies ───────────────────────────────────────────────────────────────────────────────────


class TextBlock(Body, tag_field="type", tag="text"):
    text: str
    cache_control: Any = None
    citations: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"cache_control": LABEL, "citations": hint()}  # every prefix is cached


class Base64Source(Body, tag_field="type", tag="base64"):
    media_type: str
    data: str


class URLSource(Body, tag_field="type", tag="url"):
    url: str


class ImageBlock(Body, tag_field="type", tag="image"):
    """A picture, for a model that sees."""

    source: Base64Source | URLSource
    cache_control: Any = None
    transformations: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "cache_control": LABEL,
        "transformations": unserved({}, {"oversized_image": "downsize"}),
    }


class ToolReferenceBlock(Body, tag_field="type", tag="tool_reference"):
    """A tool of the request that a search has found."""

    tool_name: str
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"cache_control": LABEL}


class ToolUseBlock(Body, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = None
    toolset_name: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"cache_control": LABEL, "caller": ECHO, "toolset_name": ECHO}


class ToolResultBlock(Body, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | ToolReferenceBlock] | None = None
    is_error: bool | None = None
    cache_control: Any = None
    toolset_name: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "is_error": label(False),  # what the result says is all that the model sees
        "cache_control": LABEL,
        "toolset_name": ECHO,
    }


class ThinkingBlock(Body, tag_field="type", tag="thinking"):
    thinking: str
    signature: Any = None
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"signature": ECHO, "cache_control": LABEL}


class RedactedThinkingBlock(Body, tag_field="type", tag="redacted_thinking"):
    """Nobody here can read it."""

    data: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"data": ECHO}


Block = TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock


class AnthropicMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"cache_control": LABEL}


class AnthropicTool(Body):
    """A tool of the client's, which has an `input_schema`; or the search of tools, which is left out: the model is told
    of all tools, those with `defer_loading` too."""

    name: ToolName
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom", "tool_search_tool_regex_20251119", "tool_search_tool_bm25_20251119"] | None = None
    cache_control: Any = None
    eager_input_streaming: Any = None
    input_examples: Any = None
    allowed_callers: Any = None
    defer_loading: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "type": hint("custom"),
        "cache_control": LABEL,
        "eager_input_streaming": LABEL,
        "input_examples": LABEL,
        "allowed_callers": CALLED_DIRECTLY,
        "defer_loading": hint(False),
    }


class AnthropicToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """What the template is told of thinking. How long it may be is not."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Any = None
    display: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"budget_tokens": LABEL, "display": LABEL}


class AnthropicFormat(Body, tag_field="type", tag="json_schema"):
    """The reply is JSON of this schema."""

    schema: dict[str, Any] | bool


FORMATS = GrammarFields({"format": {"schema": Ask("json_schema")}})


class OutputConfig(Body):
    """`effort` is for the chat template, if that reads `reasoning_effort`."""

    effort: Effort | None = None
    format: AnthropicFormat | None = None
    task_budget: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"task_budget": hint()}


def _only_trims(value: Any) -> bool:
    """Whether `context_management` only leaves out what is old, which the server has room for or refuses."""
    edits = value.get("edits", []) if isinstance(value, dict) else None
    return isinstance(edits, list) and all(
        isinstance(edit, dict) and str(edit.get("type")).startswith("clear_") for edit in edits
    )


class CountBody(Body):
    """What a prompt is made of. Null is the same as absent."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1), FEW_MESSAGES]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], FEW_TOOLS] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    betas: Any = None
    cache_control: Any = None
    compaction: Any = None
    context_management: Any = None
    mcp_servers: Any = None
    speed: Any = None
    thread: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "betas": hint(),
        "cache_control": LABEL,
        "compaction": unserved(),
        "context_management": hint({"edits": []}, only=Only("edits of the types clear_*", _only_trims)),
        "mcp_servers": unserved([]),
        "speed": hint("standard"),
        "thread": unserved(remedy="send the whole conversation without it", code="thread_unsupported_request"),
        "user_profile_id": LABEL,
        "workspace_id": LABEL,
    }


@ANTHROPIC.fields
class MessagesBody(CountBody, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)]
    session_id: str | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: Any = None
    billing_policy: Any = None
    container: Any = None
    diagnostics: Any = None
    fallback_credit_token: Any = None
    fallbacks: Any = None
    inference_geo: Any = None
    service_tier: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        **CountBody.rules,
        "metadata": LABEL,
        "billing_policy": hint(),
        "container": unserved(),
        "diagnostics": hint(),
        "fallback_credit_token": hint(),
        "fallbacks": hint(),  # where a model declines for a policy, which none does here
        "inference_geo": unserved(),
        "service_tier": hint("auto", "standard_only"),
    }


class CountReply(Reply, frozen=True):
    input_tokens: int


# ── handlers ─────────────────────────────────────────────────────────────────────────────────


async def messages(request: web.Request, body: MessagesBody) -> web.StreamResponse:
    """Answer a conversation in Anthropic's shape, whole or streamed."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    fields, names = ANTHROPIC.given(body)
    field = ""
    if body.output_config is not None:
        fields["grammar"], field = FORMATS.asked(body.output_config, "output_config.")
    sampling = sampling_of(request, ANTHROPIC_WORDS, fields, called=names, grammar=field)
    wanted = wanted_of(body)
    conversation, options = conversation_of(body), _options(request, body, wanted)
    reading = reading_of(service.front.text, sampling, conversation, options, wanted)
    names |= reading.grammar_names(field)
    rid = f"msg_{uuid4().hex}"
    session = session_of(request, body.session_id)
    job = Generate(rid, messages=conversation, session=session, **options, **reading.job)
    reply = AnthropicReply(rid, service.model, reading)
    opened = service.replies(request, rid, [job], endpoint="messages")
    if body.stream:
        return await send_replies(request, opened, reply, failure=failure_event)
    async with opened as boxes:
        (made,) = await in_turn(request, whole(boxes))
    return json_response(reply.whole(made))


async def count_tokens(request: web.Request, body: CountBody) -> web.Response:
    """Count the tokens of a conversation as /v1/messages would read it."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    wanted = wanted_of(body)
    conversation, options = conversation_of(body), _options(request, body, wanted)
    tools = [tool.described() for tool in wanted.offered]
    request[WORDS] = ANTHROPIC_WORDS
    found = await tokenized(service, Tokenize(None, conversation, {"tools": tools, **options}))
    return json_response(CountReply(len(found.ids) // 4))


# ── from a body to a Generate ────────────────────────────────────────────────────────────────


def conversation_of(body: CountBody) -> list[Message]:
    """The messages with their parts: the system's first, no two of one role in a row but tools'."""
    turns = [Message("system", _parts(body.system, "system"))] if body.system else []
    for index, message in enumerate(body.messages):
        turns += _turns(message, f"messages[{index}].content")
    return alternating(turns)


def _turns(message: AnthropicMessage, path: str) -> list[Message]:
    """One message as several: the results of tools each by itself, then the rest."""
    if isinstance(message.content, str):
        return [said(message.role, message.content)]
    results: list[Message] = []
    parts: list[Part] = []
    thought: list[str] = []
    for index, block in enumerate(message.content):
        place = f"{path}[{index}]"
        match block:
            case TextBlock() | ImageBlock():
                parts += _parts([block], path, index)
            case ToolResultBlock():
                _goes_with(message, "user", place)
                told = Result(block.tool_use_id, _parts(block.content or "", f"{place}.content"))
                results.append(Message("tool", (told,)))
            case ToolUseBlock():
                _goes_with(message, "assistant", place)
                check_nesting(block.input, f"{place}.input")
                parts.append(Call(block.name, ENCODER.encode(block.input).decode(), block.id))
            case ThinkingBlock():
                _goes_with(message, "assistant", place)
                thought.append(block.thinking)
    rest = Message(message.role, tuple(parts), reasoning="".join(thought) if thought else None)
    return results if results and rest.is_silent else [*results, rest]


def _goes_with(message: AnthropicMessage, role: str, path: str) -> None:
    if message.role != role:
        raise RequestError(f"{path} goes with the role {role}, not {message.role}", param=path)


def _parts(
    content: str | Sequence[TextBlock | ImageBlock | ToolReferenceBlock], path: str, first: int = 0
) -> tuple[Shown, ...]:
    """The parts of a content at `path`, from its block `first` on. The model is told of a tool that is referred to
    anyway, so its name is enough."""
    if isinstance(content, str):
        return (Text(content),) if content else ()
    parts: list[Shown] = []
    for index, block in enumerate(content, first):
        match block:
            case TextBlock():
                parts.append(Text(block.text))
            case ToolReferenceBlock():
                parts.append(Text(f"The tool {block.tool_name} can be called.\n"))
            case ImageBlock(source=URLSource(url=url)):
                parts.append(Image(url, f"{path}[{index}]", "image"))
            case ImageBlock(source=Base64Source(media_type=kind, data=data)):
                parts.append(Image(f"data:{kind};base64,{data}", f"{path}[{index}]", "image"))
    return tuple(parts)


def _options(request: web.Request, body: CountBody, wanted: Wanted) -> dict[str, Any]:
    """How the template writes the conversation, and with what effort it is told to think."""
    options = template_options(body)
    if body.output_config is None or (effort := body.output_config.effort) is None:
        return options
    text, tools = request.app[SERVICE].front.text, bool(wanted.offered)
    options, whole = with_effort(text, options, effort, tools=tools, switch=False)
    if not whole:
        ignore(request, "output_config.effort")
    return options


def template_options(body: CountBody) -> dict[str, Any]:
    """How the template writes the conversation: a last message of the assistant's goes on; whether it is to think."""
    going_on = body.messages[-1].role == "assistant"
    thinks = {"enabled": True, "disabled": False}.get(body.thinking.type if body.thinking else "")
    return {
        "add_generation_prompt": not going_on,
        "continue_final_message": going_on,
        "template_kwargs": None if thinks is None else {"enable_thinking": thinks, "thinking": thinks},
    }


def wanted_of(body: CountBody) -> Wanted:
    """What `body` says of tools."""
    tools: list[Tool] = []
    for index, tool in enumerate(body.tools or ()):
        if tool.type in SEARCHES:
            continue
        path = f"tools[{index}].input_schema"
        if tool.input_schema is None:
            raise RequestError(f"{path} is missing; send a JSON schema of an object", param=path)
        tools.append(tool_of(tool.name, tool.input_schema, tool.description, tool.strict, path))
    choice = body.tool_choice or AnthropicToolChoice(type="auto")
    if (choice.type == "tool") != (choice.name is not None):
        raise RequestError(
            f"tool_choice.type is {choice.type!r} and tool_choice.name is {choice.name!r:.80}; the type tool goes with "
            "a name, the others without",
            param="tool_choice",
        )
    modes: dict[str, Literal["none", "auto", "required"]] = {"none": "none", "auto": "auto"}
    mode = modes.get(choice.type, "required")
    return Wanted(checked(tools), mode, choice.name, not choice.disable_parallel_tool_use)


ROUTES = (
    Route(
        "POST",
        PREFIX,
        messages,
        takes=MessagesBody,
        gives=MessageReply,
        events=EVENTS,
        done=False,
        error=AnthropicErrorReply,
    ),
    Route(
        "POST",
        f"{PREFIX}/count_tokens",
        count_tokens,
        takes=CountBody,
        gives=CountReply,
        error=AnthropicErrorReply,
    ),
)
