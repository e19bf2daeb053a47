"""What a program has said so far: plain text, or messages of a chat, and what of it is the next prompt.

A program has one or the other. The chat template of the served model writes messages where the prompt is made
(backend.py), so nothing here knows of tokens. Pure logic.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn

from msgspec import Struct

from engine.errors import ProgramError
from engine.lang.expressions import Role
from engine.lang.tools import ToolCall


class Prompt(Struct, frozen=True):
    """What the model goes on from: `text`, or `messages` in OpenAI's shape. `begun` says that the last of these is the
    beginning of the reply."""

    text: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    begun: bool = False


class Said(Struct):
    """One message: texts and media in their order, and what OpenAI's messages have besides."""

    role: str
    pieces: list[str | dict[str, Any]]
    extra: dict[str, Any] = {}

    def written(self) -> dict[str, Any]:
        """In OpenAI's shape; a content of text alone is one text."""
        parts: list[Any] = []
        for is_text, run in groupby(self.pieces, key=lambda piece: isinstance(piece, str)):
            pieces = list(run)
            parts += [{"type": "text", "text": "".join(map(str, pieces))}] if is_text else pieces
        content = "".join(map(str, self.pieces)) if all(part["type"] == "text" for part in parts) else parts
        return {"role": self.role, "content": content, **self.extra}


class Transcript:
    """The text of one state, in its pieces."""

    def __init__(self) -> None:
        self.role: Role | None = None
        self._messages: list[Said] = []
        self._plain: list[str] = []
        self.length = 0  # characters

    def copy(self) -> "Transcript":
        """Another that goes on from here."""
        made = Transcript()
        made.role, made.length, made._plain = self.role, self.length, list(self._plain)
        made._messages = [Said(each.role, list(each.pieces), each.extra) for each in self._messages]
        return made

    # ── what is said ─────────────────────────────────────────────────────────────────────────

    def say(self, text: str) -> None:
        """Raises ProgramError for text beside messages."""
        if not text:
            return
        if self.role is not None:
            self._messages[-1].pieces.append(text)
        elif self._messages:
            self._stray(f"the text {text[:40]!r}")
        else:
            self._plain.append(text)
        self.length += len(text)

    def show(self, part: dict[str, Any]) -> None:
        """Show a picture or a clip. Raises ProgramError outside of a message of the user's."""
        if self.role != "user":
            where = "outside of any role" if self.role is None else f"in a message of the {self.role}"
            raise ProgramError(f"a picture or a clip stands {where}; put it into user(...)")
        self._messages[-1].pieces.append(part)

    def called(self, text: str, calls: Sequence[ToolCall], results: Sequence[str]) -> None:
        """The assistant has called tools, and these have returned `results`; then it speaks on, in a new message."""
        spoken = self._messages[-1]
        assert spoken.role == "assistant" and not spoken.pieces, "whoever calls tools has said nothing before"
        spoken.pieces = [text] if text else []
        spoken.extra = {"tool_calls": [call.written() for call in calls]}
        self._messages += [
            Said("tool", [result], {"tool_call_id": call.id}) for call, result in zip(calls, results, strict=True)
        ]
        self._messages.append(Said("assistant", []))
        self.length += len(text)

    def begin(self, role: Role) -> None:
        """A message begins. Raises ProgramError within another, and behind plain text."""
        if self.role is not None:
            raise ProgramError(f"a message of the {role} begins inside one of the {self.role}; end that first")
        if self._plain:
            raise ProgramError(
                f"a message of the {role} comes behind text outside of any role; put the text into a role, too"
            )
        self.role = role
        self._messages.append(Said(role, []))

    def end(self, role: Role) -> None:
        """The message ends. Raises ProgramError where it is none of `role`."""
        if self.role != role:
            open_ = "no message is open" if self.role is None else f"the message is the {self.role}'s"
            raise ProgramError(f"the end of a message of the {role}, but {open_}")
        self.role = None

    # ── what is there ────────────────────────────────────────────────────────────────────────

    @property
    def text(self) -> str:
        """All that was said, without what a template puts around messages."""
        said = (piece for each in self._messages if each.role != "tool" for piece in each.pieces)
        return "".join(self._plain) + "".join(piece for piece in said if isinstance(piece, str))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """In OpenAI's shape; none of plain text."""
        return [each.written() for each in self._messages]

    def so_far(self) -> Prompt:
        """All that was said, whoever speaks next."""
        said = [each for each in self._messages if each.pieces or each.extra]
        return Prompt(None, tuple(each.written() for each in said)) if said else Prompt("".join(self._plain))

    def prompt(self) -> Prompt:
        """What a reply goes on from here. Raises ProgramError where the assistant does not speak."""
        if not self._messages:
            return Prompt("".join(self._plain))
        if self.role is None:
            self._stray("a gen or select")
        if self.role != "assistant":
            raise ProgramError(
                f"a gen or select is in a message of the {self.role}; chat templates let the assistant speak alone, so "
                "put it into assistant(...), or write the program without roles"
            )
        messages = tuple(self.messages)
        return Prompt(None, messages, True) if messages[-1]["content"] else Prompt(None, messages[:-1])

    def _stray(self, what: str) -> NoReturn:
        raise ProgramError(f"{what} stands outside of any role in a program with roles; put it into one")
