"""A conversation: messages of typed parts, as every API has it from its edge to the tokenizer.

    Message   role, and in the order of the client's:
        Text      what is said
        Image     a picture, and Video a clip: where they come from, and where the client put them
        Call      a call of a tool that the model made
        Result    what a tool returned: parts again, of text and media

What a model reads of it is decided where the chat template writes it (template.py). Media meet the model, and may be
refused, in one place (media.py). A router knows a conversation without its template, by the canonical text of its parts
(canonical.py). Pure structs: nothing is fetched or decoded.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn

import msgspec
from msgspec import Struct

from engine.errors import RequestError

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")


class Text(Struct, frozen=True, array_like=True, tag=True):
    text: str


class Image(Struct, frozen=True, array_like=True, tag=True):
    """A picture. `source` is a data: or http(s): URL; the client put it at `place` (messages[2].content[1]), as a part
    of the type `kind`. `detail` is what it asked of the resolution: "low" is few tokens, all else as many as the model
    takes."""

    source: str
    place: str
    kind: str = "image_url"
    detail: str | None = None

    @property
    def coarse(self) -> bool:
        return self.detail == "low"


class Video(Struct, frozen=True, array_like=True, tag=True):
    """A clip; the fields are those of Image."""

    source: str
    place: str
    kind: str = "video_url"
    coarse: ClassVar[bool] = False


class Call(Struct, frozen=True, array_like=True, tag=True):
    """A call of a tool; `arguments` is JSON, if the model wrote it right."""

    name: str
    arguments: str
    id: str | None = None


Shown = Text | Image | Video


class Result(Struct, frozen=True, array_like=True, tag=True):
    """What the call `id` returned."""

    id: str | None
    parts: tuple[Shown, ...]


Part = Text | Image | Video | Call | Result


class Message(Struct, frozen=True, array_like=True):
    """One message. `reasoning` is what the assistant thought, `extra` are fields for the chat template that only it
    knows."""

    role: Role
    parts: tuple[Part, ...]
    name: str | None = None
    reasoning: str | None = None
    extra: dict[str, Any] = {}

    @property
    def shown(self) -> Iterator[Shown]:
        """Texts and media in their order, those of results among them."""
        for part in self.parts:
            if isinstance(part, Result):
                yield from part.parts
            elif not isinstance(part, Call):
                yield part

    @property
    def text(self) -> str:
        """All texts as one."""
        if len(self.parts) == 1 and isinstance(only := self.parts[0], Text):  # as nearly all have
            return only.text
        return "".join(part.text for part in self.shown if isinstance(part, Text))

    @property
    def is_silent(self) -> bool:
        """Whether it shows nothing."""
        return all(isinstance(part, Text) and not part.text for part in self.shown)

    @property
    def calls(self) -> list[Call]:
        if len(self.parts) == 1 and isinstance(self.parts[0], Text):
            return []
        return [part for part in self.parts if isinstance(part, Call)]

    @property
    def answers(self) -> str | None:
        """The id of the call whose result this is, if it is one's."""
        return next((part.id for part in self.parts if isinstance(part, Result)), None)


def said(role: Role, text: str, **fields: Any) -> Message:
    """A message of one text, or of none where that is empty; `fields` are others of Message."""
    return Message(role, (Text(text),) if text else (), **fields)


def as_one(messages: Sequence[Message], between: str = "") -> Message:
    """Successive messages of one role as one, with `between` where one that shows something follows another."""
    if len(messages) == 1:
        return messages[0]
    parts: list[Part] = []
    silent = True
    for message in messages:
        if between and not (silent or message.is_silent):
            parts.append(Text(between))
        silent = silent and message.is_silent
        parts += message.parts
    thought = [message.reasoning for message in messages if message.reasoning is not None]
    return Message(messages[0].role, tuple(parts), reasoning=thought[-1] if thought else None)


def alternating(messages: Iterable[Message]) -> list[Message]:
    """`messages` with successive ones of one role as one, in lines of their own; those of tools stay apart."""
    runs: list[list[Message]] = []  # of messages that become one
    for message in messages:
        if runs and runs[-1][0].role == message.role != "tool":
            runs[-1].append(message)
        else:
            runs.append([message])
    return [as_one(run, "\n") for run in runs]


def with_calls(messages: Iterable[Message]) -> list[Message]:
    """`messages` in which calls and reasoning, which came as messages of their own, are part of what the assistant
    said."""
    runs: list[list[Message]] = []  # of messages that become one
    text = False  # whether the last run says something already
    for message in messages:
        if runs and runs[-1][0].role == message.role == "assistant" and (message.calls or not text):
            runs[-1].append(message)
        else:
            runs.append([message])
            text = False
        text = text or bool(message.text)
    return [as_one(run) for run in runs]


