"""HTTP/1.1 towards a worker: a request is sent, and what comes back is passed on as it comes.

    Upstream.ask(request) ──> Head ──> take() ──> go_direct(transport): each read of the socket is one write to the
                                                  client, until the end, or until the client is slow

The body keeps the coding that the worker gave it: chunks are counted, and never taken apart. So an event costs one
read, one look at the size of its chunk, and one write. A client that takes nothing stops the reading of its worker's
connection, which in turn stops the worker. Left out: several requests at once on one connection, HTTP/2, upgrades.
"""

import asyncio
import re
import socket
import struct
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, cast

from msgspec import Struct

from engine.client.bench.wire import HEAD_END, Address, connected, joined
from engine.errors import WorkerError

MOST_HEAD: Final = 64 * 2**10  # bytes
MOST_GATHERED: Final = 256 * 2**10  # bytes that are held for a handler that has not come for them
LAST: Final = 4  # reads of the socket of which the end of a body is remembered
LAST_BYTES: Final = 4096
SIZES: Final = 1024  # that are remembered as they were written: events are of few sizes
SHORT: Final = 16  # bytes of the line of one of those, at most
FIRST_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\r\n\0]*))?")
DIGITS: Final = b"0123456789abcdefABCDEF"
BROKEN_LINE: Final = re.compile(rb"[\r\n\0]")  # what is a line's end for some readers

RawHeaders = Sequence[tuple[bytes, bytes]]


class BrokenConnection(WorkerError):
    """The connection to a worker ended before the answer did; `unused` says that it may have ended while it was idle,
    before the request came."""

    def __init__(self, message: str, *, unused: bool = False) -> None:
        super().__init__(message)
        self.unused = unused


class Head(Struct, frozen=True):
    """The head of an answer. `names` are its headers, by names in lower case; those of one name are one list.
    `connection` are the words of its Connection, in lower case, most of which name headers. `length` is that of the
    body; -1 where the head has none."""

    status: int
    reason: str
    headers: RawHeaders
    names: dict[bytes, bytes]
    length: int = -1
    closes: bool = False  # the worker ends the connection behind the body
    connection: frozenset[bytes] = frozenset()

    @classmethod
    def read(cls, data: bytes) -> "Head":
        """Raises WorkerError for what is no head of HTTP, or may be read in two ways."""
        first, *lines = data.split(b"\r\n")
        found = FIRST_LINE.fullmatch(first)
        if found is None:
            raise WorkerError(f"the worker answered {first[:40]!r}, which is not HTTP/1.1")
        if (bad := next(filter(BROKEN_LINE.search, lines), None)) is not None:
            raise WorkerError(f"the worker's reply has {bad[:40]!r} for a header")
        headers = [
            (name.strip(), value.strip()) for name, colon, value in (line.partition(b":") for line in lines) if colon
        ]
        names = joined(headers)
        said = frozenset(word.strip() for word in names.get(b"connection", b"").lower().split(b","))
        closes = b"close" in said or (found[1] == b"0" and b"keep-alive" not in said)
        lengths = [value for name, value in headers if name.lower() == b"content-length"]
        if len(lengths) > 1 or not all(map(bytes.isdigit, lengths)):
            raise WorkerError(f"the worker's reply has {b', '.join(lengths)[:40]!r} for its Content-Length")
        length = int(lengths[0]) if lengths else -1
        return cls(int(found[2]), (found[3] or b"").decode("latin-1"), headers, names, length, closes, said)


