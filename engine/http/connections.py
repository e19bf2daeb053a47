"""Connections: how many there may be, and how long a client may take over what is no body.

aiohttp's protocol ends idle connections and nothing else: a head may come as slowly as it likes, and as many
connections are taken as there are descriptors. `Connection` is that protocol with these deadlines:

| waiting for | at most | then |
|---|---|---|
| the rest of a head, from its first byte | `read_timeout` | 408, closed |
| the next request, or the first | `KEEP_ALIVE_SECONDS` | closed |
| the client to take a byte of an answer | `write_timeout` | closed by the kernel (Linux) |

An ordinary request costs nothing here: it comes in one piece, and a timer is set only for a head that does not.
Left out: bodies (`intake`), and limits by client, which a proxy in front does well.
"""

import asyncio
import logging
import math
import os
import resource
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Final, cast

from aiohttp import web
from msgspec import Struct

from engine.errors import ConfigError, counted
from engine.http.half_closed import HalfClosed
from engine.http.listening import BACKLOG
from engine.http.request_id import HEADER, new_id
from engine.http.wire import error_object, json_response, to_json
from engine.options.listening import ListenOptions
from engine.runtime.board import Board, Counter

MOST_CONNECTIONS: Final = 4096  # unless the limit of open files is lower
RESERVED_FILES: Final = 256  # descriptors for all else: workers, compilers, files, connections that are refused
LINGERING: Final = 64  # refused connections that are waited for
KEEP_ALIVE_SECONDS: Final = 75.0
LINGER_SECONDS: Final = 2.0  # what a client that was answered before its request was whole gets to take the answer
BODY_LINGER_SECONDS: Final = 10.0  # the same, after the head: aiohttp reads on, and drops what comes
READ_BYTES: Final = 16 * 2**10  # of a body that nobody reads yet, twice as much is parsed, or 1024 chunks


async def listen(
    server: web.Server,
    options: ListenOptions,
    count_error: Callable[[int], None],
    *,
    board: Board | None = None,
    sockets: Sequence[socket.socket] = (),
    passage: str = "",
) -> "Listener":
    """Accept connections to `server` at the host and port of `options`, or those to `sockets`, if there are some;
    `count_error` gets the statuses of refusals. The limit is one of all fronts together, whose connections are on the
    `board`. What other fronts pass on (`passing`) comes to the Unix socket `passage`; no limit counts that.

    Raises ConfigError if there are too few descriptors, and OSError if the address cannot be listened on.
    """
    most, backlog = connection_limits(options.max_connections, each=2 if passage else 1)
    loop = asyncio.get_running_loop()
    door = Door(server, options, count_error, most=most, board=board)
    made, servers = partial(Connection, door), []
    if not sockets:
        servers = [await loop.create_server(made, options.host, options.port, backlog=backlog)]
    for each in sockets:
        servers.append(await loop.create_server(made, sock=each, backlog=backlog))
    if passage:
        with suppress(FileNotFoundError):
            os.unlink(passage)  # of the front before this one
        inner = Door(server, options, count_error)
        servers.append(await loop.create_unix_server(partial(Connection, inner), passage, backlog=backlog))
    return Listener(servers)


class Listener:
    """Servers that accept: one, or one for each socket."""

    def __init__(self, servers: Sequence[asyncio.Server]) -> None:
        self._servers = servers

    @property
    def port(self) -> int:
        """Where the first of them listens."""
        return int(self._servers[0].sockets[0].getsockname()[1])

    def close(self) -> None:
        """Accept nothing more."""
        for server in self._servers:
            server.close()


