"""What /v1/responses is asked, and the messages that its input becomes."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from engine.conversation.parts import Call, Image, Message, Result, Role, Shown, Text, Video
from engine.errors import RequestError
from engine.http.fields import ECHO, LABEL, Only, Rule, hint, unserved
from engine.http.grammars import NamedSchema, ObjectFormat, PlainFormat
from engine.http.responses.tools import ResponseTool, ResponseToolChoice, full_name
from engine.http.tools import FEW_MESSAGES, FEW_TOOLS, Effort, input_messages
from engine.http.wire import Body, Priority
from engine.params.grammar import Ask, GrammarFields
from engine.params.sampling import RESPONSES

Includable = Literal[
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
    "reasoning.encrypted_content", "message.output_text.logprobs",
]  # fmt: skip
# Beside what an item needs.
ALSO_TAKEN = {("reasoning", "content"), ("function_call_output", "name"), ("function_call", "namespace")}
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class InputTextPart(Body, tag_field="type", tag="input_text"):
    text: str
    annotations: Any = None
    logprobs: Any = None
    prompt_cache_breakpoint: Any = None
    cache_control: Any = None

    # An output item comes back as the client got it.
    rules: ClassVar[Mapping[str, Rule]] = {
        "annotations": ECHO,
        "logprobs": ECHO,
        "prompt_cache_breakpoint": LABEL,
        "cache_control": LABEL,
    }


class OutputTextPart(InputTextPart, tag_field="type", tag="output_text"):
    """What the model said."""


class ReasoningTextPart(InputTextPart, tag_field="type", tag="reasoning_text"):
    """What it thought."""


class SummaryTextPart(InputTextPart, tag_field="type", tag="summary_text"):
    """What it thought, in short."""


class InputImagePart(Body, tag_field="type", tag="input_image"):
    """A picture, for a model that sees: a data:, http(s): or file: URL."""

    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: Any = None
    prompt_cache_breakpoint: Any = None
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "file_id": unserved(remedy="send image_url"),
        "prompt_cache_breakpoint": LABEL,
        "cache_control": LABEL,
    }


class InputVideoPart(Body, tag_field="type", tag="input_video"):
    """A clip, for a model that sees, as OpenRouter's clients send it; OpenAI has none."""

    video_url: str
    prompt_cache_breakpoint: Any = None
    cache_control: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"prompt_cache_breakpoint": LABEL, "cache_control": LABEL}


InputPart = InputTextPart | OutputTextPart | ReasoningTextPart | SummaryTextPart | InputImagePart | InputVideoPart


