"""One text for what a model is asked, made without its template, and the hashes of that text in blocks.

A router and a worker make the same text of one request, so that they can speak of what is cached:

    a conversation   tools, then the messages in their order. A longer conversation begins with the text of a shorter
    a text           itself, behind the first picture or clip that comes beside it (/generate)
    token ids        four characters a token: the bytes of its int32, little-endian

A message is MESSAGE, its role (and MARK and its name), a line break, and what it says. Texts stand as they are. All
else stands between two MARKs and begins with a letter: `r` reasoning, `i` and `v` the hash of a picture or a clip, `c`
a call of a tool. What differs between APIs and not for the model is left out: ids of calls, spaces in their arguments.

`arrival_text` reads a body as it came, and never refuses one: what it does not know it leaves out, so a wrong body
goes somewhere too. A text can say that it is another; then two requests seem to share what they do not share, and go
to one worker. The cache itself compares tokens.
Left out: options of chat templates, among them how much a model is to think; earlier turns of a response that is gone
on with by its id. Pure logic, without template and tokenizer.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from engine.conversation.parts import Call, Image, Message, Result, Shown, Text
from engine.conversation.raw import (
    anthropic_messages,
    chat_messages,
    compact,
    first_shown,
    prompts_of,
    response_messages,
    tools_of,
)

BLOCK: Final = 128  # characters
MESSAGE: Final = "\x1e"
MARK: Final = "\x1f"
TOOL: Final = "\x1d"
LARGE: Final = 1 << 16  # characters of a source of media that are encoded at a time


# ── hashes ───────────────────────────────────────────────────────────────────────────────────


def chained(text: str, space: bytes = b"") -> "array[int]":
    """A hash (unsigned, 64 bits) for each whole block of BLOCK characters of `text`, which covers all before it too.

    It is BLAKE2b with a digest of 8 bytes, little-endian, of the text up to the end of the block in UTF-8, and `space`
    (64 bytes at most) is its key. Texts of different spaces share no hash."""
    state = hashlib.blake2b(digest_size=8, key=space)
    update, copy, digests = state.update, state.copy, []
    for end in range(BLOCK, len(text) + 1, BLOCK):
        update(text[end - BLOCK : end].encode("utf-8", "surrogatepass"))
        digests.append(copy().digest())
    return array("Q", b"".join(digests))


def space_of(cache_salt: str) -> bytes:
    """What beside its text must be equal for a request to share what is cached: none without a salt."""
    if not cache_salt:
        return b""
    return hashlib.blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=8).digest()


# ── what is known in full ────────────────────────────────────────────────────────────────────


class Written:
    """A canonical text while it grows. `texts` are what the client wrote and the model reads as it is, each with the
    character that it begins at."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.texts: list[tuple[int, str]] = []
        self.length = 0

    def add(self, *pieces: str) -> None:
        for piece in pieces:
            self.pieces.append(piece)
            self.length += len(piece)

    def add_tools(self, tools: Iterable[Mapping[str, Any]]) -> None:
        """Tools as chat templates take them."""
        for tool in tools:
            function = tool.get("function", tool)
            told = [function.get("name"), function.get("description") or None, function.get("parameters")]
            self.add(TOOL, compact(told))

    def add_message(self, message: Message) -> None:
        role = "system" if message.role == "developer" else message.role
        self.add(MESSAGE, role, *((MARK, message.name) if message.name else ()), "\n")
        if message.reasoning:
            self.add(MARK, "r", message.reasoning, MARK)
        calls = []
        for part in message.parts:
            if isinstance(part, Call):
                calls.append(part)
            elif isinstance(part, Result):
                self.show(part.parts)
            else:
                self.show((part,))
        for call in calls:
            self.add(MARK, "c", call.name, " ", _plain(call.arguments), MARK)

    def show(self, shown: Iterable[Shown]) -> None:
        for part in shown:
            if isinstance(part, Text):
                self.texts.append((self.length, part.text))
                self.add(part.text)
            else:
                kind, detail = ("i" if isinstance(part, Image) else "v"), ("low" if part.coarse else "")
                self.add(MARK, kind, _fingerprint(part.source), detail, MARK)

    def whole(self) -> str:
        return "".join(self.pieces)


def written(messages: Iterable[Message], tools: Iterable[Mapping[str, Any]] = ()) -> Written:
    """A conversation, and `tools` as chat templates take them."""
    made = Written()
    made.add_tools(tools)
    for message in messages:
        made.add_message(message)
    return made


def of_messages(messages: Iterable[Message], tools: Iterable[Mapping[str, Any]] = ()) -> str:
    """The canonical text of a conversation."""
    return written(messages, tools).whole()


def of_ids(ids: bytes) -> str:
    """The canonical text of token ids (int32)."""
    return ids.decode("latin-1")


def _fingerprint(source: str) -> str:
    """The hash of where a picture or a clip comes from, which for a data: URL is the medium itself."""
    state = hashlib.blake2b(digest_size=16)
    for start in range(0, len(source), LARGE):
        state.update(source[start : start + LARGE].encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def _plain(arguments: str) -> str:
    """The JSON in `arguments` without spaces; text that holds none as it is."""
    try:
        return compact(msgspec.json.decode(arguments))
    except (ValueError, RecursionError):
        return arguments


# ── what has just come ───────────────────────────────────────────────────────────────────────


def arrival_text(path: str, body: Mapping[str, Any]) -> str:
    """The canonical text of the JSON `body` of a request for `path`; empty where neither is known.

    Several prompts in one body are one text, in their order."""
    if not isinstance(body, Mapping):  # JSON that is no object comes as well
        return ""
    if "/responses" in path or "/decisions" in path:
        return of_messages(response_messages(body), tools_of(body))
    if "messages" in body:
        read = anthropic_messages if "/messages" in path else chat_messages
        return of_messages(read(body), tools_of(body))
    made = Written()
    made.show(first_shown(body))
    made.add(*(prompt if isinstance(prompt, str) else of_ids(prompt) for prompt in prompts_of(body)))
    return made.whole()


def arrival_space(body: Mapping[str, Any]) -> bytes:
    """As space_of, for the JSON body of a request."""
    salt = body.get("cache_salt") if isinstance(body, Mapping) else None
    return space_of(salt) if isinstance(salt, str) else b""
