"""The format, in a structural tag, of a call whose arguments are marked one by one (`MarkedSyntax`).

    {"city": {"type": "string"}, "days": {"type": "integer"}}      <parameter=city>, any text, </parameter>, then
                                                                   <parameter=days>, %json integer, </parameter>

A string is any text without the marks that end it, or one of an enum; what cannot be a string is the JSON of its
schema. Arguments come in the order of the schema. Left out, so that such a tool is called with its arguments in JSON:
strings with a pattern, a format or a length, what may be a string or a value with conditions, references, and
conditions on the object as a whole.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.plugin.parsing import ANY_KIND, MarkedSyntax, kinds_of

NOTES = frozenset(
    ("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment")
)  # keywords that forbid nothing
OBJECT = NOTES | {"$schema", "type", "properties", "required", "additionalProperties"}
NO_KEY = re.compile(r"^$|[<>\s]")


def marked_call(name: str, schema: dict[str, Any], syntax: MarkedSyntax) -> dict[str, Any] | None:
    """The tag of a call of the tool `name`, whose arguments follow `schema`; None if this cannot say it exactly."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not schema.keys() <= OBJECT or not isinstance(properties, dict) or not isinstance(required, list):
        return None
    if schema.get("additionalProperties", False) is not False or b'"$' in msgspec.json.encode(properties):
        return None
    if not all(isinstance(key, str) and key in properties for key in required) or any(map(NO_KEY.search, properties)):
        return None
    elements = []
    for key, about in properties.items():
        value = _value(about, syntax)
        if value is None:
            return None
        whole = {"type": "sequence", "elements": [_text(syntax.opening.replace("KEY", key)), *value]}
        elements.append(whole if key in required else {"type": "optional", "content": whole})
    content = {"type": "sequence", "elements": elements} if elements else _text("")
    return {"type": "tag", "begin": syntax.begin.replace("NAME", name), "content": content, "end": syntax.end}


def marked_freely(name: str, syntax: MarkedSyntax) -> dict[str, Any]:
    """The tag of a call of `name` with any arguments."""
    head, _, tail = syntax.end.partition("\n")
    content = {"type": "regex", "pattern": f"{without([head])}{escaped(head)}"}
    return {"type": "tag", "begin": syntax.begin.replace("NAME", name), "content": content, "end": f"\n{tail}"}


def _text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _value(schema: Any, syntax: MarkedSyntax) -> list[dict[str, Any]] | None:
    """The formats of a value and the mark behind it."""
    if _unbound(schema):
        return [{"type": "regex", "pattern": without(syntax.reserved) + escaped(syntax.closing)}]
    if not isinstance(schema, dict):
        return None
    if "string" not in kinds_of(schema, schema):
        return [{"type": "json_schema", "json_schema": schema}, _text(syntax.closing)]
    words = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(words, list) or not words or not schema.keys() <= NOTES | {"type", "enum", "const"}:
        return None
    if schema.get("type", "string") != "string" or {"const", "enum"} <= schema.keys():
        return None
    if not all(isinstance(word, str) and not any(mark in word for mark in syntax.reserved) for word in words):
        return None
    return [{"type": "or", "elements": [_text(word + syntax.closing) for word in words]}]


def _unbound(schema: Any) -> bool:
    """Whether any string is valid by `schema`, and any value that it may be read as."""
    if schema is True:
        return True
    if not isinstance(schema, dict) or "string" not in kinds_of(schema, schema):
        return False
    if isinstance(branches := schema.get("anyOf"), list) and schema.keys() <= NOTES | {"anyOf"}:
        return bool(branches) and all(isinstance(each, dict) and each.keys() <= NOTES | {"type"} for each in branches)
    said = schema.get("type", [])
    known = all(isinstance(each, str) and each in ANY_KIND for each in (said if isinstance(said, list) else [said]))
    return known and schema.keys() <= NOTES | {"type", "nullable"}


def without(marks: Sequence[str]) -> str:
    """An expression for any text that holds none of `marks`, each of which has one "<", its first character."""

    def rest(tails: list[str]) -> str:
        """What may follow the beginning of marks that go on as `tails`, up to the next "<"."""
        heads = sorted({tail[0] for tail in tails})
        longer = {head: [tail[1:] for tail in tails if tail[0] == head] for head in heads}
        ways = [escaped(head) + rest(more) for head, more in longer.items() if all(more)]
        other = f"[^<{escaped(''.join(heads))}][^<]*"
        return f"(?:{'|'.join([*ways, other])})?"

    return f"[^<]*(?:<{rest([mark[1:] for mark in marks])})*"


def escaped(text: str) -> str:
    """`text` as an expression, in a class or outside of one."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/&~-])", r"\\\1", text).replace("\n", r"\n")
