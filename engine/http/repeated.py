"""Headers that come several times in one message.

Lines of one name are one list, in their order, where the header is a list; any other header may come once only
(RFC 9110, 5.3). A reader of the first line alone would miss what a proxy added behind it, or believe another line than
the next server does. Where all lines have one value, as behind proxies that each add it, that is no question. Left out:
headers that aiohttp refuses when they are repeated, such as Content-Length, Content-Type and Host.
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
    """The value of `name`, which is no list. Raises RequestError where it comes with several values."""
    values = list(dict.fromkeys(value.strip() for value in headers.getall(name, ())))
    if len(values) > 1:
        raise RequestError(f"the header {name} comes with {len(values)} values; send one", param=name)
    return values[0] if values else None