def connection_limits(asked: int | None, each: int = 1) -> tuple[int, int]:
    """How many connections are open at most, and how many wait to be accepted; raises the soft limit of open files
    if it must and can. ConfigError if `asked` connections do not fit.

    Each takes a descriptor, or two where its request may be passed on to another front, or come from there.
    A loop accepts all that wait before the first of them is looked at, so both share the descriptors.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = 2**31  # what infinity, a negative number here, stands for
    files = endless if soft == resource.RLIM_INFINITY else soft
    needed = (asked or MOST_CONNECTIONS) * each + BACKLOG + RESERVED_FILES
    if files < needed:
        files = min(needed, endless if hard == resource.RLIM_INFINITY else hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    backlog = min(BACKLOG, files // 4)
    others = backlog + min(RESERVED_FILES, files // 2)
    room = (files - others) // each
    if asked is not None and asked > room:
        raise ConfigError(
            f"--max-connections is {asked}, but this process may open {files} files, of which {others} are for other "
            f"uses{', and a connection of one of several fronts takes two' * (each > 1)}; ask for at most {room}, or "
            "raise the limit of open files (ulimit -n)"
        )
    return min(asked or MOST_CONNECTIONS, room), backlog


class Refusal(Struct, frozen=True):
    """What a client is told where there is no request to answer."""

    status: int
    code: str
    message: str
    headers: dict[str, str] = {}

    def answer(self) -> bytes:
        """A whole answer, with an id of its own."""
        body = to_json(error_object(self.message, status=self.status, code=self.code))
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), HEADER: new_id()}
        fields |= {"Connection": "close"} | self.headers
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n{head}\r\n".encode() + body


class Door:
    """What the connections of one server share: their limits, and how many there are at all fronts."""

    def __init__(
        self,
        server: web.Server,
        options: ListenOptions,
        count_error: Callable[[int], None],
        *,
        most: float = math.inf,
        board: Board | None = None,
    ) -> None:
        self.server = server
        self.most = most
        self.board = board or Board()
        self.count_error = count_error
        self.read_timeout = options.read_timeout
        self.write_timeout = options.write_timeout
        self.lingering = 0  # refused, and not closed yet
        # What aiohttp would log is what clients send that is not HTTP; `shape_errors` logs all that is ours.
        self.logger = logging.Logger("engine.http", logging.CRITICAL)
        self.full = Refusal(
            503,
            "too_many_connections",
            f"the server has {counted(most, 'connection')} open, the most that it takes (--max-connections); try again "
            "later",
            {"Retry-After": "1"},
        )
        self.late = Refusal(
            408,
            "request_timeout",
            f"the head of the request took longer than {options.read_timeout:g} seconds; send it again, faster",
        )


class Connection(HalfClosed):
    """aiohttp's protocol, with a limit on connections and a deadline for heads; one that is half closed is answered."""

    __slots__ = ("_admitted", "_door", "_timer")

    def __init__(self, door: Door) -> None:
        super().__init__(
            door.server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            lingering_time=min(BODY_LINGER_SECONDS, door.read_timeout),
            read_bufsize=READ_BYTES,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]
            logger=door.logger,
        )
        self._door = door
        self._admitted = False
        self._timer: asyncio.TimerHandle | None = None  # of a head that is not whole, or of a client that lingers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or answer 503 where there are too many already."""
        door = self._door
        if door.board.total(Counter.CONNECTIONS) < door.most:
            self._admitted = True
            door.board.add(Counter.CONNECTIONS)
            _bound_writing(transport, door.write_timeout)
            super().connection_made(transport)
            return
        door.count_error(503)
        door.lingering += 1
        self.transport = cast(asyncio.Transport, transport)
        door.server.connection_made(self, self.transport)  # so that the server's end closes it too
        self._end(door.full.answer(), linger=door.lingering <= LINGERING)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The socket is closed."""
        self._disarm()
        if self._admitted:
            self._door.board.add(Counter.CONNECTIONS, -1)
        else:
            self._door.lingering -= 1
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: nothing is left to do unless a whole request is being answered."""
        return self._admitted and self._timer is None and super().eof_received()

    def data_received(self, data: bytes) -> None:
        """Parse, and see to it that a head that has begun is whole in time."""
        super().data_received(data)
        waiter = self._waiter  # None while a request is handled, and before the connection's task has begun
        if not (self._request_count if waiter is None else waiter.done()):  # no head is whole yet
            if data and self._timer is None and not self._close:
                self._timer = self._loop.call_later(self._door.read_timeout, self._head_is_late)
                # An idle connection may be about to be closed; this one is not idle.
                self._next_keepalive_close_time = self._loop.time() + self._door.read_timeout + KEEP_ALIVE_SECONDS
        elif self._timer is not None and not self._close:
            self._disarm()
        if self._messages and self._current_request is not None:
            self._end_broken_body(self._current_request)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not HTTP, in the shape of all errors."""
        plain = super().handle_error(request, status, exc, message)  # raises if an answer has begun
        self._door.count_error(status)
        if status >= 500:
            return plain
        said = f"this is not a request that can be read: {' '.join((message or '').split())}; send HTTP/1.1"
        response = json_response(error_object(said, status=status, code="invalid_http"), status=status)
        response.headers[HEADER] = new_id()
        response.force_close()
        return response

    def _end_broken_body(self, request: web.BaseRequest) -> None:
        """Tell `request` that its body cannot be parsed. aiohttp queues the error behind it, where the request, which
        waits for its body, would never let it come."""
        message = getattr(self._messages[-1][0], "message", None)  # a request has none
        if message is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError(message))

    def _head_is_late(self) -> None:
        self._timer = None
        self._door.count_error(408)
        self._end(self._door.late.answer())

    def _end(self, answer: bytes, *, linger: bool = True) -> None:
        """Send `answer` and close, but first let the client take it.

        A socket that is closed with bytes unread resets the connection, and the reset may overtake the answer: what
        comes is dropped (`close`) until the client closes, or for LINGER_SECONDS.
        """
        assert self.transport is not None
        self.transport.write(answer)
        self.close()
        if linger and self.transport.can_write_eof():
            self.transport.write_eof()
            self._timer = self._loop.call_later(LINGER_SECONDS, self.force_close)
        else:
            self.force_close()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _bound_writing(transport: asyncio.BaseTransport, seconds: float) -> None:
    """Let the kernel end a connection whose client acknowledges nothing, or takes nothing, for `seconds`."""
    sock = transport.get_extra_info("socket")
    if hasattr(socket, "TCP_USER_TIMEOUT") and sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
