"""The items of a response: what the model thinks, messages and calls of tools, as OpenAI's responses API has them.

An output is a list of items in the order of the reply. A conversation, which is kept as messages of parts, is shown as
items too. How items come about in a stream is events.py's.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from engine.conversation.parsers import merged
from engine.conversation.parts import Image, Message, Text, Video
from engine.http.openai.logprobs import ChatToken, chat_token
from engine.http.wire import Reply
from engine.messages.reply import Chunk
from engine.plugin.parsing import CallArguments, CallBegin, CallEnd, Content, Event, Reasoning

ItemStatus = Literal["in_progress", "completed", "incomplete"]


NO_NAMES: Mapping[str, str] = MappingProxyType({})


class ScoredContent(Content, frozen=True):
    """Content with the log-probabilities of its tokens."""

    logprobs: list[ChatToken] = msgspec.field(default_factory=list)


class OutputText(Reply, frozen=True, tag_field="type", tag="output_text"):
    text: str
    annotations: tuple[()] = ()
    logprobs: list[ChatToken] = msgspec.field(default_factory=list)


class InputText(Reply, frozen=True, tag_field="type", tag="input_text"):
    text: str


class InputImage(Reply, frozen=True, tag_field="type", tag="input_image"):
    image_url: str
    detail: str = "auto"


class InputVideo(Reply, frozen=True, tag_field="type", tag="input_video"):
    video_url: str


class ReasoningText(Reply, frozen=True, tag_field="type", tag="reasoning_text"):
    text: str


class OutputMessage(Reply, frozen=True, tag_field="type", tag="message"):
    """A message of the model's; without content while there is none."""

    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class ReasoningItem(Reply, frozen=True, tag_field="type", tag="reasoning"):
    """What the model thinks; without content while there is none."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: tuple[()] = ()


class FunctionCallItem(Reply, frozen=True, tag_field="type", tag="function_call"):
    """A call of a tool; what the tool returns is sent for its `call_id`. `namespace` is the tool's, if it has one."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    namespace: str | UnsetType = UNSET


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class MessageItem(Reply, frozen=True, tag_field="type", tag="message"):
    """A message of a conversation that a response answers."""

    id: str
    role: Literal["user", "assistant", "system"]
    content: list[InputText | InputImage | InputVideo | OutputText]
    status: Literal["completed"] = "completed"


class FunctionOutputItem(Reply, frozen=True, tag_field="type", tag="function_call_output"):
    """What a tool returned."""

    id: str
    call_id: str
    output: str
    status: Literal["completed"] = "completed"


InputItem = MessageItem | ReasoningItem | FunctionCallItem | FunctionOutputItem


class Items:
    """The items of an output while it grows; `key` is what their ids share, `namespaces` are those of the tools by the
    whole names that the model has for them."""

    def __init__(self, key: str, namespaces: Mapping[str, str] = NO_NAMES) -> None:
        self._key = key
        self._namespaces = namespaces
        self.items: list[OutputItem] = []

    def add(self, event: Event, status: ItemStatus = "in_progress") -> OutputItem | None:
        """Take in what a parser tells; the item that it began, if it began one."""
        last = self.items[-1] if self.items else None
        match event, last:
            case Content(text), OutputMessage(content=[said]):
                said.logprobs.extend(_scores(event))
                self.items[-1] = OutputMessage(last.id, status, [OutputText(said.text + text, logprobs=said.logprobs)])
            case Reasoning(text), ReasoningItem(content=thought):
                self.items[-1] = ReasoningItem(last.id, status, [ReasoningText(_text(thought) + text)])
            case CallArguments(_, text), FunctionCallItem():
                self.items[-1] = msgspec.structs.replace(last, status=status, arguments=last.arguments + text)
            case Content(text), _:
                said = OutputText(text, logprobs=_scores(event))
                return self._begun(OutputMessage(self._id("msg"), status, [said]))
            case Reasoning(text), _:
                return self._begun(ReasoningItem(self._id("rs"), status, [ReasoningText(text)]))
            case CallBegin(_, id, name), _:
                return self._begun(FunctionCallItem(self._id("fc"), status, id, *_named(name, self._namespaces)))
            case CallEnd() | CallArguments(), _:
                pass
        return None

    def _begun(self, item: OutputItem) -> OutputItem:
        self.items.append(item)
        return item

    def _id(self, kind: str) -> str:
        return f"{kind}_{self._key}" if not self.items else f"{kind}_{self._key}_{len(self.items)}"


def _text(parts: Sequence[ReasoningText]) -> str:
    return "".join(part.text for part in parts)


