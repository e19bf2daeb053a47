"""Which parsers a model gets, and how the two of them read one reply: first what it thinks, then content and calls.

What a parser is, engine/plugin/parsing.py says. Left out: what becomes of events on the wire (http/), and how a model
is told of tools (tools.py).
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import Struct

from engine.config import ServerOptions
from engine.errors import PluginError, did_you_mean
from engine.plugin.hookspecs import ParserEntry
from engine.plugin.parsing import (
    Call,
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Event,
    Reasoning,
    ReasoningParser,
    ToolParser,
)
from engine.plugin.registry import Plugins

DEFAULT_TOOL_PARSER = "hermes"  # of a model of no known family, which is then told how to write calls

log = logging.getLogger(__name__)
Kind = Literal["tool", "reasoning"]


class Parsers(Struct, frozen=True):
    """The parsers of one model; None where nothing is parsed."""

    tool: type[ToolParser] | None = None
    reasoning: type[ReasoningParser] | None = None

    @property
    def special(self) -> tuple[str, ...]:
        """What they look for; where it is special tokens, these must stay in the text."""
        calls = () if self.tool is None else self.tool.special
        return calls if self.reasoning is None else (*calls, self.reasoning.start, self.reasoning.end)


# ── choosing ─────────────────────────────────────────────────────────────────────────────────


def check_parsers(plugins: Plugins, options: ServerOptions) -> None:
    """Raises PluginError for an option that names no parser of its kind."""
    for kind, name in _asked(options):
        if name not in ("auto", "none"):
            _named(plugins, kind, name)


def choose_parsers(
    plugins: Plugins, options: ServerOptions, architectures: Sequence[str], chat_template: str | None
) -> Parsers:
    """The parsers that `options` ask for, or that go with the model; logged with the reason. Raises PluginError."""
    chosen = {}
    for kind, name in _asked(options):
        entry, reason = choose_parser(plugins, kind, name, architectures, chat_template)
        if chat_template is not None:
            log.info("%s parser: %s (%s)", kind, "none" if entry is None else entry.name, reason)
        chosen[kind] = None if entry is None else plugins.code("parsers", entry.name)
    return Parsers(**chosen)


def choose_parser(
    plugins: Plugins, kind: Kind, name: str, architectures: Sequence[str], chat_template: str | None
) -> tuple[ParserEntry | None, str]:
    """The parser of `kind`, and the reason for it."""
    if name == "none":
        return None, f"--{kind}-parser none"
    if name != "auto":
        return _named(plugins, kind, name), f"--{kind}-parser"
    entries = [entry for entry in plugins.entries("parsers").values() if entry.kind == kind]
    preferred = [entry for entry in entries if ("parsers", entry.name) in plugins.named]
    if len(preferred) > 1:
        both = " and ".join(entry.name for entry in preferred)
        raise PluginError(f"--plugins names the {kind} parsers {both}; choose one with --{kind}-parser")
    if preferred:
        return preferred[0], "named in --plugins"
    source = (chat_template or "").replace('\\"', '"')
    marked = [entry for entry in entries if entry.markers and all(mark in source for mark in entry.markers)]
    if marked:
        best = max(marked, key=lambda entry: len(entry.markers))
        return best, f"the chat template has {' and '.join(best.markers)}"
    for entry in entries:
        if family := set(entry.architectures) & set(architectures):
            return entry, f"a {', '.join(sorted(family))}"
    if kind == "tool" and DEFAULT_TOOL_PARSER in plugins.entries("parsers"):
        reason = "no family is known, so the model is told how to write calls"
        return plugins.entries("parsers")[DEFAULT_TOOL_PARSER], reason
    return None, "no family is known"


def _asked(options: ServerOptions) -> tuple[tuple[Kind, str], ...]:
    return ("tool", options.tool_parser), ("reasoning", options.reasoning_parser)


def _named(plugins: Plugins, kind: Kind, name: str) -> ParserEntry:
    known = {entry.name: entry for entry in plugins.entries("parsers").values() if entry.kind == kind}
    if name not in known:
        listed = ", ".join(["auto", "none", *known])
        raise PluginError(f"unknown {kind} parser {name!r}{did_you_mean(name, known)}; known: {listed}")
    return known[name]


# ── one reply ────────────────────────────────────────────────────────────────────────────────


class Parsed(Struct, frozen=True):
    """A whole reply by its parts."""

    content: str
    reasoning: str
    calls: list[Call]


class ReplyParser:
    """Reads one reply; `most_calls` is how many calls are told, the first ones. If not `separate`, reasoning is told as
    content, in which nobody looks for calls. A reply that is `forced` is nothing but calls: what is not told as one is
    a part of one, where the reply was cut off."""

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tools: ToolParser | None,
        most_calls: int | None = None,
        *,
        separate: bool = True,
        forced: bool = False,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._most_calls = most_calls
        self._separate = separate
        self._forced = forced and tools is not None

    @property
    def plain(self) -> bool:
        """Whether all that comes from here on is content, so that nobody needs to look."""
        if self._forced or (self._reasoning is not None and not self._reasoning.plain):
            return False
        return self._tools is None or self._tools.plain

    def feed(self, text: str) -> list[Event]:
        """The next piece of the reply; what it makes certain, as few events as there may be."""
        if self._reasoning is None:
            return [Content(text)] if self._tools is None else merged(self._kept(self._tools.feed(text)))
        return self._told(self._reasoning.feed(text))

    def finish(self) -> list[Event]:
        """The reply has ended; what was held back."""
        held = self._told([] if self._reasoning is None else self._reasoning.finish())
        return held if self._tools is None else merged([*held, *self._kept(self._tools.finish())])

    def _told(self, events: Iterable[Event]) -> list[Event]:
        told: list[Event] = []
        for event in events:
            if isinstance(event, Content) and self._tools is not None:
                told += self._kept(self._tools.feed(event.text))
            elif isinstance(event, Reasoning) and not self._separate:
                told.append(Content(event.text))
            else:
                told.append(event)
        return merged(told)

    def _kept(self, events: list[Event]) -> list[Event]:
        if self._forced:
            events = [event for event in events if not isinstance(event, Content)]
        if self._most_calls is None:
            return events
        return [event for event in events if isinstance(event, Content) or _number(event) < self._most_calls]


def _number(event: Event) -> int:
    return event.index if isinstance(event, CallBegin | CallArguments | CallEnd) else 0


def merged(events: Iterable[Event]) -> list[Event]:
    """`events` with successive ones of one kind as one."""
    events = list(events)
    if len(events) < 2:
        return events
    few: list[Event] = []
    for event in events:
        match few[-1] if few else None, event:
            case Content(before), Content(after):
                few[-1] = Content(before + after)
            case Reasoning(before), Reasoning(after):
                few[-1] = Reasoning(before + after)
            case CallArguments(index, before), CallArguments(same, after) if index == same:
                few[-1] = CallArguments(index, before + after)
            case _:
                few.append(event)
    return few


def assembled(events: Iterable[Event]) -> Parsed:
    """What `events` tell, all together."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[CallBegin] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallBegin():
                calls.append(event)
                arguments.append([])
            case CallArguments(_, text):
                arguments[-1].append(text)
    whole = [Call(call.name, "".join(parts), call.id) for call, parts in zip(calls, arguments, strict=True)]
    return Parsed("".join(content), "".join(reasoning), whole)
