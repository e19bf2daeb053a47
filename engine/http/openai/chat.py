"""/v1/chat/completions: its messages, tools and template, from what clients send to a `Generate`.

The fields that it shares with /v1/completions are in bodies.py, and what the replies look like is in replies.py.
Left out: sound and files; how a call is forced, and how replies are read (conversation/reading.py).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol
from uuid import uuid4

from aiohttp import web

from engine.conversation.calls import Tool
from engine.conversation.parts import Call, Image, Message, Part, Result, Role, Shown, Text, Video
from engine.conversation.reading import Wanted, reading_of
from engine.errors import RequestError, Words
from engine.http.effort import with_effort
from engine.http.fields import ECHO, LABEL, Rule, hint, ignore, label, unserved
from engine.http.grammars import OPENAI_FIELDS
from engine.http.openai.bodies import SamplingBody
from engine.http.openai.replies import ChatCompletion, ChatCompletionChunk, Wording, complete
from engine.http.openapi import ErrorReply, Route
from engine.http.service import SERVICE, check_kept, program_of, salt_of, sampling_of, session_of
from engine.http.tools import FEW_MESSAGES, FEW_TOOLS, Effort, ToolName, among, checked, tool_of
from engine.http.wire import Body, to_json
from engine.messages.request import Generate
from engine.params.grammar import check_nesting
from engine.params.sampling import CHAT

MAX_TEMPLATE_KWARGS = 1 << 16  # bytes of JSON: what follows from them is remembered by them
CHAT_WORDS = Words({**CHAT.names, "prompt": "messages", "grammar": "tools"})


# ── bodies ───────────────────────────────────────────────────────────────────────────────────


OF_PARTS = {"cache_control": LABEL, "prompt_cache_breakpoint": LABEL}


class TextPart(Body, tag_field="type", tag="text"):
    text: str
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None

    rules: ClassVar[Mapping[str, Rule]] = OF_PARTS


class ImageURL(Body):
    """A data:, http(s): or file: URL. The resolution is the model's own, whatever `detail` asks for."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Body, tag_field="type", tag="image_url"):
    """A picture, for a model that sees. It is known by what it shows, not by its `uuid`, which vLLM's clients send."""

    image_url: ImageURL
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    uuid: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {**OF_PARTS, "uuid": LABEL}


class VideoURL(Body):
    url: str


class VideoPart(Body, tag_field="type", tag="video_url"):
    """A clip, for a model that sees."""

    video_url: VideoURL
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    uuid: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {**OF_PARTS, "uuid": LABEL}


ContentPart = TextPart | ImagePart | VideoPart


class PastFunction(Body):
    name: str
    arguments: str


class PastCall(Body):
    """A call that the model made, as the client got it."""

    id: str
    function: PastFunction
    type: Literal["function"] = "function"
    index: Any = None  # a stream's deltas have it
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"index": ECHO, "cache_control": LABEL}


