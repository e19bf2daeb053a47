"""The messages and tools of OpenAI's chat API, from what clients send to what a chat template takes.

Also what a request says of its template. Left out: sound and files; how a call is forced, and how replies are read
(reading.py).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

from msgspec import Meta

from engine.conversation.calls import Tool
from engine.conversation.parts import Call, Image, Message, Part, Result, Role, Shown, Text, Video
from engine.errors import RequestError
from engine.http.fields import ECHO, LABEL, Only, Rule, hint, unserved
from engine.http.wire import Body, to_json
from engine.params.grammar import check_nesting

TOOL_NAME = r"^[A-Za-z0-9_.\-]{1,128}$"
ToolName = Annotated[str, Meta(pattern=TOOL_NAME)]
# More than any honest client has. What all of them may hold together is in parts.py.
FEW_MESSAGES = Meta(max_length=10_000)
FEW_TOOLS = Meta(max_length=1024)
# That programs of the server's may call a tool as well, which there are none of.
CALLED_DIRECTLY = hint(
    ["direct"], only=Only('a list with "direct"', lambda value: isinstance(value, list) and "direct" in value)
)
MAX_TEMPLATE_KWARGS = 1 << 16  # bytes of JSON: what follows from them is remembered by them


# ── bodies ───────────────────────────────────────────────────────────────────────────────────


class TextPart(Body, tag_field="type", tag="text"):
    text: str
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"cache_control": LABEL}


class ImageURL(Body):
    """A data: or an http(s): URL, and how finely the picture is to be read."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Body, tag_field="type", tag="image_url"):
    """A picture, for a model that sees."""

    image_url: ImageURL
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"cache_control": LABEL}


class VideoURL(Body):
    url: str


class VideoPart(Body, tag_field="type", tag="video_url"):
    """A clip, for a model that sees."""

    video_url: VideoURL
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"cache_control": LABEL}


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
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


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
    return checked(found)


def tool_of(
    name: str, parameters: dict[str, Any] | None, description: str | None, strict: bool | None, path: str
) -> Tool:
    """One tool, whose schema of parameters the client calls `path`. Raises RequestError unless that is of an object."""
    kind = "object" if parameters is None else parameters.get("type", "object")
    if kind != "object":
        raise RequestError(
            f"{path}.type is {kind!r:.80}; arguments come by name, so the schema must be of an object", param=path
        )
    check_nesting(parameters, path)
    return Tool(name, None if parameters is None else {"type": "object", **parameters}, description, bool(strict))


def checked(tools: list[Tool]) -> list[Tool]:
    """Raises RequestError where two of `tools` have one name."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            message = f"two tools are called {tool.name!r}; give each a name of its own"
            raise RequestError(message, param=f"tools[{index}]")
        names.add(tool.name)
    return tools


def among(tools: list[Tool], names: Sequence[str], path: str) -> list[Tool]:
    """Those of `tools` that the client lists in `path`, as if it had sent no others."""
    known = {tool.name: tool for tool in tools}
    for index, name in enumerate(names):
        if name not in known:
            raise RequestError(
                f"{path}[{index}] names {name!r:.200}, which is no tool of the request; its tools: "
                f"{', '.join(known) or 'none at all'}",
                param=path,
            )
    if not names:
        raise RequestError(f"{path} is empty; allow at least one tool, or send tool_choice none", param=path)
    return [tool for tool in tools if tool.name in names]


# ── templates ────────────────────────────────────────────────────────────────────────────────


class TemplateFields(Protocol):
    """The fields of a body that say how the chat template writes its messages. Null is the same as absent."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None


def template_options(body: TemplateFields) -> dict[str, Any]:
    """How to render the messages of `body`, as Generate and Text.render_chat take it."""
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