def _scores(event: Event) -> list[ChatToken]:
    """The log-probabilities of `event`, in a list of their own."""
    return [*event.logprobs] if isinstance(event, ScoredContent) else []


def _named(name: str, namespaces: Mapping[str, str], arguments: str = "") -> tuple[str, str, str | UnsetType]:
    """The name, the arguments and the namespace of a call of what the model knows as `name`."""
    if not (namespace := namespaces.get(name)):
        return name, arguments, UNSET
    return name.removeprefix(f"{namespace}."), arguments, namespace


class Scores:
    """Gives log-probabilities to what is said: the content has those of the tokens since what came before it."""

    def __init__(self) -> None:
        self._waiting: list[ChatToken] = []  # what they say is not told yet
        self._said = True  # whether the last that was told is content, or nothing was

    def join(self, chunk: Chunk, events: list[Event]) -> list[Event]:
        """`events`, which `chunk` has made certain, with log-probabilities."""
        self._waiting += map(chat_token, chunk.logprobs)
        joined: list[Event] = []
        for event in events:
            self._said = isinstance(event, Content)
            joined.append(ScoredContent(event.text, self._take()) if isinstance(event, Content) else event)
        if not self._said:
            self._waiting = []
        elif chunk.finish is not None and self._waiting:  # what ended it is no text
            joined.append(ScoredContent("", self._take()))
        return joined

    def _take(self) -> list[ChatToken]:
        taken, self._waiting = self._waiting, []
        return taken


def together(events: Iterable[Event]) -> list[Event]:
    """`events` with successive ones of one kind as one, as `merged` has it, and their log-probabilities."""
    few: list[Event] = []
    for scored, run in groupby(events, lambda event: isinstance(event, ScoredContent)):
        several = list(run)
        if scored:
            text = "".join(event.text for event in several if isinstance(event, Content))
            few.append(ScoredContent(text, [token for event in several for token in _scores(event)]))
        else:
            few += merged(several)
    return few


def output_of(
    events: Iterable[Event],
    key: str,
    status: ItemStatus,
    *,
    ended: bool,
    namespaces: Mapping[str, str] = NO_NAMES,
) -> list[OutputItem]:
    """The items that `events` tell, the last of them with `status`. What has ended holds at least an empty message."""
    output = Items(key, namespaces)
    for event in events:
        output.add(event, "completed")
    if ended and not output.items:
        output.add(Content(""), "completed")
    if output.items and status != "completed":
        output.items[-1] = with_status(output.items[-1], status)
    return output.items


def with_status(item: OutputItem, status: ItemStatus) -> OutputItem:
    """`item` at another time."""
    match item:
        case OutputMessage(id, _, said):
            return OutputMessage(id, status, said)
        case ReasoningItem(id, _, thought):
            return ReasoningItem(id, status, thought)
        case FunctionCallItem():
            return msgspec.structs.replace(item, status=status)


def input_items(conversation: Sequence[Message], key: str, namespaces: Mapping[str, str] = NO_NAMES) -> list[InputItem]:
    """The items of `conversation`, whose ids begin with `key`; `namespaces` are as Items has them."""
    items: list[InputItem] = []
    for message in conversation:
        if thought := message.reasoning:
            items.append(ReasoningItem(f"{key}_{len(items)}", "completed", [ReasoningText(thought)]))
        match message.role:
            case "tool":
                items.append(FunctionOutputItem(f"{key}_{len(items)}", message.answers or "", message.text))
            case "user" | "system" | "assistant" as role:
                if not (message.is_silent and message.calls):
                    content = _content(message) or [_said(role, "")]
                    items.append(MessageItem(f"{key}_{len(items)}", role, content))
        for call in message.calls:
            named = _named(call.name, namespaces, call.arguments)
            items.append(FunctionCallItem(f"{key}_{len(items)}", "completed", call.id or "", *named))
    return items


def _content(message: Message) -> list[InputText | InputImage | InputVideo | OutputText]:
    """What `message` shows; successive texts are one."""
    content: list[InputText | InputImage | InputVideo | OutputText] = []
    for is_text, run in groupby(message.shown, lambda part: isinstance(part, Text)):
        if is_text:
            content.append(_said(message.role, "".join(part.text for part in run if isinstance(part, Text))))
        else:
            content += [_medium(part) for part in run if isinstance(part, Image | Video)]
    return content


def _medium(part: Image | Video) -> InputImage | InputVideo:
    return InputVideo(part.source) if isinstance(part, Video) else InputImage(part.source, part.detail or "auto")


def _said(role: str, text: str) -> InputText | OutputText:
    return OutputText(text) if role == "assistant" else InputText(text)