class Chunks:
    """Where a body in chunks ends. It is told each piece of the body once, in order."""

    __slots__ = ("_left", "_line", "_trailer")

    def __init__(self) -> None:
        self._left = 0  # bytes of the chunk at hand that are still to come, with the two that end its line
        self._line = b""  # the beginning of a line that a piece has cut
        self._trailer = False

    def end(self, data: bytes) -> bool:
        """Whether the body ends with `data`. Raises WorkerError for what are no chunks, or more than the body."""
        if not (self._left or self._line or self._trailer):
            stop = data.find(b"\n", 0, SHORT)
            if stop > 0 and (length := _known_size(data[:stop])) and stop + length + 3 == len(data):
                return False  # one whole chunk, as an event mostly comes
        if self._line:
            data = self._line + data
            self._line = b""
        at, size = self._left, len(data)
        while at < size:
            stop = data.find(b"\n", at)
            if stop < 0:
                self._line, self._left = data[at:], 0
                if len(self._line) > MOST_HEAD:
                    raise WorkerError(f"the worker's reply has {self._line[:40]!r} where the size of a chunk belongs")
                return False
            if self._trailer:
                if stop - at <= 1:
                    if stop + 1 < size:
                        raise WorkerError("the worker's reply goes on after its end")
                    return True
                at = stop + 1
                continue
            length = _size(data[at:stop])
            if length:
                at = stop + length + 3
            else:
                self._trailer = True
                at = stop + 1
        self._left = at - size
        return False


def _size(line: bytes) -> int:
    """The size that begins a chunk, hexadecimal digits and nothing else: `int` also takes `0x5`, `+5` and `1_0`."""
    digits = (line.partition(b";")[0] if b";" in line else line).rstrip(b" \t\r")
    if digits and not digits.translate(None, DIGITS):
        return int(digits, 16)
    raise WorkerError(f"the worker's reply has {line[:40]!r} where the size of a chunk belongs")


_known_size = lru_cache(SIZES)(_size)


