"""The place of a reply in a JSON schema, as far as the rest of the reply depends on it.

Finished strings and numbers are forgotten, and so is the number of items without bounds. For open values it keeps what
their end depends on:

    [{"id":12,"name":"ab        in item 1 of at least 64, behind the key `name`, in a string with 2 characters

Two texts of one place may be followed by the same texts. Left out, by `read_schema`: all that makes one part of a
reply depend on another, or leaves open which part it is in (properties that are not named, alternatives that begin
alike, ...). Strings with patterns, words of enumerations and numbers with odd bounds are kept as they are until they
are over.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REMARKS = frozenset(
    {"$schema", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "deprecated"}
)
ALLOWED = {
    "object": frozenset({"type", "properties", "required", "additionalProperties"}),
    "array": frozenset({"type", "items", "minItems", "maxItems"}),
}
COUNTS = frozenset({"minLength", "maxLength"})
BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
SCALAR = COUNTS | BOUNDS | {"type", "enum", "const", "pattern", "format"}
DEFINED = re.compile(r"#/(\$defs|definitions)/([\w.-]+)", re.ASCII)
SCALARS = frozenset({"string", "integer", "number", "boolean", "null"})
BEGINS = {"string": b'"', "boolean": b"tf", "null": b"n", "number": b"-0123456789", "integer": b"-0123456789"}
SPACES = re.compile(rb"[ \n\t]+")
DIGITS, QUOTE = b"0123456789", ord('"')
NUMBER = b"+-.eE" + DIGITS
WORDS = (b"true", b"false", b"null")
MOST_DIGITS = 18  # of a bounded integer: a larger one is kept as it is
MOST_TEXT, MOST_OPEN = 256, 64  # bytes that are kept of what is open, and open objects and arrays: more is not followed

# What a place is in the middle of: a value, item or end is to come; what comes behind a value; a key; the colon; the
# rest of a key; and of a string, a number, a word.
VALUE, AFTER, KEY, COLON, NAME, STRING, NUMERAL, WORD = range(8)


class Place(NamedTuple):
    """`stack`: of each open object or array its node, and its last property or how many items it has."""

    stack: tuple[tuple[int, int], ...] = ()
    mode: int = VALUE
    text: bytes = b""  # of what is open as far as it is kept, or the spaces so far
    length: int = 0  # characters of an open string, as far as its bounds ask


@dataclass(slots=True)
class Node:
    """A part of a schema. `least` and `most`: of items, or of characters in a string."""

    kind: str  # object, array, or nothing for what has no parts
    least: int = 0
    most: int | None = None
    keys: dict[bytes, int] = field(default_factory=dict)  # as they are written: the place of the property
    inner: list[int] = field(default_factory=list)  # properties, or items
    free: bool = False  # a string of any characters
    numbers: bool = False  # any number
    range: tuple[float, float] | None = None  # of integers, as far as there are bounds
    begins: bytes = b""  # what it may begin with, and some more
    branches: dict[int, int] = field(default_factory=dict)  # of a choice: by that


class Unknown(Exception):
    """This module does not follow the schema or the text."""


def read_schema(schema: Any) -> list[Node]:
    """The nodes of `schema`, the first of which is itself, or what it refers to. Raises Unknown."""
    reader = _Reader(schema)
    reader.read(schema)
    return reader.nodes


class _Reader:
    """Makes nodes of the parts of `schema`; one that is referred to is made once."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._referred: dict[str, int | None] = {}  # None while it is not known
        self.nodes: list[Node] = []

    def read(self, schema: Any) -> int:
        """The place of its node."""
        if not isinstance(schema, dict):
            raise Unknown
        known = schema.keys() - REMARKS
        if known in ({"$ref"}, {"anyOf"}):
            return self._refer(schema["$ref"]) if "$ref" in known else self._choose(schema["anyOf"])
        type = schema.get("type")
        if isinstance(type, str) and type in ALLOWED:
            if known - ALLOWED[type]:
                raise Unknown
            node = Node(type)
            self.nodes.append(node)
            place = len(self.nodes) - 1
            (self._read_object if type == "object" else self._read_array)(schema, node)
            return place
        words = [schema["const"]] if "const" in schema else schema.get("enum")
        types = [type] if isinstance(type, str) else type
        if known - SCALAR or not (_all_in(types, SCALARS) if words is None or types is not None else _scalars(words)):
            raise Unknown
        if words is not None and not _scalars(words):
            raise Unknown
        self.nodes.append(_scalar(schema, types, words))
        return len(self.nodes) - 1

    def _refer(self, name: Any) -> int:
        """The node of one of the definitions. Left out: names that have to be unescaped."""
        found = DEFINED.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            raise Unknown
        if name not in self._referred:
            self._referred[name] = None
            definitions = self._schema.get(found[1])
            if not isinstance(definitions, dict) or not isinstance(inner := definitions.get(found[2]), dict):
                raise Unknown
            if inner.keys() & {"properties", "items"}:  # its node comes next, and may be referred to from within
                self._referred[name] = len(self.nodes)
            self._referred[name] = self.read(inner)
        place = self._referred[name]
        if place is None:
            raise Unknown
        return place

    def _choose(self, branches: Any) -> int:
        """The node of a choice between values that begin with different bytes."""
        place = len(self.nodes)
        node = Node("")
        self.nodes.append(node)
        if not isinstance(branches, list):
            raise Unknown
        for branch in branches:
            inner = self.read(branch)
            for byte in self.nodes[inner].begins:
                if byte in node.branches:
                    raise Unknown
                node.branches[byte] = inner
        node.begins = bytes(node.branches)
        return place

    def _read_object(self, schema: dict[str, Any], node: Node) -> None:
        properties = schema.get("properties", {})
        if schema.get("additionalProperties") is not False or not isinstance(properties, dict):
            raise Unknown
        if not set(schema.get("required", ())) <= properties.keys():
            raise Unknown
        node.begins = b"{"
        for at, (name, inner) in enumerate(properties.items()):
            node.keys[_written(name)] = at
            node.inner.append(self.read(inner))

    def _read_array(self, schema: dict[str, Any], node: Node) -> None:
        node.begins = b"["
        node.least, node.most = _count(schema, "minItems") or 0, _count(schema, "maxItems")
        node.inner.append(self.read(schema.get("items")))