def media_of(messages: Iterable[Message]) -> list[Image | Video]:
    """The pictures and clips of a conversation, in their order."""
    media: list[Image | Video] = []
    for message in messages:
        for part in message.parts:
            if isinstance(part, Text):  # as nearly all are
                continue
            if isinstance(part, Result):
                media += [shown for shown in part.parts if not isinstance(shown, Text)]
            elif not isinstance(part, Call):
                media.append(part)
    return media


def without_sources(message: Message) -> Message:
    """`message` without the bytes of its media, once they are known by what was made of them."""
    return msgspec.structs.replace(message, parts=tuple([_without_source(part) for part in message.parts]))


def _without_source(part: Any) -> Any:
    if isinstance(part, Result):
        return Result(part.id, tuple([_without_source(each) for each in part.parts]))
    return msgspec.structs.replace(part, source="") if isinstance(part, Image | Video) else part


def has_tools(messages: Iterable[Message]) -> bool:
    """Whether tools were called, or have answered."""
    for message in messages:
        for part in message.parts:
            if not isinstance(part, Text) and isinstance(part, Call | Result):
                return True
    return False


# ── from what a program says ─────────────────────────────────────────────────────────────────


def read_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages in OpenAI's shape, as dictionaries of a program's. Raises RequestError for malformed ones."""
    return [_read(index, message) for index, message in enumerate(messages)]


def _read(index: int, message: Any) -> Message:
    def refuse(what: str) -> NoReturn:
        raise RequestError(f"messages[{index}] {what}", param="messages")

    if not isinstance(message, Mapping):
        refuse(f"is {message!r}; an object with role and content is needed")
    left = dict(message)
    role, content, calls = left.pop("role", None), left.pop("content", None), left.pop("tool_calls", None)
    if role not in ROLES:
        refuse(f"has role {role!r}; it must be one of {', '.join(ROLES)}")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str | list):
        refuse(f"has content {content!r}; a string or a list of text parts is needed")
    if not isinstance(left.get("tool_call_id"), str | None):
        refuse(f"has tool_call_id {left['tool_call_id']!r:.80}; send the id of the call as text")
    if isinstance(content, str):
        parts: tuple[Shown, ...] = (Text(content),) if content else ()
    else:
        parts = tuple(_shown(part, f"messages[{index}].content[{at}]", refuse) for at, part in enumerate(content))
    whole: tuple[Part, ...] = (Result(left.pop("tool_call_id", None), parts),) if role == "tool" else parts
    return Message(
        role,
        (*whole, *_calls(calls, refuse)),
        name=left.pop("name") if isinstance(left.get("name"), str) else None,
        reasoning=left.pop("reasoning_content") if isinstance(left.get("reasoning_content"), str) else None,
        extra=left,
    )


def _shown(part: Any, place: str, refuse: Callable[[str], NoReturn]) -> Shown:
    """One part of a content, which stands at `place`."""
    match part:
        case {"type": "text", "text": str(text)}:
            return Text(text)
        case {"type": "image_url", "image_url": {"url": str(url), "detail": str(detail)}}:
            return Image(url, place, detail=detail)
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            return Image(url, place)
        case {"type": "video_url", "video_url": {"url": str(url)}}:
            return Video(url, place)
    refuse(
        'has a content part that is not {"type": "text", "text": "..."}, nor an image_url or a video_url with its '
        f"url: {part!r:.80}"
    )


def _calls(calls: Any, refuse: Callable[[str], NoReturn]) -> Iterator[Call]:
    if not calls:
        return
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            refuse(f'has the tool call {call!r:.80}; {{"function": {{"name", "arguments"}}}} is needed')
        name, arguments = function["name"], function.get("arguments")
        if not isinstance(arguments, str | dict):
            refuse(f"has a call of {name!r} without arguments; send them as text that holds JSON")
        if not isinstance(call.get("id"), str | None):
            refuse(f"has a call of {name!r} with the id {call['id']!r:.80}; send it as text")
        if isinstance(arguments, dict):
            try:
                arguments = json.dumps(arguments, ensure_ascii=False)
            except RecursionError:
                refuse(f"has a call of {name!r} that nests too deeply; flatten its arguments")
            except (TypeError, ValueError) as error:
                refuse(f"has a call of {name!r} with arguments that JSON cannot say ({error}); send them as text")
        yield Call(name, arguments, call.get("id"))