class Upstream(asyncio.Protocol):
    """One connection to a worker. It may ask again once an answer has come whole, while `open`."""

    def __init__(self) -> None:
        self.open = False
        self.asked = 0  # requests
        self.ended = True  # all of the answer has come
        self.idle_since = 0.0
        self._broken: Exception | None = None
        self._head: asyncio.Future[Head] | None = None
        self._begun = b""  # of a head
        self._bodiless = self._closes = self._paused = self._framed = False
        self._chunks: Chunks | None = None
        self._left: int | None = None  # bytes of a body of known length that are still to come
        self._gathered: list[bytes] = []
        self._size = 0
        self._first: bytes = b""
        self._last: deque[bytes] = deque(maxlen=LAST)
        self._client: asyncio.Transport | None = None
        self._most = 0
        self._wanted: asyncio.Future[None] | None = None

    @classmethod
    async def to(cls, address: Address, seconds: float) -> "Upstream":
        """Raises WorkerError where nobody listens, or nobody answers in so many seconds."""
        return await connected(cls, address, seconds)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.open = True

    async def ask(self, head: bytes, body: bytes = b"") -> Head:
        """Send a request, and wait for the head of its answer. Raises WorkerError where none comes."""
        if not self.open:
            raise BrokenConnection("the worker closed the connection before it was asked", unused=self.asked > 0)
        self.asked += 1
        self.ended = self._closes = False
        self._size = 0
        self._bodiless = head.startswith(b"HEAD ")
        self._begun, self._chunks, self._left, self._broken = b"", None, None, None
        self._gathered, self._first = [], b""
        self._last.clear()
        self._head = wanted = asyncio.get_running_loop().create_future()
        self._transport.write(head + body if len(body) < MOST_HEAD else head)
        if len(body) >= MOST_HEAD:
            self._transport.write(body)
        return await wanted

    def close(self) -> None:
        """End the connection; a worker takes that as the end of what it was asked."""
        self.open = False
        self._client = None
        self._transport.abort()

    def fail(self, error: Exception) -> None:
        """End the connection with `error`, which whoever waits for the answer is told."""
        self._broken = error
        self.open = False
        self._transport.abort()
        head, self._head = self._head, None
        if head is not None and not head.done():
            head.set_exception(error)
        self._wake()

    def half_close(self) -> None:
        """Send no more: the client has closed its sending side. A worker goes on or ends, as without a router."""
        self._closes = True
        if self.open and not self.ended and self._transport.can_write_eof():
            self._transport.write_eof()
            # What is closed later has said so already: let the system say that it is gone, by a reset.
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    # ── the way of a body ────────────────────────────────────────────────────────────────────

    def take(self) -> bytes:
        """What has come of the body and was not written yet."""
        data = b"".join(self._gathered)
        self._gathered.clear()
        self._size = 0
        return data

    def go_direct(self, client: asyncio.Transport) -> None:
        """From now on write to `client` what comes, until `woken` returns."""
        self._client = client
        self._most = client.get_write_buffer_limits()[1]
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    async def woken(self) -> None:
        """Wait until the body has ended, or the client is slow. Raises WorkerError where the worker breaks off."""
        if not self.ended and self._broken is None and not self._gathered:
            self._wanted = asyncio.get_running_loop().create_future()
            try:
                await self._wanted
            finally:
                self._wanted = None
                self._client = None
        if self._broken is not None:
            raise self._broken

    @property
    def framed(self) -> bool:
        """Whether the answer says where its body ends; else the end of the connection does."""
        return self._framed

    @property
    def whole(self) -> bool:
        """Whether the connection may be asked again: it is open, and nothing more comes or goes of what was asked."""
        return self.open and self.ended and not self._closes and not self._transport.get_write_buffer_size()

    def seen(self) -> tuple[bytes, bytes]:
        """The beginning and the end of the body, as it came: what a reply says of itself stands there."""
        return self._first, b"".join(self._last)[-LAST_BYTES:]

    # ── called by the event loop ─────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._take_head(data)
            return
        if self.ended:  # nothing was asked
            self.close()
            return
        if not self._last:
            self._first = data
        self._last.append(data if len(data) <= LAST_BYTES else data[-LAST_BYTES:])
        if (chunks := self._chunks) is not None:
            try:
                self.ended = chunks.end(data)
            except WorkerError as error:
                self.fail(error)
                return
        elif self._left is not None:
            if len(data) > self._left:
                data, self._closes = data[: self._left], True
            self._left -= len(data)
            self.ended = not self._left
        client = self._client
        if client is None:
            self._gather(data)
        elif client.is_closing():
            self._wake()
        else:
            client.write(data)
            if self.ended:
                self._wake()
            elif client.get_write_buffer_size() > self._most:
                self._pause()
                self._wake()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self.ended or self._broken is not None:  # which says why already
            return
        if self._head is None and not self._framed and error is None:
            self.ended = True  # its end is that of the connection
            self._wake()
            return
        when = "before it answered" if self._head is not None else "before its reply ended"
        unused = self._head is not None and self.asked > 1 and not self._begun
        self.fail(BrokenConnection(f"the worker closed the connection {when}", unused=unused))

    def _gather(self, data: bytes) -> None:
        self._gathered.append(data)
        self._size += len(data)
        if self._size > MOST_GATHERED:
            self._pause()
        self._wake()

    def _pause(self) -> None:
        if not self._paused and self.open:
            self._paused = True
            self._transport.pause_reading()

    def _wake(self) -> None:
        self._client = None
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def _take_head(self, data: bytes) -> None:
        assert self._head is not None
        body, head = self._begun + data, None
        while head is None or head.status < 200:  # after interim answers
            text, found, body = body.partition(HEAD_END)
            if not found:
                self._begun = text
                if len(text) > MOST_HEAD:
                    self.fail(WorkerError(f"the head of the worker's reply is over {MOST_HEAD} bytes"))
                return
            try:
                head = Head.read(text)
            except WorkerError as error:
                self.fail(error)
                return
            if head.status == 101:
                self.fail(WorkerError("the worker answered 101, and was not asked to switch protocols"))
                return
        self._begun = b""
        wanted, self._head = self._head, None
        self._frame(head)
        if not wanted.done():
            wanted.set_result(head)
        if body and self.ended:
            self._closes = True  # what comes behind an answer is none of the next
        elif body:
            self.data_received(body)

    def _frame(self, head: Head) -> None:
        """Find out how the body ends (RFC 9112, 6.3)."""
        self._framed, self._closes = True, head.closes
        if self._bodiless or head.status in (204, 304):
            self.ended = True
        elif (coding := head.names.get(b"transfer-encoding")) is None and head.length >= 0:
            self._left = head.length
            self.ended = not self._left
        elif coding is not None and coding.lower().endswith(b"chunked"):
            self._chunks = Chunks()
        else:
            self._closes, self._framed = True, False
