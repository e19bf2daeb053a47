"""What becomes of a body's field: served, a hint, or refused. The tables are in the bodies; docs and OpenAPI derive.

    served    the engine does what the field says; it has no entry in its body's `rules`
    hint      it cannot change a reply in a way that its user would call wrong: ignored, named once in the log and in
              the header X-Ignored-Fields of each answer, and refused with --strict-fields
    refused   the reply would be wrong without it

A field that asks for what is done anyway, or for nothing (null), is neither. Unknown names are refused by the decoder.
"""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec
from aiohttp import web
from msgspec import Struct

from engine.errors import RequestError, shortened

HEADER = "X-Ignored-Fields"
NAMED = 64  # names that one header has at most
EMPTY: tuple[Any, ...] = ([], {}, "")
log = logging.getLogger(__name__)


class Only(Struct, frozen=True):
    """Which values are hints: `says` it in words, `holds` of a value."""

    says: str
    holds: Callable[[Any], bool]


class Rule(Struct, frozen=True, kw_only=True):
    """What becomes of a field that the engine does not act on.

    `neutral` are the values that ask for what is done anyway; `remedy` is what to do in place of leaving it out, `code`
    that of its error. Of a hint, `only` says which values are one, `told` whether the client hears of it, and `strict`
    whether --strict-fields refuses it."""

    kind: Literal["hint", "refused"]
    neutral: tuple[Any, ...] = ()
    only: Only | None = None
    told: bool = True
    strict: bool = True
    remedy: str = "leave it out"
    code: str = "unsupported_parameter"

    def is_neutral(self, value: Any) -> bool:
        """Whether `value`, which is not null, asks for nothing, or for what is done anyway."""
        nothing = (*self.neutral, *EMPTY) if self.kind == "hint" else self.neutral
        # 1 == True in Python, but not in JSON.
        return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in nothing)

    def is_hint(self, value: Any, *, strict: bool) -> bool:
        """Whether `value`, which is not neutral, is ignored."""
        return (
            self.kind == "hint" and not (strict and self.strict) and (self.only is None or bool(self.only.holds(value)))
        )

    def refusal(self, path: str, value: Any) -> RequestError:
        """The error about `value` of the field that the client calls `path`."""
        accepted = " or ".join(_json(other) for other in (*self.neutral, None))
        if self.only is not None:
            accepted += f", and {self.only.says} is ignored"
        given = shortened(_json(value[:80] if isinstance(value, str) else value))
        message = f"{path} is not supported yet: got {given}, accepted is only {accepted}; {self.remedy}"
        return RequestError(message, param=path, code=self.code)


def unserved(*neutral: Any, remedy: str = "leave it out", code: str = "unsupported_parameter") -> Rule:
    """The reply would be wrong without it, but at one of `neutral`."""
    return Rule(kind="refused", neutral=neutral, remedy=remedy, code=code)


def hint(*neutral: Any, only: Only | None = None) -> Rule:
    """The reply is right without it; at one of `neutral` nothing is ignored."""
    return Rule(kind="hint", neutral=neutral, only=only)


def label(*neutral: Any) -> Rule:
    """It says who asks, or how to keep, cache or bill: nothing of the reply."""
    return Rule(kind="hint", neutral=neutral, strict=False)


LABEL = label()
ECHO = Rule(kind="hint", strict=False, told=False)  # part of what a reply had, sent back with it


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


# ── who is told ──────────────────────────────────────────────────────────────────────────────


class Ignored:
    """Which fields one process has ignored so far: each is logged once. Their names are ours, so they are few. `strict`
    is whether hints are refused."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self._logged: set[str] = set()

    def note(self, request: web.Request, names: Iterable[str]) -> None:
        """Say of `request` that its fields `names` are ignored."""
        for name in names:
            request.setdefault(NAMES, {})[name] = None
            if name not in self._logged:
                self._logged.add(name)
                log.info("%s ignores the field %s, as its reply is right without it (said once)", request.path, name)


NAMES = web.RequestKey("ignored", dict[str, None])
IGNORED = web.AppKey("ignored", Ignored)


def ignore(request: web.Request, *names: str) -> None:
    """Say of `request` that its hints `names` are ignored, which no table tells as the model has a say in them.

    Raises RequestError where hints are refused."""
    if names and request.app[IGNORED].strict:
        message = f"{names[0]} changes nothing here, and the server was started with --strict-fields; leave it out"
        raise RequestError(message, param=names[0], code="unsupported_parameter")
    request.app[IGNORED].note(request, names)


async def send_ignored(request: web.Request, response: web.StreamResponse) -> None:
    """Put the ignored fields of `request` into the headers of its answer."""
    if names := list(request.get(NAMES, ())):
        more = [] if len(names) <= NAMED else ["..."]
        response.headers[HEADER] = ", ".join(names[:NAMED] + more)


def in_general(path: str) -> str:
    """`path` without the numbers in it: messages[3].name as messages[].name."""
    return re.sub(r"\[\d+\]", "[]", path)
