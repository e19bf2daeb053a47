"""How many parts a body may have, counted before any is built.

What a body costs the event loop goes by its strings, lists and objects far more than by its bytes: 32 MiB of text are
decoded in under 0.1 s, 32 MiB of empty lists in two seconds. So its parts are counted first, outside of strings, in
slices of a fraction of a millisecond, between which others have their turn. Fields whose items cost more than a part
have limits of their own, in the structs of the bodies.
"""

from collections.abc import Iterator

import anyio.lowlevel

from engine.errors import RequestError

MAX_PARTS = 1 << 17  # strings (names of fields are some), lists and objects
MAX_VALUES = (1 << 20) + MAX_PARTS  # all values: the token ids of the longest prompts, and the parts beside them
SLICE = 1 << 18  # bytes
UNCOUNTED = 2 * MAX_PARTS  # bytes that cannot hold more parts than that: the shortest is written with two


class PartCounter:
    """Counts the parts and the values of JSON that comes in slices. Of what is no JSON, it counts at least those before
    the first mistake."""

    def __init__(self) -> None:
        self.parts = 0
        self.values = 1
        self._inside = False  # of a string

    def feed(self, piece: bytes) -> None:
        """Take in the next slice, which does not end between a backslash and what that escapes."""
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        between = piece.split(b'"')
        outside = b"".join(between[self._inside :: 2])
        quotes = len(between) - 1
        self.parts += (quotes + (not self._inside)) // 2 + outside.count(b"[") + outside.count(b"{")
        self.values += outside.count(b",")
        self._inside ^= quotes % 2 == 1


def sliced(data: bytes, size: int = SLICE) -> Iterator[bytes]:
    """`data` in slices of `size` bytes or one more, none of which ends within an escape."""
    begin = 0
    while begin < len(data):
        piece = data[begin : begin + size]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = data[begin : begin + size + 1]
        begin += len(piece)
        yield piece


async def check_parts(data: bytes) -> None:
    """Raise RequestError when the body `data` has too many parts; others run between its slices."""
    if len(data) <= UNCOUNTED:
        return
    counter = PartCounter()
    for piece in sliced(data):
        counter.feed(piece)
        for count, most, what in (
            (counter.parts, MAX_PARTS, "strings, lists and objects"),
            (counter.values, MAX_VALUES, "values"),
        ):
            if count > most:
                raise RequestError(
                    f"the request body has over {most} {what}; send fewer prompts, messages, parts, tools or token ids "
                    "in one request",
                    code="too_many_parts",
                )
        await anyio.lowlevel.checkpoint()
