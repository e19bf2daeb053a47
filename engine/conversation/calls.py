"""What a reply must be so that it calls tools, as a `Grammar`: structural tags over the syntax of the parser in use.

    forced    nothing but calls, at least one: tool_choice required, or a tool by name
    allowed   free text, in which a call must be one of a tool that is offered: tools that are strict, or that alone
              of others are allowed
    either    calls, or what else the reply must be: a response format beside tools

The arguments are those of the tool's JSON schema in any case. Pure logic; a grammar is compiled elsewhere.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from engine.conversation.marked import marked_call, marked_freely
from engine.errors import RequestError
from engine.params.grammar import Grammar
from engine.plugin.parsing import CallSyntax

JSON_CALL = re.compile(r'\{"name": "NAME", "(\w+)": ')
ANY_OBJECT: dict[str, Any] = {"type": "object"}
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(Struct, frozen=True):
    """A function that may be called. `parameters` is its JSON schema, None if it takes none; `namespace` is what its
    `name` begins with, before a point, where the client has such."""

    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool = False
    namespace: str = ""

    def described(self) -> dict[str, Any]:
        """As chat templates take it, which is as OpenAI writes it."""
        about = {} if self.description is None else {"description": self.description}
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        return {"type": "function", "function": {"name": self.name, **about, "parameters": parameters}}


def forced(tools: Sequence[Tool], syntax: CallSyntax, *, parallel: bool) -> Grammar:
    """Calls of `tools` and nothing else: exactly one, or if `parallel` one or more."""
    return _grammar(_calls(tools, syntax, parallel=parallel), tools)


def allowed(tools: Sequence[Tool], syntax: CallSyntax, *, held: bool = False) -> Grammar | None:
    """Any text, but where a call begins it is one of `tools`, with arguments of its schema if it is strict. None where
    no tool is, unless `held`, or where calls are not told from text by how they begin."""
    if not syntax.trigger or not (held or any(tool.strict for tool in tools)):
        return None
    tags = [_tag(tool, syntax, any_object=not tool.strict) for tool in tools]
    return _grammar({"type": "triggered_tags", "triggers": [syntax.trigger], "tags": tags}, tools)


def either(tools: Sequence[Tool], syntax: CallSyntax, other: Grammar, *, parallel: bool) -> Grammar:
    """Calls of `tools`, or a reply of the grammar `other`. Raises RequestError if that cannot be said as one."""
    calls = _calls(tools, syntax, parallel=parallel)
    if other.kind == "regex":
        return _grammar({"type": "or", "elements": [calls, {"type": "regex", "pattern": other.source}]}, tools, other)
    if other.kind not in ("json_schema", "json_object"):
        raise _apart(other.kind)
    schema = ANY_OBJECT if other.kind == "json_object" else msgspec.json.decode(other.source)
    key = JSON_CALL.fullmatch(syntax.begin)
    if key is None or syntax.opening:
        format = {"type": "or", "elements": [calls, {"type": "json_schema", "json_schema": schema}]}
        return _grammar(format, tools, other)
    # A call is JSON as well: engines tell the two apart only within one schema. Then there is no second call.
    both = {"anyOf": [*(_object(tool, key[1]) for tool in tools), schema]}
    if "$ref" in (source := msgspec.json.encode(both).decode()):  # which would refer to another place
        raise _apart("a schema with $ref")
    return Grammar("json_schema", source, strict=other.strict, beside=other, tools=_names(tools))


def parameters_in(grammar: Grammar) -> Iterator[tuple[str, Any]]:
    """The tools that `grammar` was made of, by name, with the JSON schemas of their arguments in it; such a tool comes
    once for each of its schemas."""
    value = msgspec.json.decode(grammar.source) if grammar.tools else {}
    if grammar.kind == "json_schema":
        calls = (list(call["properties"].values())[-1] for call in value.get("anyOf", ()))
        yield from zip(grammar.tools, calls, strict=False)  # a schema that goes with the calls may follow
        return
    for name, tag in zip(grammar.tools, _tags_in(value), strict=False):
        yield from ((name, schema) for schema in _schemas_in(tag))


def _tags_in(format: Any) -> list[dict[str, Any]]:
    """The tags of calls in a structural tag."""
    if not isinstance(format, dict):
        return []
    if "tags" in format:
        return list(format["tags"])
    inner = [format.get("format"), *format.get("elements", ())]
    return next((tags for each in inner if (tags := _tags_in(each))), [])


def _schemas_in(format: dict[str, Any]) -> Iterator[Any]:
    """The JSON schemas in the tag of one call: of its arguments, or of those that are marked one by one."""
    if format["type"] == "json_schema":
        yield format["json_schema"]
    for inner in (*filter(None, [format.get("content")]), *format.get("elements", ())):
        yield from _schemas_in(inner)


def _names(tools: Sequence[Tool]) -> tuple[str, ...]:
    return tuple(tool.name for tool in tools)


def _apart(what: str) -> RequestError:
    message = f"{what} and tools exclude each other unless tool_choice is none; leave one out"
    return RequestError(message, param="grammar")


def _object(tool: Tool, key: str) -> dict[str, Any]:
    """The schema of a call that is written as a JSON object, its arguments under `key`."""
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, key: _schema(tool)},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _schema(tool: Tool) -> dict[str, Any]:
    return NO_PARAMETERS if tool.parameters is None else tool.parameters


def _calls(tools: Sequence[Tool], syntax: CallSyntax, *, parallel: bool) -> dict[str, Any]:
    calls: dict[str, Any] = {
        "type": "tags_with_separator",
        "tags": [_tag(tool, syntax) for tool in tools],
        "separator": syntax.separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    around = [{"type": "const_string", "value": text} if text else None for text in (syntax.opening, syntax.closing)]
    elements = [part for part in (around[0], calls, around[1]) if part is not None]
    return calls if len(elements) == 1 else {"type": "sequence", "elements": elements}


def _tag(tool: Tool, syntax: CallSyntax, *, any_object: bool = False) -> dict[str, Any]:
    if syntax.marked is not None and any_object:
        return marked_freely(tool.name, syntax.marked)
    if syntax.marked is not None and (call := marked_call(tool.name, _schema(tool), syntax.marked)):
        return call
    return {
        "type": "tag",
        "begin": syntax.beginning(tool.name),
        "content": {"type": "json_schema", "json_schema": ANY_OBJECT if any_object else _schema(tool)},
        "end": syntax.end,
    }


def _grammar(format: dict[str, Any], tools: Sequence[Tool], beside: Grammar | None = None) -> Grammar:
    source = msgspec.json.encode({"type": "structural_tag", "format": format}).decode()
    return Grammar("structural_tag", source, beside=beside, tools=_names(tools))
