"""Headers that come several times in one message.

Lines of one name are one list, in their order, where the header is a list; any other header may come once only
(RFC 9110, 5.3). A reader of the first line alone would miss what a proxy added behind it, or believe another line than
the next server does. Left out: headers that aiohttp refuses when they are repeated, such as Content-Length,
Content-Type and Host.
"""

from typing import Protocol

from engine.errors import RequestError


class Headers(Protocol):
    """Headers by name, in any case, each with any number of values."""

    def getall(self, key: str, default: tuple[str, ...], /) -> list[str] | tuple[str, ...]: ...


def joined(headers: Headers, name: str) -> str:
    """All lines of the list `name` as one; empty where there is none."""
    return ", ".join(headers.getall(name, ()))


def members(headers: Headers, name: str) -> frozenset[str]:
    """The words of the list `name`, in lower case."""
    return frozenset(word.strip().lower() for line in headers.getall(name, ()) for word in line.split(","))


def once(headers: Headers, name: str) -> str | None:
    """The value of `name`, which is no list. Raises RequestError where it comes several times, be it with one value."""
    lines = headers.getall(name, ())
    if len(lines) > 1:
        raise RequestError(f"the header {name} comes {len(lines)} times; send it once", param=name)
    return lines[0] if lines else None
