"""Calls as Qwen3-Coder and Qwen3.5 write them: a function and its parameters, each between marks of its own.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

The tool's schema says what a value is: a string stands as it is, and anything else is JSON, or a string if it cannot
be read. One newline on each side of a value belongs to the marks. A mark ends a value only if what may follow a value
comes behind it, so code may hold marks. <tool_call> may be missing before a function that was offered, and an end may
be missing where another mark tells of it. Calls in Hermes' JSON are read too. Left out: values written in Python, but
for True, False and None.
"""

import json
import re
from typing import Any

from engine.plugin.parsing import (
    ANY_KIND,
    CallSyntax,
    MarkedSyntax,
    Marks,
    Steps,
    ToolParser,
    kind_of,
    kinds_of,
)

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
FUNCTION = "<function="
FUNCTION_END = "</function>"
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"
MARKS = Marks((PARAMETER_END, PARAMETER, FUNCTION_END, CLOSE))
# What must follow a mark that ends a value, unless the reply ends there.
FOLLOWS = {
    PARAMETER_END: (PARAMETER, FUNCTION_END, CLOSE),
    FUNCTION_END: (CLOSE,),
    CLOSE: (OPEN, FUNCTION),
}
STRING = frozenset({"string"})
QUOTE = re.compile(r'\\.|(")', re.DOTALL)
QUOTING = re.compile(r'\s*[\[{"]')  # JSON that may hold strings
WORDS = {"True": "true", "False": "false", "None": "null"}  # as templates write past calls


class Qwen3Coder(ToolParser):
    syntax = CallSyntax(
        begin=f'{OPEN}\n{{"name": "NAME", "arguments": ',
        end=f"}}\n{CLOSE}",
        trigger=OPEN,
        marked=MarkedSyntax(
            begin=f"{OPEN}\n{FUNCTION}NAME>\n",
            opening=f"{PARAMETER}KEY>\n",
            closing=f"\n{PARAMETER_END}\n",
            end=f"{FUNCTION_END}\n{CLOSE}",
            reserved=(PARAMETER_END, PARAMETER, FUNCTION_END, CLOSE),
        ),
    )
    special = (OPEN, CLOSE)

    def read(self) -> Steps[None]:
        """Any number of calls, with text before, between and behind them."""
        while mark := (yield from self.until(OPEN, FUNCTION)):
            if mark == OPEN:
                yield from self.space()
                if (yield from self.call_object()):
                    yield from self._closed()
                    continue
                if not (yield from self.literal(FUNCTION)):
                    continue
            yield from self.tried(self._call(offered=mark == FUNCTION))

    def _closed(self) -> Steps[None]:
        """Pass over the last mark of a call, if it is there."""
        yield from self.space()
        if (yield from self.mark(CLOSE)):
            self.drop()
        else:
            self.back()

    def _call(self, *, offered: bool) -> Steps[bool]:
        """Tell a call, whose name comes next; if `offered`, it must be of a tool of the request."""
        name = ((yield from self.before(">")) or "").strip()
        if not name or re.search(r"[\s<]", name) or (offered and name not in self.names):
            return False
        self.begin(name)
        self.tell_arguments("{")
        schema = self.parameters.get(name) or {}
        declared = schema.get("properties")
        declared = declared if isinstance(declared, dict) else {}
        awaited = set(declared)
        between = ""
        while (mark := (yield from self._next())) == PARAMETER:
            key = yield from self.before(">")
            if key is None:
                break
            key = key.strip()
            awaited.discard(key)
            self.drop()
            self.tell_arguments(f"{between}{_quoted(key)}: ")
            between = ", "
            rest = schema.get("additionalProperties")
            kinds = kinds_of(declared.get(key, rest), schema) if key in declared or isinstance(rest, dict) else STRING
            if not (yield from self._value(kinds, awaited)):
                self.close()
                return True
        yield from self._end(mark)
        return True

    def _next(self) -> Steps[str]:
        """Pass over the next mark between values."""
        yield from self.space()
        return (yield from self.literal(PARAMETER, FUNCTION_END, CLOSE))

    def _end(self, mark: str) -> Steps[None]:
        """Close a call behind `mark`. Where the reply was cut off, its arguments stay open."""
        if mark in (FUNCTION_END, CLOSE):
            self.tell_arguments("}")
            self.drop()
        elif self._ended:  # `mark` may still have begun
            self._at = len(self._text)
            self.drop()
        else:
            self.tell_arguments("}")
            self.back()
        self.close()
        if mark == FUNCTION_END:
            yield from self._closed()

    # ── values ───────────────────────────────────────────────────────────────────────────────

    def _value(self, kinds: frozenset[str], awaited: set[str]) -> Steps[bool]:
        """Tell a value of one of `kinds`, strings as they come; `awaited` are the parameters that may follow it. False
        if the reply ends in it."""
        yield from self.literal("\n")
        self.drop()
        streamed = kinds == STRING
        if streamed:
            self.tell_arguments('"')
        seen = counted = quotes = 0
        fresh = True  # whether nothing is told of the value
        while True:
            place, mark = MARKS.first(self._text, seen)
            if mark:
                first = self._text[place - 1] == "\n" if place else fresh  # whether it begins a line
                if not streamed:
                    quotes += sum(map(bool, QUOTE.findall(self._text, counted, place)))
                    counted = place
                within = quotes % 2 and not first and QUOTING.match(self._text)
                if not within and (yield from self._ends(place, mark, awaited if first else set())):
                    break
                seen = place + 1
                continue
            if self._ended:
                self._tell_rest(self._text[:place].removesuffix("\n"), kinds)
                return False
            if streamed:
                self._at = place - self._text.endswith("\n", 0, place)
                fresh = fresh and not self._at
                place -= self._at
                text = self._text[: self._at]
                self.drop()
                self.tell_arguments(_quoted(text)[1:-1])
            seen = place
            yield
        raw = self._text[:place].removesuffix("\n")
        self._at = place + len(mark) * (mark == PARAMETER_END)
        self.drop()
        self.tell_arguments(_quoted(raw)[1:] if streamed else _read(raw, kinds))
        return True

    def _tell_rest(self, raw: str, kinds: frozenset[str]) -> None:
        """Tell what there is of a value in which the reply ends, whose own end stays open."""
        self._at = len(self._text)
        self.drop()
        text = raw.strip() if "string" not in kinds else _quoted(raw)[:-1]
        self.tell_arguments(text[1:] if kinds == STRING else text)

    def _ends(self, place: int, mark: str, awaited: set[str]) -> Steps[bool]:
        """Whether the `mark` at `place` ends a value."""
        self._at = place + len(mark)
        if mark == PARAMETER:
            key = yield from self.before(">")
            found = key is not None and key.strip() in awaited
        else:
            yield from self.space()
            found = bool((yield from self.literal(*FOLLOWS[mark])))
            rest = self._text[self._at :]
            found = found or (self._ended and any(text.startswith(rest) for text in FOLLOWS[mark]))
        self.back()
        return found


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _read(raw: str, kinds: frozenset[str]) -> str:
    """The JSON of a value that is written as `raw`."""
    text = raw.strip()
    if kinds != ANY_KIND:
        text = WORDS.get(text, text)
    try:
        kind = kind_of(json.loads(text, parse_constant=_no_json))
    except (ValueError, RecursionError):
        return _quoted(raw)
    return text if "string" not in kinds or kind in kinds - STRING else _quoted(raw)


def _no_json(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")
