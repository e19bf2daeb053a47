"""Tools in a conversation: messages as templates take them, and all of it in plain words for templates that do not.

A template without a branch for tools is helped out by messages: a system message describes the tools and how a call is
written (the `syntax` of the parser in use), past calls are part of what the assistant said, and what they returned is
said by the user in <tool_response>. What a reply must be so that it calls a tool is in calls.py. Pure logic.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from msgspec.structs import replace

from engine.conversation.parts import Call as PastCall
from engine.conversation.parts import Image, Message, Shown, Text, as_one, said
from engine.plugin.parsing import Call, CallSyntax

EXAMPLE = Call("the_name", '{"an_argument": "its value"}')


# ── as templates take them ───────────────────────────────────────────────────────────────────


def as_written(
    messages: Iterable[Message],
    *,
    text_arguments: bool = False,
    alone: bool = False,
    listed: Callable[[Message], bool] | None = None,
) -> Iterator[dict[str, Any]]:
    """`messages` as a template takes them, in OpenAI's shape.

    A content is one text, or where it is `listed`, a list of parts. The arguments of calls are text, or the object that
    the text holds, if it holds one; if `alone`, calls are in messages of their own, whose content is None."""
    for message in messages:
        in_parts = listed is not None and listed(message)
        content = [_part(part) for part in message.shown] if in_parts else message.text
        plain: dict[str, Any] = {"role": message.role, "content": content}
        if message.role == "tool" and (answered := message.answers) is not None:
            plain["tool_call_id"] = answered
        if message.name is not None:
            plain["name"] = message.name
        if message.reasoning is not None:
            plain["reasoning_content"] = message.reasoning
        if message.extra:
            plain |= message.extra
        if not (calls := message.calls):
            yield plain
            continue
        if alone and content:
            yield plain
        written = [
            {"type": "function"}
            | ({} if call.id is None else {"id": call.id})
            | {
                "function": {
                    "name": call.name,
                    "arguments": call.arguments if text_arguments else _object_of(call.arguments),
                }
            }
            for call in calls
        ]
        yield plain | {"tool_calls": written} | ({"content": None} if alone else {})


def _part(part: Shown) -> dict[str, Any]:
    """One of a content's parts. Of media a template writes the placeholder alone."""
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, Image) else "video"}


def _object_of(arguments: str) -> str | dict[str, Any]:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def with_names(messages: Sequence[Message]) -> list[Message]:
    """`messages`, in which those of tools name the tool: some templates ask for that, and clients do not say it."""
    names: dict[str, str] = {}
    named = []
    for message in messages:
        for call in message.calls:
            names[call.id or ""] = call.name
        answered = names.get(message.answers or "")
        missing = message.role == "tool" and not message.name and answered
        named.append(replace(message, name=answered) if missing else message)
    return named


# ── in plain words ───────────────────────────────────────────────────────────────────────────


def in_other_words(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    syntax: CallSyntax,
    *,
    calls: bool,
    system: bool,
) -> list[Message]:
    """`messages` for a template that does not describe `tools`, if there are any, nor, if `calls`, writes past calls.

    The tools are described in a system message, or where the template takes no `system` in the first one."""
    told = list(_spelled_out(messages, syntax)) if calls else list(messages)
    if not tools:
        return told
    words = introduction(tools, syntax)
    first = told[0]
    between = (Text("\n\n"),) if first.text else ()
    if first.role in ("system", "developer"):
        told[0] = replace(first, parts=(*first.parts, *between, Text(words)))
    elif system:
        told.insert(0, said("system", words))
    else:
        told[0] = replace(first, parts=(Text(f"{words}\n\n"), *first.parts))
    return told


def introduction(tools: Sequence[dict[str, Any]], syntax: CallSyntax) -> str:
    """What a model is told of `tools` whose template does not do so."""
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You may call these functions, each described by a JSON object:\n{described}\n\n"
        f"To call one, reply with its name and its arguments, written exactly like this:\n{syntax.write([EXAMPLE])}\n\n"
        f"To call two at once:\n{syntax.write([EXAMPLE, EXAMPLE])}\n\n"
        "What a function returns follows in <tool_response></tool_response>. If no function helps, reply in words."
    )


def _spelled_out(messages: Sequence[Message], syntax: CallSyntax) -> Iterator[Message]:
    """Calls as part of what the assistant said; what they returned as one message of the user's."""
    returned: list[Message] = []
    for message in messages:
        if message.role == "tool":
            whole = (Text("<tool_response>\n"), *message.shown, Text("\n</tool_response>"))
            returned.append(Message("user", whole))
            continue
        if returned:
            yield as_one(returned, "\n")
            returned = []
        if calls := message.calls:
            written = syntax.write([Call(call.name, _rewritten(call.arguments)) for call in calls])
            rest = [part for part in message.parts if not isinstance(part, PastCall)]
            between = [Text("\n")] if message.text else []
            yield replace(message, parts=(*rest, *between, Text(written)))
        else:
            yield message
    if returned:
        yield as_one(returned, "\n")


def _rewritten(arguments: str) -> str:
    """`arguments` as JSON is written here, if they are an object."""
    value = _object_of(arguments)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
