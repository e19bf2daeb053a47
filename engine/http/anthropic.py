"""The Anthropic API: /v1/messages and /v1/messages/count_tokens, for text and tools.

A last message of the assistant's is continued; successive messages of one role are one. What replies look like is in
anthropic_reply.py. Left out, and refused by name: images and documents, tools that the server runs, batches.
"""

from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from aiohttp import web
from msgspec import Meta

from engine.call_grammar import Tool
from engine.errors import RequestError
from engine.front import joined
from engine.grammar import check_nesting
from engine.http.anthropic_reply import AnthropicReply, failure_event
from engine.http.conversation import FEW_MESSAGES, FEW_TOOLS, ToolName, checked, tool_of
from engine.http.reading import Wanted, reading_of
from engine.http.request_id import called
from engine.http.service import SERVICE, in_client_words
from engine.http.sse import send_events
from engine.http.tokens import tokenized
from engine.http.wire import Body, Reply, check_served, json_response, to_json
from engine.messages import Generate, SamplingParams, Tokenize
from engine.sampling import INT32_MAX, check_sampling

PREFIX = "/v1/messages"
CLIENT_NAMES = {"stop": "stop_sequences", "grammar": "tools"}


# ── bodies ───────────────────────────────────────────────────────────────────────────────────


class TextBlock(Body, tag_field="type", tag="text"):
    text: str
    cache_control: Any = None  # ignored: every prefix is cached
    citations: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {"citations": ([],)}


class ToolUseBlock(Body, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    # Ignored.
    cache_control: Any = None
    caller: Any = None
    toolset_name: Any = None


class ToolResultBlock(Body, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None  # ignored: what the result says is all that the model sees
    # Ignored.
    cache_control: Any = None
    toolset_name: Any = None


class ThinkingBlock(Body, tag_field="type", tag="thinking"):
    thinking: str
    signature: Any = None  # ignored: there is none


class RedactedThinkingBlock(Body, tag_field="type", tag="redacted_thinking"):
    """Ignored: nobody here can read it."""

    data: Any = None


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock


class AnthropicMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Body):
    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None
    # Ignored: they change nothing that the engine does.
    cache_control: Any = None
    eager_input_streaming: Any = None
    input_examples: Any = None
    allowed_callers: Any = None
    defer_loading: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {"allowed_callers": (["direct"],), "defer_loading": (False,)}


class AnthropicToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """What the template is told of thinking. How long it may be is not: `budget_tokens` is ignored."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Any = None
    display: Any = None  # ignored


class CountBody(Body):
    """What a prompt is made of. Null is the same as absent."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1), FEW_MESSAGES]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], FEW_TOOLS] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: Any = None  # ignored
    user_profile_id: Any = None  # ignored
    workspace_id: Any = None  # ignored
    output_config: Any = None
    speed: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {"output_config": ({},), "speed": ("standard",)}


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


# ── handlers ─────────────────────────────────────────────────────────────────────────────────


async def messages(request: web.Request, body: MessagesBody) -> web.StreamResponse:
    """Answer a conversation in Anthropic's shape, whole or streamed."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    given = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(body, name)) is not None}
    sampling = SamplingParams(max_tokens=body.max_tokens, stop=tuple(body.stop_sequences or ()), **given)
    check_sampling(sampling, CLIENT_NAMES)
    conversation, options = conversation_of(body), template_options(body)
    reading = reading_of(service.front.text, sampling, conversation, options, wanted_of(body), names=CLIENT_NAMES)
    rid = f"msg_{uuid4().hex}"
    job = Generate(rid, sampling, messages=conversation, **options, **reading.job)
    reply = AnthropicReply(rid, service.model, reading)
    chunks = service.metrics.watch(service.front.generate(job), "messages")
    with in_client_words(CLIENT_NAMES), service.known_as(called(request, rid), rid, [job]):
        async with aclosing(chunks):
            if body.stream:
                return await send_events(request, chunks, reply, failure=failure_event)
            whole = joined([chunk async for chunk in chunks])
    return json_response(reply.whole(whole))


async def count_tokens(request: web.Request, body: CountBody) -> web.Response:
    """Count the tokens of a conversation as /v1/messages would read it."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    conversation, options = conversation_of(body), template_options(body)
    tools = [tool.described() for tool in wanted_of(body).offered]
    found = await tokenized(service, Tokenize(None, conversation, {"tools": tools, **options}), "messages")
    return json_response(CountReply(len(found.ids) // 4))


# ── from a body to a Generate ────────────────────────────────────────────────────────────────


def conversation_of(body: CountBody) -> list[dict[str, Any]]:
    """The messages as a chat template takes them: the system's first, no two of one role in a row but tools'."""
    runs: list[list[dict[str, Any]]] = []  # of turns that become one
    if body.system:
        runs.append([{"role": "system", "content": _text(body.system, "system")}])
    for index, message in enumerate(body.messages):
        for turn in _turns(message, f"messages[{index}].content"):
            if runs and runs[-1][0]["role"] == turn["role"] != "tool":
                runs[-1].append(turn)
            else:
                runs.append([turn])
    return [run[0] if len(run) == 1 else _as_one(run) for run in runs]


def _as_one(turns: list[dict[str, Any]]) -> dict[str, Any]:
    one = dict(item for turn in turns for item in turn.items())
    one["content"] = "\n".join(turn["content"] for turn in turns if turn["content"])
    if calls := [call for turn in turns for call in turn.get("tool_calls", ())]:
        one["tool_calls"] = calls
    return one


def _turns(message: AnthropicMessage, path: str) -> list[dict[str, Any]]:
    """One message as the template has it: the results of tools each by itself, then the rest."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    said: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        place = f"{path}[{index}]"
        check_served(block, f"{place}.")
        match block:
            case TextBlock():
                said.append(block.text)
            case ToolResultBlock():
                _goes_with(message, "user", place)
                told = _text(block.content or "", f"{place}.content")
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": told})
            case ToolUseBlock():
                _goes_with(message, "assistant", place)
                check_nesting(block.input, f"{place}.input")
                function = {"name": block.name, "arguments": to_json(block.input).decode()}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ThinkingBlock():
                _goes_with(message, "assistant", place)
                thought.append(block.thinking)
    rest: dict[str, Any] = {"role": message.role, "content": "".join(said)}
    if thought:
        rest["reasoning_content"] = "".join(thought)
    if calls:
        rest["tool_calls"] = calls
    return results if results and not rest["content"] else [*results, rest]


def _goes_with(message: AnthropicMessage, role: str, path: str) -> None:
    if message.role != role:
        raise RequestError(f"{path} goes with the role {role}, not {message.role}", param=path)


def _text(content: str | list[TextBlock], path: str) -> str:
    if isinstance(content, str):
        return content
    for index, block in enumerate(content):
        check_served(block, f"{path}[{index}].")
    return "".join(block.text for block in content)


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
        check_served(tool, f"tools[{index}].")
        tools.append(
            tool_of(tool.name, tool.input_schema, tool.description, tool.strict, f"tools[{index}].input_schema")
        )
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