class ChatMessage(Body):
    """One message. A developer's is a system message to the model.

    `reasoning` is vLLM's name for `reasoning_content`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    cache_control: Any = None

    # An assistant's message comes back as the client got it.
    rules: ClassVar[Mapping[str, Rule]] = {
        "refusal": unserved(),
        "annotations": hint(),
        "audio": unserved(),
        "function_call": unserved(remedy="send tool_calls, which took its place"),
        "cache_control": LABEL,
    }


class FunctionBody(Body):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"cache_control": LABEL}


class ToolBody(Body):
    function: FunctionBody
    type: Literal["function"] = "function"
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"cache_control": LABEL}


class NamedFunction(Body):
    name: str


class AllowedFunction(Body):
    function: NamedFunction
    type: Literal["function"] = "function"


class NamedTool(Body, tag_field="type", tag="function"):
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedFunction], FEW_TOOLS]


class AllowedChoice(Body, tag_field="type", tag="allowed_tools"):
    """As if no other tools had been sent."""

    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice


@CHAT.fields
class ChatBody(SamplingBody, kw_only=True):
    messages: Annotated[list[ChatMessage], FEW_MESSAGES]
    logprobs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[ToolBody], FEW_TOOLS] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Effort | None = None
    stream_reasoning: Any = None
    best_of: Any = None
    cache_control: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    service_tier: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        **SamplingBody.rules,
        "best_of": unserved(1, remedy="send n, and choose among the replies"),
        "cache_control": LABEL,
        "metadata": LABEL,
        "store": label(False),
        "safety_identifier": LABEL,
        "prompt_cache_key": LABEL,
        "prompt_cache_options": LABEL,
        "prompt_cache_retention": LABEL,
        "audio": unserved(),
        "functions": unserved([], remedy="send tools, which took its place"),
        "function_call": unserved("none", "auto", remedy="send tool_choice, which took its place"),
        "modalities": unserved(["text"]),
        "moderation": unserved(),
        "prediction": hint(),
        "service_tier": hint("auto", "default"),
        "stream_reasoning": unserved(True),
        "verbosity": hint("medium"),
        "web_search_options": unserved(),
    }


# ── the handler ──────────────────────────────────────────────────────────────────────────────


async def chat_completions(request: web.Request, body: ChatBody) -> web.StreamResponse:
    """Answer a conversation, whole or streamed."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    service.check_template(body.chat_template)
    fields, called = CHAT.given(body)
    likeliest = fields.pop("logprobs", None)
    if likeliest and not body.logprobs:
        raise RequestError(f"top_logprobs is {likeliest}; it needs logprobs: true", param="top_logprobs")
    if body.logprobs:
        fields["logprobs"] = likeliest or 0
    fields["grammar"], field = OPENAI_FIELDS.asked(body)
    sampling = sampling_of(request, CHAT_WORDS, fields, called=called, grammar=field)
    messages, wanted, text = messages_of(body.messages), wanted_of(body), service.front.text
    options = template_options(body)
    if body.reasoning_effort is not None:
        options, degree = with_effort(text, options, body.reasoning_effort, tools=bool(wanted.offered))
        if not degree:
            ignore(request, "reasoning_effort")
    separate, told = body.separate_reasoning is not False, _tells_reasoning(body)
    reading = reading_of(text, sampling, messages, options, wanted, separate=separate, told=told)
    called |= reading.grammar_names(field)
    job = Generate(
        f"chatcmpl-{uuid4().hex}",
        messages=messages,
        priority=body.priority or 0,
        cache_salt=salt_of(body.cache_salt),
        program=program_of(request, body.program),
        special=body.add_special_tokens,
        last=check_kept(body.truncate_prompt_tokens),
        tell_prompt=bool(body.return_token_ids),
        session=session_of(request, body.session_id),
        **options,
        **reading.job,
    )
    about_prompt = sampling.prompt_logprobs is not None
    wording = Wording(chat=True, logprobs=bool(body.logprobs), prompt_logprobs=about_prompt)
    return await complete(request, body, [job], wording, reading)


def _tells_reasoning(body: ChatBody) -> bool:
    """Whether the reply has what the model thinks."""
    told = body.include_reasoning is not False
    if not told and body.separate_reasoning is False:
        raise RequestError(
            "separate_reasoning is false, which leaves reasoning in the content, and include_reasoning is false, which "
            "leaves it out; send one",
            param="include_reasoning",
        )
    return told


def wanted_of(body: ChatBody) -> Wanted:
    """What `body` says of tools."""
    tools, choice = tools_of(body.tools), body.tool_choice
    parallel = body.parallel_tool_calls is not False
    match choice:
        case NamedTool(function):
            return Wanted(tools, "required", function.name, parallel)
        case AllowedChoice(allowed):
            names = [tool.function.name for tool in allowed.tools]
            few = among(tools, names, "tool_choice.allowed_tools.tools")
            return Wanted(few, allowed.mode, None, parallel, held=len(few) < len(tools))
    return Wanted(tools, choice or "auto", None, parallel)


# ── messages ─────────────────────────────────────────────────────────────────────────────────


