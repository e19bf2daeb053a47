"""What a parser of replies tells, and a base that reads a stream as if all of it were there.

    text ──feed──> read(): a generator that waits wherever the text so far does not decide ──> events

A parser is written once, from left to right, with the methods below, which wait for more text on their own (`yield
from`). So how a reply is cut into pieces cannot change what is told of it. What was read and neither told nor dropped
becomes content: a reply that only looks like a call stays what it is. Torch-free. Left out: what events become on the
wire, which is engine/http's, and the parsers themselves (parsing.py).
"""

import json
import re
from collections.abc import Generator, Sequence
from typing import TypeVar

from msgspec import Struct

Kind = TypeVar("Kind")
Steps = Generator[None, None, Kind]  # of a method that may wait for more text

SPACE = " \t\n\r"
MAX_NAME = 256  # characters of a tool's name: what is longer is none
_STRING_STOP = re.compile(r'["\\]')
_BETWEEN = re.compile(r"[ \t\n\r,:]+")
_SCALAR = re.compile(r"[A-Za-z0-9_.+\-]+")
_CLOSING = {"{": "}", "[": "]"}


# ── what is told ─────────────────────────────────────────────────────────────────────────────


class Content(Struct, frozen=True):
    """Text for the reader."""

    text: str


class Reasoning(Struct, frozen=True):
    """Text that the model thinks with."""

    text: str


class CallBegin(Struct, frozen=True):
    """Call number `index` of the reply begins."""

    index: int
    id: str
    name: str


class CallArguments(Struct, frozen=True):
    """More of the arguments of call `index`: all of them together are JSON, if the model wrote JSON."""

    index: int
    text: str


class CallEnd(Struct, frozen=True):
    """Call `index` is whole, as far as it goes."""

    index: int


Event = Content | Reasoning | CallBegin | CallArguments | CallEnd


# ── reading ──────────────────────────────────────────────────────────────────────────────────


class StreamParser:
    """Reads one reply. A subclass writes `read`; whoever uses it calls `feed` for each piece and `finish` at the end.

    `_text` is what is not told yet and all behind it; `_at` is how far `read` has come in it. Each method that reads
    leaves `_at` where it was if it finds something else than what it looks for.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._events: list[Event] = []
        self._skip_space = False  # whether space is all that came since a call
        self._steps: Steps[None] | None = self.read()

    def read(self) -> Steps[None]:
        """Read the reply, and tell what it holds. All that follows a return is content."""
        raise NotImplementedError

    def feed(self, text: str) -> list[Event]:
        """Take the next piece of the reply; what it makes certain."""
        self._text += text
        return self._advance()

    def finish(self) -> list[Event]:
        """The reply has ended; what was held back."""
        self._ended = True
        return self._advance()

    @property
    def plain(self) -> bool:
        """Whether all that comes from here on is content."""
        return self._steps is None and not self._skip_space

    def _advance(self) -> list[Event]:
        if self._steps is not None:
            try:
                next(self._steps)
                assert not self._ended, f"{type(self).__name__}.read waits for more than there is"
            except StopIteration:
                self._steps = None
        if self._steps is None:
            self._at = len(self._text)
            self.tell_content()
        events, self._events = self._events, []
        return events

    # ── what a parser looks for ──────────────────────────────────────────────────────────────

    def more(self) -> Steps[bool]:
        """Wait for more text; False if the reply has ended."""
        if not self._ended:
            yield
            return True
        return False

    def tried(self, reading: Steps[bool]) -> Steps[bool]:
        """Whether `reading` finds what it looks for; if not, what it read is read once more."""
        start = self._at
        if (yield from reading):
            return True
        self._at = start
        return False

    def peek(self) -> Steps[str]:
        """The next character; nothing at the end."""
        while self._at == len(self._text) and (yield from self.more()):
            pass
        return self._text[self._at : self._at + 1]

    def space(self, characters: str = SPACE) -> Steps[None]:
        """Pass over any of `characters`."""
        while (character := (yield from self.peek())) and character in characters:
            self._at += 1

    def literal(self, *texts: str) -> Steps[str]:
        """Pass over one of `texts`, the longest that is there; which, or nothing."""
        longest = sorted(texts, key=len, reverse=True)
        while True:
            rest = self._text[self._at : self._at + len(longest[0])]
            undecided = any(len(rest) < len(text) and text.startswith(rest) for text in texts)
            if not undecided or not (yield from self.more()):
                break
        found = next((text for text in longest if self._text.startswith(text, self._at)), "")
        self._at += len(found)
        return found

    def mark(self, *texts: str) -> Steps[str]:
        """As `literal`, but a reply that was cut off may end within one of `texts`."""
        if found := (yield from self.literal(*texts)):
            return found
        rest = self._text[self._at :]
        if not rest or not any(text.startswith(rest) for text in texts):
            return ""
        self._at = len(self._text)  # `literal` has waited: the reply has ended
        return rest

    def word(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Pass over what `pattern` matches, which must match every beginning of it too."""
        while True:
            match = pattern.match(self._text, self._at)
            end = match.end() if match else self._at
            if end < len(self._text) or not (yield from self.more()):
                word, self._at = self._text[self._at : end], end
                return word

    def before(self, mark: str, limit: int = MAX_NAME) -> Steps[str | None]:
        """Pass over at most `limit` characters and `mark` behind them; what stands before it."""
        while True:
            end = self._text.find(mark, self._at, self._at + limit + len(mark))
            if end >= 0:
                found, self._at = self._text[self._at : end], end + len(mark)
                return found
            if len(self._text) - self._at >= limit + len(mark) or not (yield from self.more()):
                return None

    def string(self) -> Steps[str | None]:
        """Pass over a whole JSON string; what it says."""
        if (yield from self.peek()) != '"':
            return None
        raw = yield from self.value()
        if raw is None:
            return None
        try:
            text: str = json.loads(raw, strict=False)
            text.encode()
        except ValueError:  # an escape that is none, or half of a surrogate pair
            self._at -= len(raw)
            return None
        return text

    def value(self) -> Steps[str | None]:
        """Pass over a whole JSON value, of which only brackets and strings are checked; what is written there."""
        start, scan = self._at, Value()
        while True:
            self._at, whole = scan.go_on(self._text, self._at)
            if whole is None and not (yield from self.more()):
                whole = scan.scalar
            if whole is not None:
                break
        if not whole:
            self._at = start
            return None
        return self._text[start : self._at]

    def until(
        self, *marks: str, strip: str = SPACE, tell: type[Content] | type[Reasoning] = Content, cut: bool = False
    ) -> Steps[str]:
        """Tell what comes before the first of `marks`, and pass over it; which it was, nothing at the end.

        The `strip` characters before it are read, but not told. With `cut`, the reply may end within one of them."""
        wanted = Marks(marks)
        seen = self._at  # before here no mark begins; from _at to here there are `strip` characters alone
        while True:
            place, mark = wanted.first(self._text, seen)
            fresh = self._text[seen:place].rstrip(strip)
            told = seen + len(fresh) if fresh else self._at
            if told:
                self._at = told
                self._tell(tell)
            seen = place - told
            if mark:
                self._at = seen + len(mark)
                return mark
            if self._ended:
                if cut and seen < len(self._text):  # what was not told is what a mark begins with
                    self._at = len(self._text)
                    self.drop()
                    return ""
                self._at = len(self._text)
                self._tell(tell)
                return ""
            yield

    # ── what it tells ────────────────────────────────────────────────────────────────────────

    def _tell(self, kind: type[Content] | type[Reasoning]) -> None:
        """What was read and not told is of this kind."""
        text, self._text, self._at = self._text[: self._at], self._text[self._at :], 0
        if kind is Content and self._skip_space:
            text = text.lstrip(SPACE)
            self._skip_space = not text
        if text:
            self._events.append(kind(text))

    def tell_content(self) -> None:
        """What was read and not told is content."""
        self._tell(Content)

    def drop(self) -> None:
        """What was read and not told is told to nobody."""
        self._text = self._text[self._at :]
        self._at = 0

    def back(self) -> None:
        """Read once more what was read and not told."""
        self._at = 0