def _all_in(types: Any, known: frozenset[str]) -> bool:
    return isinstance(types, list) and all(isinstance(each, str) and each in known for each in types)


def _scalars(words: Any) -> bool:
    return isinstance(words, list) and not any(isinstance(each, dict | list) for each in words)


def _type_of(word: Any) -> str:
    if word is None:
        return "null"
    return "string" if isinstance(word, str) else "boolean" if isinstance(word, bool) else "number"


def _count(schema: dict[str, Any], name: str) -> int | None:
    value = schema.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise Unknown
    return value


def _written(name: str) -> bytes:
    """A name as a reply has it, between its quotes. Raises Unknown if it has other spellings."""
    if any(character in '"\\\x7f' or character < " " for character in name):
        raise Unknown
    return name.encode()


def _scalar(schema: dict[str, Any], types: Any, words: Any) -> Node:
    if words is not None:
        begins = {first for word in words for first in BEGINS[_type_of(word)]}
        return Node("", begins=bytes(begins))
    begins = {first for each in types for first in BEGINS[each]}
    node = Node("", begins=bytes(begins), free="string" in types and not schema.keys() & {"pattern", "format"})
    node.least, node.most = _count(schema, "minLength") or 0, _count(schema, "maxLength")
    node.numbers = not schema.keys() & BOUNDS and ("number" in types or "integer" in types)
    if "integer" in types and "number" not in types and "multipleOf" not in schema:
        node.range = _range(schema)
    return node