def messages_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages with their parts. Raises RequestError where one lacks what its role needs, or has what does not go with
    that."""
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: ChatMessage, path: str) -> Message:
    only = (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("reasoning", "assistant"))
    for field, theirs in (*only, ("tool_call_id", "tool")):
        if getattr(message, field) and message.role != theirs:
            raise RequestError(
                f"{path}.{field} goes with the role {theirs}, not {message.role}", param=f"{path}.{field}"
            )
    if message.role == "tool" and not message.tool_call_id:
        missing = f"{path}.tool_call_id is missing; send the id of the call that this message answers"
        raise RequestError(missing, param=f"{path}.tool_call_id")
    content = message.content
    if content is None and message.role != "assistant":
        raise RequestError(f"{path}.content is missing; a {message.role} message needs a text", param=f"{path}.content")
    role: Role = "system" if message.role == "developer" else message.role
    shown = _parts(content, path)
    parts: tuple[Part, ...] = (Result(message.tool_call_id, shown),) if role == "tool" else shown
    if message.tool_calls:
        parts += tuple(Call(call.function.name, call.function.arguments, call.id) for call in message.tool_calls)
    thought = either(message, "reasoning_content", "reasoning", f"{path}.")
    return Message(role, parts, name=message.name or None, reasoning=thought or None)


def _parts(content: str | Sequence[ContentPart] | None, path: str) -> tuple[Shown, ...]:
    if isinstance(content, str):
        return (Text(content),) if content else ()
    parts: list[Shown] = []
    for index, part in enumerate(content or ()):
        match part:
            case TextPart():
                parts.append(Text(part.text))
            case ImagePart():
                parts.append(Image(part.image_url.url, f"{path}.content[{index}]", "image_url", part.image_url.detail))
            case VideoPart():
                parts.append(Video(part.video_url.url, f"{path}.content[{index}]", "video_url"))
    return tuple(parts)


def either(body: Body, name: str, alias: str, path: str = "") -> Any:
    """The field `name` of `body`, which `alias` is another name of; RequestError where they differ."""
    ours, theirs = getattr(body, name), getattr(body, alias)
    if None not in (ours, theirs) and ours != theirs:
        raise RequestError(
            f"{path}{name} is {ours!r:.80} and {path}{alias} is {theirs!r:.80}; they mean the same, so send one",
            param=path + alias,
        )
    return theirs if ours is None else ours


def tools_of(tools: Sequence[ToolBody] | None) -> list[Tool]:
    """The tools of a request, checked."""
    found = []
    for index, body in enumerate(tools or ()):
        function = body.function
        path = f"tools[{index}].function"
        found.append(
            tool_of(function.name, function.parameters, function.description, function.strict, f"{path}.parameters")
        )
    return checked(found) if found else found


# ── templates ────────────────────────────────────────────────────────────────────────────────


class TemplateFields(Protocol):
    """The fields of a body that say how the chat template writes its messages. Null is the same as absent."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None


def template_options(body: TemplateFields) -> dict[str, Any]:
    """How to render the messages of `body`, as Generate and Text.render_chat take it."""
    if body.chat_template_kwargs is not None:
        check_nesting(body.chat_template_kwargs, "chat_template_kwargs")
        if (size := len(to_json(body.chat_template_kwargs))) > MAX_TEMPLATE_KWARGS:
            raise RequestError(
                f"chat_template_kwargs has {size} bytes, and at most {MAX_TEMPLATE_KWARGS} are taken; send less",
                param="chat_template_kwargs",
            )
    going_on = bool(body.continue_final_message)
    if going_on and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt are both true, and exclude each other; send one",
            param="add_generation_prompt",
        )
    opened = not going_on if body.add_generation_prompt is None else body.add_generation_prompt
    return {
        "add_generation_prompt": opened,
        "continue_final_message": going_on,
        "template_kwargs": body.chat_template_kwargs,
        "chat_template": body.chat_template,
    }


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        takes=ChatBody,
        gives=ChatCompletion,
        events=(ChatCompletionChunk, ErrorReply),
    ),
)
