"""The events of a response: numbered, each item opened, filled and closed in its turn."""

from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct

from engine.errors import Words
from engine.http.openai.logprobs import ChatToken
from engine.http.responses.items import (
    FunctionCallItem,
    Items,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ScoredContent,
    with_status,
)
from engine.http.responses.store import Response, ResponseObject, Told
from engine.http.sse import describe_error
from engine.http.wire import Reply, to_json
from engine.plugin.parsing import CallArguments, CallEnd, Content, Event, Reasoning


class ResponseEvent(Reply, kw_only=True, frozen=True):
    """Numbered from 0 on."""

    sequence_number: int


class StatusEvent(ResponseEvent, kw_only=True, frozen=True):
    type: Literal[
        "response.queued", "response.created", "response.in_progress",
        "response.completed", "response.incomplete", "response.failed",
    ]  # fmt: skip
    response: ResponseObject


class ItemEvent(ResponseEvent, kw_only=True, frozen=True):
    type: Literal["response.output_item.added", "response.output_item.done"]
    item: OutputItem
    output_index: int


class InItem(ResponseEvent, kw_only=True, frozen=True):
    """An event inside of an item."""

    item_id: str
    output_index: int


class InPart(InItem, kw_only=True, frozen=True):
    """An event of an item's only part."""

    content_index: int = 0


class PartEvent(InPart, kw_only=True, frozen=True):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText | ReasoningText


class DeltaEvent(InPart, kw_only=True, frozen=True):
    delta: str
    logprobs: list[ChatToken] = msgspec.field(default_factory=list)
    type: Literal["response.output_text.delta"] = "response.output_text.delta"


class TextEvent(InPart, kw_only=True, frozen=True):
    text: str
    logprobs: list[ChatToken] = msgspec.field(default_factory=list)
    type: Literal["response.output_text.done"] = "response.output_text.done"


class ReasoningDeltaEvent(InPart, kw_only=True, frozen=True):
    delta: str
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"


class ReasoningTextEvent(InPart, kw_only=True, frozen=True):
    text: str
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"


class ArgumentsDeltaEvent(InItem, kw_only=True, frozen=True):
    delta: str
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"


class ArgumentsEvent(InItem, kw_only=True, frozen=True):
    name: str
    arguments: str
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"


AnyEvent = (
    StatusEvent | ItemEvent | PartEvent | DeltaEvent | TextEvent
    | ReasoningDeltaEvent | ReasoningTextEvent | ArgumentsDeltaEvent | ArgumentsEvent
)  # fmt: skip
EVENTS: tuple[type[Struct], ...] = get_args(AnyEvent)


class ResponseEvents:
    """What is told of a response as its events; those up to number `after` are left out."""

    def __init__(self, response: Response, after: int = -1) -> None:
        self._response = response
        self._after = after
        self._number = 0
        self._output = Items(response.key, response.namespaces)
        self._open: int | None = None  # the place of the item that is open: the last one

    def event(self, told: Told) -> bytes:
        """The events of a chunk: what opens a response before the first, what closes it after the last."""
        chunk, parts = told
        events = [] if self._number else self._opening()
        for part in parts:
            events += self._told(part)
        if chunk.finish is not None:
            if not self._output.items:
                events += self._told(Content(""))
            status: Literal["completed", "incomplete"]
            status = "completed" if self._response.status == "completed" else "incomplete"
            events += [*self._close(status), self._status(status, self._response.object())]
        return b"".join(events)

    def failure(self, error: Exception, words: Words) -> bytes:
        """The last event of a stream that fails."""
        if not self._response.ended:
            self._response.fail(describe_error(error, words))
        return self._status("failed", self._response.object())

    def _opening(self) -> list[bytes]:
        response = self._response
        waiting = response.object(status="in_progress")
        queued = [self._status("queued", response.object(status="queued"))] if response.background else []
        return [*queued, self._status("created", waiting), self._status("in_progress", waiting)]

    def _told(self, part: Event) -> list[bytes]:
        """The events of what a parser tells: those of a new item, if it begins one, then its own."""
        events: list[bytes] = []
        if (begun := self._output.add(part)) is not None:
            events += self._close("completed")
            self._open = len(self._output.items) - 1
            events += self._opened(begun)
        match part:
            case Content(text) if text:
                scores = part.logprobs if isinstance(part, ScoredContent) else []
                events.append(self._inside(DeltaEvent, delta=text, logprobs=scores))
            case Reasoning(text):
                events.append(self._inside(ReasoningDeltaEvent, delta=text))
            case CallArguments(_, text):
                events.append(self._inside(ArgumentsDeltaEvent, delta=text))
            case CallEnd():
                events += self._close("completed")
        return events

    def _opened(self, item: OutputItem) -> list[bytes]:
        """The events of an item that begins, which is still empty."""
        match item:
            case OutputMessage(id):
                return [
                    self._item("added", OutputMessage(id, "in_progress", [])),
                    self._part("added", OutputText("")),
                ]
            case ReasoningItem(id):
                return [
                    self._item("added", ReasoningItem(id, "in_progress", [])),
                    self._part("added", ReasoningText("")),
                ]
            case FunctionCallItem():
                return [self._item("added", item)]

    def _close(self, status: ItemStatus) -> list[bytes]:
        """The events of the end of the item that is open, if one is."""
        if self._open is None:
            return []
        item = with_status(self._output.items[self._open], status)
        events: list[bytes] = []
        match item:
            case OutputMessage(_, _, [part]):
                events = [
                    self._inside(TextEvent, text=part.text, logprobs=part.logprobs),
                    self._part("done", part),
                ]
            case ReasoningItem(_, _, [thought]):
                events = [self._inside(ReasoningTextEvent, text=thought.text), self._part("done", thought)]
            case FunctionCallItem():
                events = [self._inside(ArgumentsEvent, name=item.name, arguments=item.arguments)]
        events.append(self._item("done", item))
        self._open = None
        return events

    def _status(self, status: str, response: ResponseObject) -> bytes:
        return self._next(StatusEvent, type=f"response.{status}", response=response)

    def _item(self, what: str, item: OutputItem) -> bytes:
        return self._next(ItemEvent, type=f"response.output_item.{what}", item=item, output_index=self._open)

    def _part(self, what: str, part: OutputText | ReasoningText) -> bytes:
        return self._inside(PartEvent, type=f"response.content_part.{what}", part=part)

    def _inside(self, kind: type[AnyEvent], **fields: Any) -> bytes:
        """An event inside of the item that is open."""
        assert self._open is not None, "nothing is told outside of an item"
        return self._next(kind, item_id=self._output.items[self._open].id, output_index=self._open, **fields)

    def _next(self, kind: type[AnyEvent], **fields: Any) -> bytes:
        """The event of the next number; nothing, if that is not asked for."""
        number = self._number
        self._number += 1
        if number <= self._after:
            return b""
        event = kind(sequence_number=number, **fields)
        return b"event: %b\ndata: %b\n\n" % (event.type.encode(), to_json(event))
