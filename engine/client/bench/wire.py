"""HTTP/1.1 as the load generator reads it: a clock read and an append for what one read of the socket brought.

    Connection.ask(request) -> Answer: the pieces as they came -> Answer.payloads(): the body, once the load is over

The end of a body is seen in its last bytes; chunks and events are taken apart later, so that the client does not
measure itself. Left out: redirects, compressed answers, trailers, several requests on their way on one connection.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import TypeVar, cast
from urllib.parse import urlsplit

from msgspec import Struct

from engine.errors import ConfigError, WorkerError

HEAD_END = b"\r\n\r\n"
CHUNKS_END = b"\r\n0\r\n\r\n"
Made = TypeVar("Made", bound=asyncio.Protocol)
Piece = tuple[float, bytes]  # when it came (perf_counter), and what


class Address(Struct, frozen=True):
    """Where a server listens, of a URL like http://host:port/prefix."""

    host: str
    port: int
    prefix: str
    secure: bool

    @classmethod
    def of(cls, url: str, option: str = "--url") -> "Address":
        """Raises ConfigError, which names `option`, for what is no such URL."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:  # brackets that do not close, a port that is none
            host = port = None
        if not host or parts.scheme not in ("http", "https"):
            raise ConfigError(f"{option} is {url!r}, but takes http://host:port or https://host:port")
        secure = parts.scheme == "https"
        return cls(host, port or (443 if secure else 80), parts.path.rstrip("/"), secure)

    def request(self, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        """The bytes of a POST."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"POST {self.prefix}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join(lines).encode() + HEAD_END + body


async def connected(make: Callable[[], Made], address: Address, seconds: float | None = None) -> Made:
    """What `make` makes, with a connection. Raises WorkerError where nobody listens, or answers in so many seconds."""
    secure = ssl.create_default_context() if address.secure else None
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            _, made = await loop.create_connection(make, address.host, address.port, ssl=secure)
    except OSError as error:  # TimeoutError is one
        said = error.strerror or type(error).__name__
        raise WorkerError(f"{address.host}:{address.port} takes no connection: {said}") from None
    return made


def joined(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """`headers` by names in lower case; the values of one name are one list (RFC 9110, 5.3)."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        low = name.lower()
        found[low] = b"%b, %b" % (found[low], value) if low in found else value
    return found


class Answer:
    """What a server answered. `status` is 0 until the head has come."""

    def __init__(self, done: "asyncio.Future[None]") -> None:
        self.status = 0
        self.chunked = False
        self.pieces: list[Piece] = []  # of the body
        self.done = done

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.payloads())

    def payloads(self) -> Iterator[Piece]:
        """The body in the order in which it came, without the marks of its chunks."""
        return _unchunked(self.pieces) if self.chunked else iter(self.pieces)


class Connection(asyncio.Protocol):
    """One connection. It may ask again once an answer has come whole, while `open`."""

    def __init__(self) -> None:
        self.open = False
        self.used = False  # whether it had an answer
        self._answer: Answer | None = None
        self._head = b""
        self._left: int | None = None  # bytes of a body of known length that are still to come
        self._closes = False

    @classmethod
    async def to(cls, address: Address) -> "Connection":
        """Raises WorkerError where nobody listens."""
        return await connected(cls, address)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.open = True

    def ask(self, request: bytes) -> Answer:
        """Send `request`; the answer's `done` ends with its last byte, or raises WorkerError."""
        self._answer = answer = Answer(asyncio.get_running_loop().create_future())
        self._head, self._left, self._closes = b"", None, False
        self._transport.write(request)
        return answer

    def close(self) -> None:
        self.open = False
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if (answer := self._answer) is None:  # nothing was asked
            self.close()
        elif answer.status:
            answer.pieces.append((perf_counter(), data))
            if answer.chunked:
                if data.endswith(CHUNKS_END) or (len(data) < len(CHUNKS_END) and _ends(answer.pieces)):
                    self._end(answer)
            elif self._left is not None:
                self._left -= len(data)
                if self._left <= 0:
                    self._end(answer)
        else:
            self._take_head(answer, data)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if (answer := self._answer) is None:
            return
        if answer.status and not answer.chunked and self._left is None:  # its end is that of the connection
            self._end(answer)
            return
        self._answer = None
        if not answer.done.done():
            when = "before its reply ended" if answer.status else "before it answered"
            answer.done.set_exception(WorkerError(f"the server closed the connection {when}"))

    def _take_head(self, answer: Answer, data: bytes) -> None:
        head, found, body = (self._head + data).partition(HEAD_END)
        if not found:
            self._head = head
            return
        first, *lines = head.lower().split(b"\r\n")
        fields = joined((name.strip(), value.strip()) for name, _, value in (line.partition(b":") for line in lines))
        answer.chunked = b"chunked" in fields.get(b"transfer-encoding", b"")
        self._closes = b"close" in fields.get(b"connection", b"")
        if not answer.chunked and (length := fields.get(b"content-length", b"")).isdigit():
            self._left = int(length)
        word = first.split(b" ")[1:2]
        answer.status = int(word[0]) if word and word[0].isdigit() else 502
        if body or self._left == 0:
            self.data_received(body)

    def _end(self, answer: Answer) -> None:
        self._answer = None
        self.used = True
        if not answer.done.done():
            answer.done.set_result(None)
        if self._closes:
            self.close()


def _ends(pieces: list[Piece]) -> bool:
    """Whether the last of several short pieces is the end of a body in chunks. A body may have no more than that end,
    behind the head."""
    tail = b"".join(data for _, data in pieces[-len(CHUNKS_END) :])
    return tail.endswith(CHUNKS_END) or tail == CHUNKS_END[2:]


def _unchunked(pieces: list[Piece]) -> Iterator[Piece]:
    """The payload of each piece. Raises WorkerError for what are no chunks."""
    rest = b""
    left = 0  # bytes of the chunk still to come, with the two that end its line
    for at, data in pieces:
        data, place, found = rest + data, 0, []
        while place < len(data):
            if not left:
                end = data.find(b"\r\n", place)
                if end < 0:
                    break
                left = _size(data[place:end]) + 2
                place = end + 2
            part = data[place : place + left]
            place += len(part)
            left -= len(part)
            found.append(part[: len(part) - max(0, 2 - left)])
        rest = data[place:]
        yield at, b"".join(found)


def _size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise WorkerError(f"the server's reply has {line[:40]!r} where the size of a chunk belongs") from None
