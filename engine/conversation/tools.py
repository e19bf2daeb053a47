"""Tools in a conversation: past calls as templates take them, and all of it in plain words for templates that do not.

A template without a branch for tools is helped out by messages: a system message describes the tools and how a call is
written (the `syntax` of the parser in use), past calls are part of what the assistant said, and what they returned is
said by the user in <tool_response>. What a reply must be so that it calls a tool is in call_grammar.py. Pure logic.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from engine.errors import RequestError
from engine.plugin.parsing import Call, CallSyntax

ROLES = ("system", "developer", "user", "assistant", "tool")
EXAMPLE = Call("the_name", '{"an_argument": "its value"}')


# ── messages, checked ────────────────────────────────────────────────────────────────────────


def plain_message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """`message` with its content as one string, as templates expect it, and without an empty list of calls.

    Raises RequestError when it is malformed."""

    def refuse(what: str) -> NoReturn:
        raise RequestError(f"messages[{index}] {what}", param="messages")

    if not isinstance(message, dict):
        refuse(f"is {message!r}; an object with role and content is needed")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        refuse(f"has role {role!r}; it must be one of {', '.join(ROLES)}")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                refuse('has a content part that is not {"type": "text", "text": "..."}; this model reads only text')
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        refuse(f"has content {content!r}; a string or a list of text parts is needed")
    if not isinstance(message.get("tool_call_id"), str | None):
        refuse(f"has tool_call_id {message['tool_call_id']!r:.80}; send the id of the call as text")
    plain = {**message, "content": content}
    if not (calls := plain.pop("tool_calls", None)):
        return plain
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            refuse(f'has the tool call {call!r:.80}; {{"function": {{"name", "arguments"}}}} is needed')
        if not isinstance(function.get("arguments"), str | dict):
            refuse(f"has a call of {function['name']!r} without arguments; send them as text that holds JSON")
        if not isinstance(call.get("id"), str | None):
            refuse(f"has a call of {function['name']!r} with the id {call['id']!r:.80}; send it as text")
    return plain | {"tool_calls": calls}


def as_written(messages: Iterable[dict[str, Any]], *, text_arguments: bool, alone: bool) -> Iterator[dict[str, Any]]:
    """`messages` with calls as a template wants them: arguments as text, or as the object that the text holds, if it
    holds one; and if `alone`, in messages of their own, whose content is None."""
    for message in messages:
        if "tool_calls" not in message:
            yield message
            continue
        calls = []
        for call in message["tool_calls"]:
            given = call["function"]["arguments"]
            arguments = _text_of(given) if text_arguments else _object_of(given)
            calls.append({"type": "function", **call, "function": {**call["function"], "arguments": arguments}})
        if alone and message["content"]:
            yield {key: value for key, value in message.items() if key != "tool_calls"}
        yield {**message, "tool_calls": calls} | ({"content": None} if alone else {})


def _text_of(arguments: str | dict[str, Any]) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _object_of(arguments: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(arguments, dict):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def with_names(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages`, in which those of tools name the tool: some templates ask for that, and clients do not say it."""
    names: dict[str, str] = {}
    named = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[call.get("id") or ""] = call["function"]["name"]
        answered = names.get(message.get("tool_call_id") or "")
        missing = message["role"] == "tool" and not message.get("name") and answered
        named.append({**message, "name": answered} if missing else message)
    return named


# ── in plain words ───────────────────────────────────────────────────────────────────────────


def in_other_words(
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    syntax: CallSyntax,
    *,
    calls: bool,
    system: bool,
) -> list[dict[str, Any]]:
    """`messages` for a template that does not describe `tools`, if there are any, nor, if `calls`, writes past calls.

    The tools are described in a system message, or where the template takes no `system` in the first one."""
    said = list(_spelled_out(messages, syntax)) if calls else list(messages)
    if not tools:
        return said
    words = introduction(tools, syntax)
    first = said[0]
    if first["role"] in ("system", "developer"):
        said[0] = {**first, "content": f"{first['content']}\n\n{words}" if first["content"] else words}
    elif system:
        said.insert(0, {"role": "system", "content": words})
    else:
        said[0] = {**first, "content": f"{words}\n\n{first['content']}"}
    return said


def introduction(tools: Sequence[dict[str, Any]], syntax: CallSyntax) -> str:
    """What a model is told of `tools` whose template does not do so."""
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You may call these functions, each described by a JSON object:\n{described}\n\n"
        f"To call one, reply with its name and its arguments, written exactly like this:\n{syntax.write([EXAMPLE])}\n\n"
        f"To call two at once:\n{syntax.write([EXAMPLE, EXAMPLE])}\n\n"
        "What a function returns follows in <tool_response></tool_response>. If no function helps, reply in words."
    )


def _spelled_out(messages: Sequence[dict[str, Any]], syntax: CallSyntax) -> Iterator[dict[str, Any]]:
    """Calls as part of what the assistant said; what they returned as one message of the user's."""
    returned: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            returned.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if returned:
            yield {"role": "user", "content": "\n".join(returned)}
            returned = []
        if calls := message.get("tool_calls"):
            functions = [call["function"] for call in calls]
            written = syntax.write([Call(one["name"], _text_of(one["arguments"])) for one in functions])
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            yield rest | {"content": f"{message['content']}\n{written}" if message["content"] else written}
        else:
            yield message
    if returned:
        yield {"role": "user", "content": "\n".join(returned)}
