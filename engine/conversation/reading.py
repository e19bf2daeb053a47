"""How the replies to one conversation are forced and read: its tools, its grammar, its parsers.

Every API that has conversations makes a `Wanted` of what its client says of tools, and gets a `Reading`: what goes
into the Generate, and a parser for each reply. Without tools and without a parser for reasoning there is nothing to
read, and replies pass as they are.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from engine.conversation.calls import Tool, allowed, either, forced
from engine.conversation.parsers import Parsers, ReplyParser, merged
from engine.conversation.parts import Message
from engine.errors import RequestError
from engine.messages.reply import Chunk
from engine.params.grammar import Grammar
from engine.params.sampling import SamplingParams
from engine.plugin.parsing import CallArguments, CallBegin, Event, Reasoning, ReasoningParser, ToolParser
from engine.text.tokenizer import Text

FinishReason = Literal["stop", "length", "abort"] | None


class Wanted(Struct, frozen=True):
    """The tools of a request. `named` is the one to be called, if the client insists on one; `held` says that it has
    other tools, which are not to be called."""

    tools: Sequence[Tool] = ()
    mode: Literal["none", "auto", "required"] = "auto"
    named: str | None = None
    parallel: bool = True
    held: bool = False

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if self.named is not None and self.named not in names:
            known = ", ".join(names) or "none at all"
            raise RequestError(
                f"tool_choice names {self.named!r:.200}, which is no tool of the request; its tools: {known}",
                param="tool_choice",
            )
        if self.mode == "required" and not names:
            raise RequestError("tool_choice needs tools to choose from; send tools as well", param="tool_choice")

    @property
    def offered(self) -> Sequence[Tool]:
        """Those that the model is told of."""
        return () if self.mode == "none" else self.tools

    @property
    def callable(self) -> Sequence[Tool]:
        """Those that it may call."""
        return [tool for tool in self.offered if self.named in (None, tool.name)]


class Reading(Struct, frozen=True):
    """What a request's conversation makes of its replies.

    The first three fields are those of Generate. `opened` is as ReasoningParser has it; `separate` says that reasoning
    is told apart, `marks` are the ids of the tokens around it, if each is one."""

    sampling: SamplingParams = SamplingParams()
    tools: list[dict[str, Any]] | None = None
    opening: str = ""
    parsers: Parsers = Parsers()
    wanted: Wanted = Wanted()
    opened: bool | None = None
    separate: bool = False
    told: bool = True  # whether the reply has the reasoning
    marks: tuple[int, int] | None = None

    @property
    def job(self) -> dict[str, Any]:
        """The fields of a Generate that follow from it."""
        show = self.parsers.reasoning is not None or self.parsers.tool is not None
        return {"sampling": self.sampling, "tools": self.tools, "opening": self.opening, "show_marks": show}

    @property
    def grammar(self) -> Grammar | None:
        """What a reply must be, its calls of tools included."""
        return self.sampling.grammar

    def grammar_names(self, field: str) -> dict[str, str]:
        """What the client, who asked for a grammar in `field`, calls the parts of it that an error may be about."""
        if not field:
            return {}
        if self.wanted.mode == "required":
            return {"grammar": "tools"}
        if self.grammar is None or self.grammar.beside is None:
            return {"grammar": field}
        return {"grammar": "tools", "format": field}

    def reader(self) -> "Reader | None":
        """A reader of one reply; None where there is nothing to find."""
        tool, reasoning = self.parsers.tool, self.parsers.reasoning
        if tool is None and not self.separate:
            return None
        offered = {each.name: each.parameters for each in self.wanted.offered}
        parser = ReplyParser(
            None if reasoning is None else reasoning(self.opened, marked=not self.separate),
            None if tool is None else tool(list(offered), offered),
            None if self.wanted.parallel else 1,
            separate=self.separate,
            forced=self.wanted.mode == "required",
        )
        return Reader(parser, self.marks if self.separate else None, told=self.told)


NOTHING = Reading()  # replies pass as they are


class Reader:
    """Reads one reply, chunk by chunk. `plain` says that there is nothing more to find."""

    def __init__(self, parser: ReplyParser, marks: tuple[int, int] | None, *, told: bool = True) -> None:
        self.plain = False
        self._told = told
        self._parser = parser
        self._marks = marks
        self._in_reasoning = marks is not None
        self._reasoned = 0  # tokens so far, if they are reasoning
        self._has_reasoning = False
        self._arguments: list[str] | None = None  # of the last call, piece by piece
        self._cut = False  # whether a stop string fell into that

    def read(self, chunk: Chunk) -> list[Event]:
        """What `chunk` makes certain, and if it is the last one, what was held back."""
        events = self._parser.feed(chunk.text)
        if chunk.finish is not None:
            events = merged([*events, *self._parser.finish()])
        for event in events:
            match event:
                case CallBegin():
                    self._arguments = []
                case CallArguments(_, text) if self._arguments is not None:
                    self._arguments.append(text)
                case Reasoning():
                    self._has_reasoning = True
        if isinstance(chunk.matched, str) and self._arguments is not None:
            self._cut = not _is_json("".join(self._arguments))
        if self._in_reasoning:
            self._count(chunk.ids)
        self.plain = self._parser.plain
        return events if self._told else [event for event in events if not isinstance(event, Reasoning)]

    def finish_reason(self, reason: FinishReason) -> FinishReason | Literal["tool_calls"]:
        """Why the reply ended, which is its calls if there are any and nothing cut it off."""
        return "tool_calls" if reason == "stop" and self._arguments is not None and not self._cut else reason

    @property
    def reasoning_tokens(self) -> int:
        """How many tokens stand between the two marks, or before the second."""
        return self._reasoned if self._has_reasoning else 0

    def _count(self, ids: list[int]) -> None:
        assert self._marks is not None
        start, end = self._marks
        if end in ids:
            self._in_reasoning = False
            ids = ids[: ids.index(end)]
        self._reasoned += len(ids) - ids.count(start)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def reading_of(
    text: Text | None,
    sampling: SamplingParams,
    messages: Sequence[Message],
    options: dict[str, Any],
    wanted: Wanted,
    *,
    separate: bool = True,
    told: bool = True,
) -> Reading:
    """How to read replies to `messages`, which the chat template writes with `options`.

    `separate` False leaves reasoning in the content, `told` False leaves it out.
    Raises RequestError for tools that cannot be served so."""
    if text is None:  # it is still being read: the request will be refused
        return Reading(sampling)
    grammar = sampling.grammar
    tool = text.parsers.tool if wanted.offered else None
    if wanted.offered:
        _check(wanted, tool, sampling)
        grammar = _with_tools(wanted, tool, grammar)
    reasoning, opened, opening = text.parsers.reasoning if sampling.detokenize else None, None, ""
    options = {**options, "tools": bool(wanted.offered)}
    if reasoning is not None:
        opened = text.reasoning_open(reasoning.start, reasoning.end, messages, **options)
        if grammar is not None and opened is None and not reasoning.assumed:
            opened = _reasons(text, reasoning, messages, options)
            opening = f"{reasoning.start}\n" if opened else ""  # so that its end will come
        if grammar is not None and opened is not False:
            grammar = msgspec.structs.replace(grammar, after=reasoning.end)
    start, end = (None, None) if reasoning is None else (text.id_of(reasoning.start), text.id_of(reasoning.end))
    return Reading(
        sampling if grammar is sampling.grammar else msgspec.structs.replace(sampling, grammar=grammar),
        tools=[tool.described() for tool in wanted.offered] or None,
        opening=opening,
        parsers=Parsers(tool, reasoning),
        wanted=wanted,
        opened=opened,
        separate=separate and reasoning is not None,
        told=told,
        marks=None if start is None or end is None else (start, end),
    )


def _reasons(
    text: Text, reasoning: type[ReasoningParser], messages: Sequence[Message], options: dict[str, Any]
) -> bool:
    """Whether a reply is to begin with reasoning where the prompt leaves that open: if the template has a switch that
    closes it, as most families have, and it is not used."""
    switched = {**(options.get("template_kwargs") or {}), "enable_thinking": False}
    closed = text.reasoning_open(reasoning.start, reasoning.end, messages, **options | {"template_kwargs": switched})
    return closed is False


def _check(wanted: Wanted, parser: type[ToolParser] | None, sampling: SamplingParams) -> None:
    if not sampling.detokenize:
        raise RequestError(
            "detokenize is false and tools are given, whose calls are read from the text; leave one out",
            param="detokenize",
        )
    if parser is None and wanted.mode == "required":
        raise RequestError(
            "tool_choice asks for a call, and this server reads none (--tool-parser none); send tool_choice auto",
            param="tool_choice",
            code="unsupported_parameter",
        )


def _with_tools(wanted: Wanted, parser: type[ToolParser] | None, grammar: Grammar | None) -> Grammar | None:
    """What a reply must be that may, or must, call tools; `grammar` is what else it must be."""
    if parser is None:
        return grammar
    parallel = wanted.parallel and wanted.named is None
    if wanted.mode == "required":  # what else the reply must be is of its text, and there is none
        return forced(wanted.callable, parser.syntax, parallel=parallel)
    if grammar is not None:
        return either(wanted.callable, parser.syntax, grammar, parallel=parallel)
    return allowed(wanted.callable, parser.syntax, held=wanted.held)
