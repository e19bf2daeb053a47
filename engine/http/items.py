"""The items of a response: what the model thinks, messages and calls of tools, as OpenAI's responses API has them.

An output is a list of items in the order of the reply. A conversation, which is kept as chat templates take it, is
shown as items too. How items come about in a stream is response_events.py's.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from engine.http.wire import Reply
from engine.plugin.parsing import CallArguments, CallBegin, CallEnd, Content, Event, Reasoning

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Reply, frozen=True, tag_field="type", tag="output_text"):
    text: str
    annotations: tuple[()] = ()
    logprobs: tuple[()] = ()


class InputText(Reply, frozen=True, tag_field="type", tag="input_text"):
    text: str


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
    """A call of a tool; what the tool returns is sent for its `call_id`."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class MessageItem(Reply, frozen=True, tag_field="type", tag="message"):
    """A message of a conversation that a response answers."""

    id: str
    role: Literal["user", "assistant", "system"]
    content: list[InputText | OutputText]
    status: Literal["completed"] = "completed"


class FunctionOutputItem(Reply, frozen=True, tag_field="type", tag="function_call_output"):
    """What a tool returned."""

    id: str
    call_id: str
    output: str
    status: Literal["completed"] = "completed"


InputItem = MessageItem | ReasoningItem | FunctionCallItem | FunctionOutputItem


class Items:
    """The items of an output while it grows; `key` is what their ids share."""

    def __init__(self, key: str) -> None:
        self._key = key
        self.items: list[OutputItem] = []

    def add(self, event: Event, status: ItemStatus = "in_progress") -> OutputItem | None:
        """Take in what a parser tells; the item that it began, if it began one."""
        last = self.items[-1] if self.items else None
        match event, last:
            case Content(text), OutputMessage(content=said):
                self.items[-1] = OutputMessage(last.id, status, [OutputText(_text(said) + text)])
            case Reasoning(text), ReasoningItem(content=thought):
                self.items[-1] = ReasoningItem(last.id, status, [ReasoningText(_text(thought) + text)])
            case CallArguments(_, text), FunctionCallItem(_, _, call, name, arguments):
                self.items[-1] = FunctionCallItem(last.id, status, call, name, arguments + text)
            case Content(text), _:
                return self._begun(OutputMessage(self._id("msg"), status, [OutputText(text)]))
            case Reasoning(text), _:
                return self._begun(ReasoningItem(self._id("rs"), status, [ReasoningText(text)]))
            case CallBegin(_, id, name), _:
                return self._begun(FunctionCallItem(self._id("fc"), status, id, name, ""))
            case CallEnd() | CallArguments(), _:
                pass
        return None

    def _begun(self, item: OutputItem) -> OutputItem:
        self.items.append(item)
        return item

    def _id(self, kind: str) -> str:
        return f"{kind}_{self._key}" if not self.items else f"{kind}_{self._key}_{len(self.items)}"


def _text(parts: Sequence[OutputText | ReasoningText]) -> str:
    return "".join(part.text for part in parts)


def output_of(events: Iterable[Event], key: str, status: ItemStatus, *, ended: bool) -> list[OutputItem]:
    """The items that `events` tell, the last of them with `status`. What has ended holds at least an empty message."""
    output = Items(key)
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
        case FunctionCallItem(id, _, call, name, arguments):
            return FunctionCallItem(id, status, call, name, arguments)


def input_items(conversation: Sequence[dict[str, Any]], key: str) -> list[InputItem]:
    """The items of `conversation`, whose ids begin with `key`."""
    items: list[InputItem] = []
    for message in conversation:
        if thought := message.get("reasoning_content"):
            items.append(ReasoningItem(f"{key}_{len(items)}", "completed", [ReasoningText(thought)]))
        said, calls = message["content"], message.get("tool_calls", ())
        if message["role"] == "tool":
            items.append(FunctionOutputItem(f"{key}_{len(items)}", message["tool_call_id"], said))
        elif said or not calls:
            text = OutputText(said) if message["role"] == "assistant" else InputText(said)
            items.append(MessageItem(f"{key}_{len(items)}", message["role"], [text]))
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            items.append(FunctionCallItem(f"{key}_{len(items)}", "completed", call["id"], name, arguments))
    return items