def _range(schema: dict[str, Any]) -> tuple[float, float] | None:
    """The bounds of the integers of a schema; None for bounds that are not integers, or too large."""
    bounds = [schema.get(name) for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")]
    if any(bound is not None and (type(bound) is not int or abs(bound) >= 10**MOST_DIGITS) for bound in bounds):
        return None
    low, above, high, below = bounds
    return (
        max(-math.inf if low is None else low, -math.inf if above is None else above + 1),
        min(math.inf if high is None else high, math.inf if below is None else below - 1),
    )


def advance(nodes: list[Node], place: Place, text: bytes) -> tuple[Place, int]:
    """The place behind `text`, which may come at `place`, and how many objects and arrays stayed open all the while.
    Raises Unknown for what should not be there, and for more than is kept."""
    at, open = 0, len(place.stack)
    while at < len(text):
        if place.mode <= COLON and (spaces := SPACES.match(text, at)):
            place, at = place._replace(text=_alike_spaces(place.text + spaces[0])), spaces.end()
            continue
        place, taken = _STEPS[place.mode](nodes, place, text[at])
        open = min(open, len(place.stack))
        at += taken
    if len(place.text) > MOST_TEXT or len(place.stack) > MOST_OPEN:
        raise Unknown
    return place, open


def _expected(nodes: list[Node], stack: tuple[tuple[int, int], ...], first: int) -> int:
    """The node of the value that begins, or has begun, with `first`."""
    place = 0
    if stack:
        node, count = stack[-1]
        place = nodes[node].inner[count if nodes[node].kind == "object" else 0]
    while branches := nodes[place].branches:
        if first not in branches:
            raise Unknown
        place = branches[first]
    return place


def _alike_spaces(text: bytes) -> bytes:
    """After a line break, a tab counts as a space."""
    return text.replace(b"\t", b" ") if text[:1] == b"\n" else text


def _over(nodes: list[Node], stack: tuple[tuple[int, int], ...]) -> Place:
    """A value has come to its end."""
    if stack and nodes[stack[-1][0]].kind == "array":
        node, count = stack[-1]
        bounds = nodes[node]
        stack = (*stack[:-1], (node, min(count + 1, max(bounds.least, bounds.most or 0, 1))))
    return Place(stack, AFTER)


def _value(nodes: list[Node], place: Place, byte: int) -> tuple[Place, int]:
    stack = place.stack
    if byte == ord("]"):
        if not stack or nodes[stack[-1][0]].kind != "array" or stack[-1][1]:
            raise Unknown
        return _over(nodes, stack[:-1]), 1
    node = _expected(nodes, stack, byte)
    kind = nodes[node].kind
    if kind:
        if byte != ord("{" if kind == "object" else "["):
            raise Unknown
        return Place((*stack, (node, -1 if kind == "object" else 0)), KEY if kind == "object" else VALUE), 1
    if byte == ord('"'):
        return Place(stack, STRING, b"" if nodes[node].free else b'"'), 1
    return Place(stack, NUMERAL if byte in NUMBER else WORD), 0


def _after(nodes: list[Node], place: Place, byte: int) -> tuple[Place, int]:
    if not place.stack:
        raise Unknown
    object = nodes[place.stack[-1][0]].kind == "object"
    if byte == ord(","):
        return Place(place.stack, KEY if object else VALUE), 1
    if byte == ord("}" if object else "]"):
        return _over(nodes, place.stack[:-1]), 1
    raise Unknown


def _key(nodes: list[Node], place: Place, byte: int) -> tuple[Place, int]:
    if byte == ord('"'):
        return Place(place.stack, NAME), 1
    if byte == ord("}") and place.stack[-1][1] < 0:
        return _over(nodes, place.stack[:-1]), 1
    raise Unknown


def _name(nodes: list[Node], place: Place, byte: int) -> tuple[Place, int]:
    if byte != ord('"'):
        return place._replace(text=place.text + bytes([byte])), 1
    node = place.stack[-1][0]
    if place.text not in nodes[node].keys:
        raise Unknown
    return Place((*place.stack[:-1], (node, nodes[node].keys[place.text])), COLON), 1


def _colon(nodes: list[Node], place: Place, byte: int) -> tuple[Place, int]:
    if byte != ord(":"):
        raise Unknown
    return Place(place.stack, VALUE), 1


def _string(nodes: list[Node], place: Place, byte: int) -> tuple[Place, int]:
    """A free string keeps what is not yet a character: an escape, or the first bytes of one. Another, with its quote,
    all."""
    node = nodes[_expected(nodes, place.stack, QUOTE)]
    text = place.text + bytes([byte])
    if not node.free:
        escaped = (len(place.text) - len(place.text.rstrip(b"\\"))) % 2
        return (_over(nodes, place.stack) if byte == ord('"') and not escaped else place._replace(text=text)), 1
    if text == b'"':
        return _over(nodes, place.stack), 1
    if (text[0] == ord("\\") and len(text) < (6 if text[1:2] == b"u" else 2)) or text[0] >= 0xC2:
        text = _partial(text)
        if text:
            return place._replace(text=text), 1
    ends = node.least if node.most is None else node.most
    return place._replace(text=b"", length=min(place.length + 1, ends)), 1


def _partial(text: bytes) -> bytes:
    """The beginning of a character that may go on as `text` may; nothing, if that is a whole one."""
    first = text[0]
    if first == ord("\\"):
        return text
    size = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    left = size - len(text)
    if len(text) > 1:  # the second byte has its own bounds behind some of the first ones; others are alike
        return (b"", b"\xc2", b"\xe1")[left]
    if first in b"\xe0\xed\xf0\xf4":
        return text
    return (b"", b"\xc2", b"\xe1", b"\xf1")[left]


def _numeral(nodes: list[Node], place: Place, byte: int) -> tuple[Place, int]:
    if byte not in NUMBER:
        return _over(nodes, place.stack), 0
    node = nodes[_expected(nodes, place.stack, DIGITS[0])]
    text = place.text + bytes([byte])
    if node.numbers:
        text = _any_number(text)
    elif node.range is not None:
        text = _alike(text, *node.range)
    return place._replace(text=text), 1


def _any_number(text: bytes) -> bytes:
    """A number that may go on as `text` may: its digits do not matter, but for a first 0."""
    if len(text) > 1 and text[-1] in DIGITS:
        before = text[:-1]
        if before == b"-":
            return text[-1:] if text[-1] == ord("0") else b"1"
        return before if before[-1] in DIGITS else before + b"1"
    if text[-1:] in (b"e", b"E"):
        return b"1e"
    if text[-1:] in (b"+", b"-") and len(text) > 1:
        return b"1e+"
    if text[-1:] == b".":
        return b"1."
    return b"1" if text[-1] in b"123456789" else text


def _alike(text: bytes, low: float, high: float) -> bytes:
    """A digit and noughts, as many as there are digits, where the integers from `low` to `high` that go on with them
    are those that go on with `text`."""
    if text[:1] == b"-":
        return b"-" + _alike(text[1:], -high, -low)
    if text[:1] not in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8", b"9") or len(text) > MOST_DIGITS:
        return text
    if ways := _ways(int(text), low, high):
        for digit in range(1, 10):
            other = digit * 10 ** (len(text) - 1)
            if _ways(other, low, high) == ways:
                return str(other).encode()
    return text


def _ways(number: int, low: float, high: float) -> list[bool]:
    """Whether `number` and 0, 1, ... more digits is in the range, whatever they are; nothing, where they matter."""
    ways = []
    for more in range(MOST_DIGITS + 1):
        first, last = number * 10**more, (number + 1) * 10**more - 1
        if first > high:
            break
        if last >= low and not low <= first <= last <= high:
            return []
        ways.append(last >= low)
    return ways


def _word(nodes: list[Node], place: Place, byte: int) -> tuple[Place, int]:
    text = place.text + bytes([byte])
    if text in WORDS:
        return _over(nodes, place.stack), 1
    if not any(word.startswith(text) for word in WORDS):
        raise Unknown
    return place._replace(text=text), 1


_STEPS = (_value, _after, _key, _colon, _name, _string, _numeral, _word)