class Marks:
    """Several texts that are looked for at once."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._any = re.compile("|".join(map(re.escape, texts)))
        self._heads = re.compile("[" + "".join(sorted({re.escape(text[0]) for text in texts})) + "]")
        self._longest = max(map(len, texts))

    def first(self, text: str, start: int) -> tuple[int, str]:
        """Where in `text`, from `start` on, the first of them stands, and which it is; none, where one may have begun
        without being all there, or at the end of the text."""
        found = self._any.search(text, start)
        end = found.start() if found else len(text)
        for head in self._heads.finditer(text, max(start, len(text) - self._longest + 1), end):
            rest = text[head.start() :]
            if any(mark.startswith(rest) for mark in self._texts):
                return head.start(), ""
        return end, found[0] if found else ""


class Value:
    """How far one JSON value has been read: its open brackets, and whether inside a string."""

    def __init__(self) -> None:
        self.scalar = False  # whether it is a number or a word, which only what follows ends
        self._closing: list[str] = []
        self._in_string = False

    def go_on(self, text: str, at: int) -> tuple[int, bool | None]:
        """Read on from `at`: how far it comes, and whether the value is then whole, False if it is broken or there is
        none, None if it goes on."""
        while at < len(text):
            if self._in_string:
                stop = _STRING_STOP.search(text, at)
                if stop is None:
                    return len(text), None
                if stop[0] == "\\":
                    if stop.end() == len(text):
                        return stop.start(), None
                    at = stop.end() + 1
                    continue
                at = stop.end()
                self._in_string = False
                if not self._closing:
                    return at, True
                continue
            character = text[at]
            if not self._closing and (self.scalar or character in SPACE + ",:}]"):
                if self.scalar and (more := _SCALAR.match(text, at)):
                    at = more.end()
                    continue
                return at, self.scalar
            if between := _BETWEEN.match(text, at):
                at = between.end()
            elif character in _CLOSING:
                self._closing.append(_CLOSING[character])
                at += 1
            elif character in "}]":
                if character != self._closing.pop():
                    return at, False
                at += 1
                if not self._closing:
                    return at, True
            elif character == '"':
                self._in_string = True
                at += 1
            elif scalar := _SCALAR.match(text, at):
                at = scalar.end()
                self.scalar = not self._closing
            else:
                return at, False
        return at, None
