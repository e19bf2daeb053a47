"""Messages, tools and prompts in a body as it came, read without a word of complaint.

The routes read bodies by their structs, and refuse what is wrong; whoever only has to know where a request goes reads
them here. What is wrong, or not known, is left out. Where a body is right, messages and tools are those that its route
makes of it. Left out: the fields of sampling.
"""

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from engine.conversation.parts import (
    ROLES,
    Call,
    Image,
    Message,
    Part,
    Result,
    Role,
    Shown,
    Text,
    Video,
    alternating,
    said,
    with_calls,
)

Body = Mapping[str, Any]
PROMPTS = ("prompt", "text", "input_ids", "input", "tokens", "query", "queries", "text_1")  # where they may be
NO_PARAMETERS: dict[str, Any] = {"properties": {}}


def compact(value: Any) -> str:
    """`value` as JSON without spaces; what JSON cannot say is empty."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):
        return ""


def _str(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _objects(value: Any) -> Iterator[Body]:
    return (each for each in _list(value) if isinstance(each, dict))


def _object(value: Any) -> Body:
    return value if isinstance(value, dict) else {}


# ── messages ─────────────────────────────────────────────────────────────────────────────────


def chat_messages(body: Body) -> list[Message]:
    """Those of a chat completion."""
    return [_chat_message(message) for message in _objects(body.get("messages"))]


def _chat_message(message: Body) -> Message:
    role = _role(message)
    shown = _shown(message.get("content"))
    parts: tuple[Part, ...] = (Result(None, shown),) if role == "tool" else shown
    for call in _objects(message.get("tool_calls")):
        parts += (_call(_object(call.get("function")), "arguments"),)
    thought = _str(message.get("reasoning_content")) or _str(message.get("reasoning"))
    return Message(role, parts, name=_str(message.get("name")) or None, reasoning=thought or None)


def _role(message: Body) -> Role:
    given = message.get("role")
    return next((role for role in ROLES if role == given), "user")


def _call(call: Body, field: str) -> Call:
    given = call.get(field)
    return Call(_str(call.get("name")), given if isinstance(given, str) else compact(given))


def _shown(content: Any) -> tuple[Shown, ...]:
    """The texts and media of a content, in the words of any of the APIs."""
    if isinstance(content, str):
        return (Text(content),) if content else ()
    return tuple(shown for part in _objects(content) if (shown := _part(part)) is not None)


def _part(part: Body) -> Shown | None:
    match part:
        case {"text": str(text)}:
            return Text(text)
        case {"type": "tool_reference", "tool_name": str(name)}:
            return Text(f"The tool {name} can be called.\n")
        case {"type": "image_url" | "input_image", "image_url": {"url": str(url), **more}}:
            return Image(url, "", detail=_str(more.get("detail")) or None)
        case {"type": "image_url" | "input_image", "image_url": str(url)}:
            return Image(url, "", detail=_str(part.get("detail")) or None)
        case {"type": "video_url", "video_url": {"url": str(url)}} | {"type": "input_video", "video_url": str(url)}:
            return Video(url, "")
        case {"type": "image", "source": {"type": "url", "url": str(url)}}:
            return Image(url, "")
        case {"type": "image", "source": {"type": "base64", "media_type": str(kind), "data": str(data)}}:
            return Image(f"data:{kind};base64,{data}", "")
    return None


def response_messages(body: Body) -> list[Message]:
    """Those of a response: its instructions and its input."""
    given = body.get("input")
    spoken = [said("system", _str(body.get("instructions")))] if _str(body.get("instructions")) else []
    if isinstance(given, str):
        return [*spoken, said("user", given)]
    return [*spoken, *with_calls(_item(item) for item in _objects(given))]


def _item(item: Body) -> Message:
    match item.get("type", "message"):
        case "function_call":
            called = _call(item, "arguments")
            space = _str(item.get("namespace"))
            return Message("assistant", (Call(f"{space}.{called.name}" if space else called.name, called.arguments),))
        case "function_call_output":
            return Message("tool", (Result(None, _shown(item.get("output"))),))
        case "reasoning":
            return Message("assistant", (), reasoning=Message("assistant", _shown(item.get("content"))).text)
    return Message(_role(item), _shown(item.get("content")))


def anthropic_messages(body: Body) -> list[Message]:
    """Those of Anthropic's API, and the system's."""
    system = _shown(body.get("system"))
    turns = [Message("system", system)] if system else []
    for message in _objects(body.get("messages")):
        turns += _turns(message)
    return alternating(turns)


def _turns(message: Body) -> list[Message]:
    """One message as several: the results of tools each by itself, then the rest."""
    role, content = _role(message), message.get("content")
    if isinstance(content, str):
        return [said(role, content)]
    results: list[Message] = []
    parts: list[Part] = []
    thought: list[str] = []
    for block in _objects(content):
        match block.get("type"):
            case "tool_result":
                results.append(Message("tool", (Result(None, _shown(block.get("content"))),)))
            case "tool_use":
                parts.append(_call(block, "input"))
            case "thinking":
                thought.append(_str(block.get("thinking")))
            case _:
                parts += [] if (shown := _part(block)) is None else [shown]
    rest = Message(role, tuple(parts), reasoning="".join(thought) if thought else None)
    return results if results and rest.is_silent else [*results, rest]


# ── tools ────────────────────────────────────────────────────────────────────────────────────


def tools_of(body: Body) -> list[dict[str, Any]]:
    """The tools that the model is told of, as chat templates take them, in the words of any of the APIs."""
    choice = _object(body.get("tool_choice"))
    if body.get("tool_choice") == "none" or choice.get("type") == "none":
        return []
    found = [tool for given in _objects(body.get("tools")) for tool in _tools(given)]
    if found and choice.get("type") == "allowed_tools":
        chosen = {**choice, **_object(choice.get("allowed_tools"))}
        names = {_allowed(tool) for tool in _objects(chosen.get("tools"))}
        found = [tool for tool in found if tool["function"]["name"] in names]
    return found


def _allowed(tool: Body) -> str:
    space, name = _str(tool.get("namespace")), _str(_object(tool.get("function", tool)).get("name"))
    return f"{space}.{name}" if space else name


def _tools(given: Body) -> Iterator[dict[str, Any]]:
    """The functions of one entry."""
    match given:
        case {"type": "namespace", "tools": list(inner)}:
            for tool in _objects(inner):
                if tool.get("type") == "function":
                    yield _tool(tool, f"{_str(given.get('name'))}.{_str(tool.get('name'))}")
        case {"function": dict(function)}:
            yield _tool(function, _str(function.get("name")))
        case {"type": "function"} | {"input_schema": _}:
            yield _tool(given, _str(given.get("name")))


def _tool(function: Body, name: str) -> dict[str, Any]:
    schema = function.get("parameters", function.get("input_schema"))
    parameters = {"type": "object", **(schema if isinstance(schema, dict) else NO_PARAMETERS)}
    about = _str(function.get("description")) or None
    return {"function": {"name": name, "description": about, "parameters": parameters}}


# ── texts and ids ────────────────────────────────────────────────────────────────────────────


def prompts_of(body: Body) -> list[str | bytes]:
    """The texts and the token ids (int32) that a body without messages has."""
    for field in PROMPTS:
        match body.get(field):
            case str(text):
                return [text]
            case [int(), *_] as ids:
                return [_ids(ids)]
            case list(several) if several:
                return [each if isinstance(each, str) else _ids(each) for each in several]
    return []


def first_shown(body: Body) -> tuple[Shown, ...]:
    """The first picture of a body without messages, or its first clip."""
    for field in ("image_data", "video_data"):
        each = body.get(field)
        while isinstance(each, list):
            each = next(filter(None, each), None)
        source, detail = (each.get("url"), each.get("detail")) if isinstance(each, dict) else (each, None)
        if source and isinstance(source, str):
            return (Image(source, "", detail=_str(detail)) if field == "image_data" else Video(source, ""),)
    return ()


def _ids(ids: Any) -> bytes:
    try:
        return array("i", ids if isinstance(ids, list) else ()).tobytes()
    except (TypeError, OverflowError):
        return b""