class InputItemBody(Body):
    """An item of the input: a message, a call of a tool, what one returned, or what the model thought.

    A message has `role` and `content`, a call `call_id`, `name` and `arguments` (and `namespace`), and what it returned
    `call_id` and `output`."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    namespace: str | None = None
    id: Any = None
    status: Any = None
    phase: Any = None
    summary: Any = None
    encrypted_content: Any = None
    caller: Any = None
    cache_control: Any = None

    # An output item comes back as the client got it.
    rules: ClassVar[Mapping[str, Rule]] = {
        "id": ECHO,
        "status": ECHO,
        "phase": ECHO,
        "summary": ECHO,
        "encrypted_content": LABEL,
        "caller": ECHO,
        "cache_control": LABEL,
    }


class SchemaTextBody(NamedSchema, tag_field="type", tag="json_schema", kw_only=True):
    """A named schema, without the object around it that chat completions have."""


class TextBody(Body):
    format: PlainFormat | ObjectFormat | SchemaTextBody | None = None
    verbosity: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"verbosity": hint("medium")}


FORMATS = GrammarFields(
    {
        "format": {
            ObjectFormat: Ask("json_object"),
            SchemaTextBody: Ask("json_schema", attrgetter("schema"), attrgetter("strict"), place=".schema"),
        }
    }
)


class ReasoningBody(Body):
    """`effort` is for the chat template, if that has a switch."""

    effort: Effort | None = None
    context: Any = None
    generate_summary: Any = None
    mode: Any = None
    summary: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "context": hint("auto", "all_turns"),
        "generate_summary": hint(),
        "mode": hint("standard"),
        "summary": hint(),
    }


@RESPONSES.fields
class ResponsesBody(Body):
    """Null is the same as absent. `top_k`, `min_p`, `seed`, `stop`, `priority` and `session_id` are extensions."""

    input: str | Annotated[list[InputItemBody], FEW_MESSAGES]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    priority: Priority | None = None
    session_id: str | None = None
    text: TextBody | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: Metadata | None = None
    tools: Annotated[list[ResponseTool], FEW_TOOLS] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[Includable] | None = None
    reasoning: ReasoningBody | None = None
    cache_control: Any = None
    client_metadata: Any = None
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
    moderation: Any = None
    prompt: Any = None
    service_tier: Any = None
    truncation: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "cache_control": LABEL,
        "client_metadata": hint(),
        "max_tool_calls": LABEL,  # of tools that the server runs
        "prompt_cache_key": LABEL,
        "prompt_cache_options": LABEL,
        "prompt_cache_retention": LABEL,
        "safety_identifier": LABEL,
        "stream_options": LABEL,
        "user": LABEL,
        "access_programs": unserved(),
        "background_options": unserved(),
        "context_management": unserved([]),
        "conversation": unserved(),
        "image": unserved(),
        "moderation": unserved(),
        "prompt": unserved(),
        "service_tier": hint("auto", "default"),
        "truncation": hint("disabled", only=Only('"auto"', lambda value: value == "auto")),  # too long: an error
    }


class RetrieveQuery(Body):
    """A stream begins after the event with the number `starting_after`."""

    stream: bool = False
    starting_after: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    include_obfuscation: bool = False  # no padding is added


class ItemsQuery(Body):
    """Those after the item `after`, in the order of the conversation or, by default, from its end."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"


# ── from an input to messages ────────────────────────────────────────────────────────────────


def messages_of(input: str | list[InputItemBody]) -> list[Message]:
    """`input` as messages: calls and reasoning are part of what the assistant said."""
    return input_messages(input, _message)


def _message(item: InputItemBody, path: str) -> Message:
    """One item as a message."""
    needs = {
        "message": ("role", "content"),
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
        "reasoning": (),
    }[item.type]
    for field in ("role", "content", "call_id", "name", "arguments", "output", "namespace"):
        given = getattr(item, field) is not None
        if field in needs and not given:
            raise RequestError(f"{path}.{field} is missing; a {item.type} needs one", param=f"{path}.{field}")
        if field not in needs and given and (item.type, field) not in ALSO_TAKEN:
            raise RequestError(f"{path}.{field} does not go with the type {item.type}", param=f"{path}.{field}")
    match item.type:
        case "function_call":
            name = full_name(item.name or "", item.namespace)
            return Message("assistant", (Call(name, item.arguments or "", item.call_id),))
        case "function_call_output":
            return Message("tool", (Result(item.call_id, _parts(item.output, f"{path}.output")),))
        case "reasoning":
            thought = Message("assistant", _parts(item.content, f"{path}.content")).text
            return Message("assistant", (), reasoning=thought)
    role: Role = "system" if item.role == "developer" else item.role or "user"
    return Message(role, _parts(item.content, f"{path}.content"))


def _parts(content: str | list[InputPart] | None, path: str) -> tuple[Shown, ...]:
    if isinstance(content, str):
        return (Text(content),) if content else ()
    return tuple([_part(part, f"{path}[{index}]") for index, part in enumerate(content or ())])


def _part(part: InputPart, place: str) -> Shown:
    match part:
        case InputImagePart():
            return Image(part.image_url, place, "input_image", part.detail)
        case InputVideoPart():
            return Video(part.video_url, place, "input_video")
    return Text(part.text)
