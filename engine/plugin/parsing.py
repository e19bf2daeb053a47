"""The two kinds of parsers of replies, for plugins: what a family of models thinks, and the tools that it calls.

A parser of reasoning is data alone; one of tool calls has a `read` of a few lines, and says in its `syntax` how calls
are written. Torch-free. Left out: which parser a model gets (engine/conversation/parsers.py).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from uuid import uuid4

from msgspec import Struct

from engine.plugin.kinds import ANY_KIND, kind_of, kinds_of
from engine.plugin.stream import (
    MAX_NAME,
    SPACE,
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Event,
    Marks,
    Reasoning,
    Steps,
    StreamParser,
    Value,
)

__all__ = [
    "ANY_KIND",
    "JSON_LIST",
    "SPACE",
    "Call",
    "CallArguments",
    "CallBegin",
    "CallEnd",
    "CallSyntax",
    "Content",
    "Event",
    "MarkedSyntax",
    "Marks",
    "Reasoning",
    "ReasoningParser",
    "Steps",
    "StreamParser",
    "ToolParser",
    "kind_of",
    "kinds_of",
]


class Call(Struct, frozen=True):
    """A whole call of a tool."""

    name: str
    arguments: str
    id: str = ""


class MarkedSyntax(Struct, frozen=True, kw_only=True):
    """How a family writes calls whose arguments are marked one by one: `begin`, for each argument `opening`, its value
    and `closing`, then `end`. In `begin`, NAME stands for the tool's name, in `opening` KEY for the argument's.

    A string is written as it stands, and any other value in JSON. `reserved` are the texts that may end a value as the
    parser reads it, so a string that is forced holds none of them; each has one "<", its first character."""

    begin: str
    opening: str
    closing: str
    end: str
    reserved: tuple[str, ...]

    def written(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call of `name`."""
        values = (
            self.opening.replace("KEY", key)
            + (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            + self.closing
            for key, value in arguments.items()
        )
        return self.begin.replace("NAME", name) + "".join(values) + self.end


class CallSyntax(Struct, frozen=True, kw_only=True):
    """How a family of models writes calls: `opening`, then each call as `begin`, its arguments in JSON and `end`, with
    `separator` between two, then `closing`. In `begin`, NAME stands for the tool's name.

    `trigger` is what `begin` begins with and other text does not hold, if there is such a thing: after it, a reply that
    is otherwise free must be a call.

    `marked` is for a family that marks arguments one by one. Forced calls are written so where the tool's schema can be
    kept exactly, and otherwise with their arguments in JSON, so the parser reads both.

    From it follow what a forced reply looks like, and what a model is told whose template knows no tools.
    """

    begin: str
    end: str
    separator: str = "\n"
    opening: str = ""
    closing: str = ""
    trigger: str = ""
    marked: MarkedSyntax | None = None

    def beginning(self, name: str) -> str:
        """What comes before the arguments of a call of `name`."""
        return self.begin.replace("NAME", name)

    def written(self, call: Call) -> str:
        """`call` as such a model writes it; with its arguments in JSON where they are no object."""
        if self.marked is not None and isinstance(arguments := _loaded(call.arguments), dict):
            return self.marked.written(call.name, arguments)
        return self.beginning(call.name) + call.arguments + self.end

    def write(self, calls: Sequence[Call]) -> str:
        """`calls` as such a model writes them."""
        return self.opening + self.separator.join(map(self.written, calls)) + self.closing


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


JSON_LIST = CallSyntax(
    opening="[", begin='{"name": "NAME", "arguments": ', end="}", separator=", ", closing="]"
)  # for families whose arguments are no JSON


class ReasoningParser(StreamParser):
    """Splits off what the model thinks, which stands between `start` and `end` before the rest of the reply.

    `opened` says what the prompt ends with: inside the reasoning (True), behind it (False), or neither (None). Then
    there is reasoning if the reply begins with `start`, or in any case where `assumed`. The two marks and newlines
    around them are told to nobody, or with `marked` as reasoning too."""

    start: ClassVar[str]
    end: ClassVar[str]
    assumed: ClassVar[bool] = False

    def __init__(self, opened: bool | None = None, *, marked: bool = False) -> None:
        self._opened = opened
        self._marked = marked
        super().__init__()

    def read(self) -> Steps[None]:
        """One stretch of reasoning, then content."""
        if self._opened is False:
            return
        yield from self.space("\n")
        if not (yield from self.literal(self.start)) and not self._opened and not self.assumed:
            self.back()
            return
        yield from self.space("\n")
        self._pass()
        strip = "" if self._marked else "\n"
        if (yield from self.until(self.end, strip=strip, tell=Reasoning, cut=not self._marked)):
            yield from self.space("\n")
        self._pass()

    def _pass(self) -> None:
        """What was read is marks and newlines."""
        if self._marked:
            self._tell(Reasoning)
        else:
            self.drop()


class ToolParser(StreamParser):
    """Finds calls of tools. `names` are those of the tools that the request offers, `parameters` the JSON schemas of
    their arguments by name, None for a tool that takes none.

    `syntax` is how the family writes calls; `special` are the special tokens that `read` looks for, which are then
    left in the text."""

    syntax: ClassVar[CallSyntax] = JSON_LIST
    special: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, names: Sequence[str] = (), parameters: Mapping[str, dict[str, Any] | None] | None = None
    ) -> None:
        self.names = frozenset(names)
        self.parameters = parameters or {}
        self._calls = 0
        self._silent = False  # whether nothing is told of the arguments of the call that is open
        super().__init__()

    def new_id(self) -> str:
        """An id for a call; unlike any other."""
        return f"call_{uuid4().hex[:24]}"

    # ── what it tells ────────────────────────────────────────────────────────────────────────

    def begin(self, name: str) -> None:
        """A call of `name` begins; what was read for it is told to nobody."""
        self.drop()
        self._silent = True
        self._events.append(CallBegin(self._calls, self.new_id(), name))

    def tell_arguments(self, text: str | None = None) -> None:
        """`text`, by default what was read and not told, is more of the call's arguments."""
        if text is None:
            text = self._text[: self._at]
            self.drop()
        if text:
            self._silent = False
            self._events.append(CallArguments(self._calls, text))

    def close(self) -> None:
        """The call ends. One without arguments has an empty object of them."""
        if self._silent:
            self.tell_arguments("{}")
        self._events.append(CallEnd(self._calls))
        self._calls += 1
        self._skip_space = True

    # ── what most families share ─────────────────────────────────────────────────────────────

    def back_unless_cut(self) -> Steps[None]:
        """Behind a call: read once more what was read, unless the reply ends there, within what joins or ends calls."""
        if (yield from self.peek()):
            self.back()
        else:
            self.drop()

    def arguments(self) -> Steps[None]:
        """Tell a JSON object that begins here as arguments, piece by piece, as far as it is one."""
        scan, whole = Value(), None
        while whole is None:
            self._at, whole = scan.go_on(self._text, self._at)
            self.tell_arguments()
            if whole is None and not (yield from self.more()):
                self._at = len(self._text)  # a backslash that nothing follows
                self.tell_arguments()
                return

    def call_object(self, *, known: bool = False) -> Steps[bool]:
        """Tell a call that is written as a JSON object with `name` and `arguments` or `parameters`; whether it is one.

        With `known` it must be of a tool that was offered. Arguments that come behind the name are told as they are
        written; should the object break after them, the call ends there."""
        return (yield from self.tried(self._call_object(known)))

    def _call_object(self, known: bool) -> Steps[bool]:
        if not (yield from self.literal("{")):
            return False
        name = arguments = None
        begun = whole = False
        while not whole:
            yield from self.space()
            key = yield from self.string()
            yield from self.space()
            if key is None or not (yield from self.literal(":")):
                break
            yield from self.space()
            if key == "name" and name is None:
                name = yield from self.string()
                if not name or len(name) > MAX_NAME or (known and name not in self.names):
                    break
            elif key in ("arguments", "parameters") and not begun and arguments is None:
                if name and (yield from self.peek()) == "{":
                    self.begin(name)
                    begun = True
                    yield from self.arguments()
                elif (arguments := (yield from self._written_arguments())) is None:
                    break
            elif (yield from self.value()) is None:
                break
            yield from self.space()
            if not (yield from self.literal(",")):
                whole = bool((yield from self.literal("}")))
                break
        if name and not begun and whole:
            self.begin(name)
            self.tell_arguments(arguments)
            begun = True
        if begun:
            if whole:
                self.drop()
            else:
                self.back()
            self.close()
        return begun

    def _written_arguments(self) -> Steps[str | None]:
        """Arguments as a whole, which must be JSON: an object, a string that holds one, or null for none."""
        if (yield from self.peek()) == '"':
            return (yield from self.string())
        value = yield from self.value()
        if value is None or value == "null":
            return value and "{}"
        try:
            json.loads(value)
        except (ValueError, RecursionError):
            return None
        return value

    def call_list(self, *, known: bool = False) -> Steps[bool]:
        """Tell the calls of a JSON list of such objects, as far as it is one; whether there are any."""
        return (yield from self.tried(self._call_list(known)))

    def _call_list(self, known: bool) -> Steps[bool]:
        if not (yield from self.literal("[")):
            return False
        yield from self.space()
        if not (yield from self.call_object(known=known)):
            return False
        while True:
            yield from self.space()
            if (yield from self.literal("]")):
                self.drop()
                return True
            if not (yield from self.literal(",")):
                break
            yield from self.space()
            if not (yield from self.call_object(known=known)):
                break
        yield from self.back_unless_cut()
        return True
