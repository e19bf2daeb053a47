"""One request's body: read as it comes, unpacked in pieces, within five bounds.

| bound | what it holds | beyond it |
|---|---|---|
| size | one body, unpacked | 413, from `Content-Length` before a byte is read |
| bytes held | the bodies of all requests that are being read or decoded, at all fronts | 503 |
| bytes open | the bodies of all requests until they are over, as what is made of one grows with it | 503 |
| share | of the bytes open, those of one client that has several requests: three times what is left | 503 |
| pace | what a client must send in `read_timeout` seconds of our waiting | 408 |

The parser leaves bodies packed (`auto_decompress=False` in `connections`), because it would unpack all that one
read of the socket brings before the event loop turns. Here a piece is unpacked, the loop turns, and at most
`PIECES_A_TURN` pieces of all bodies are unpacked between two turns.

A client is an API key, or else an address. Its share is a dynamic threshold (Choudhury and Hahne 1998), of what a front
knows itself: one alone may have three quarters of the bound, and whoever comes then finds room.

A body that has come whole with its head, is small and is not packed is taken as it is: no other request of
its size would fit between its arrival and its decoding. Left out: what is in the bytes (`wire`), and deadlines
of heads (`connections`).
"""

import asyncio
import io
import zlib
from collections import Counter as Counts
from collections.abc import Iterator
from typing import Final

import anyio
from aiohttp import StreamReader, hdrs, web
from aiohttp.http import HttpVersion11

from engine.errors import RequestError, shut_down
from engine.http.half_closed import CONTINUE
from engine.http.keys import owner_of
from engine.http.repeated import joined, members
from engine.http.wire import MAX_BODY_BYTES
from engine.options.listening import ListenOptions
from engine.runtime.board import Board, Counter

SMALL_BYTES: Final = 64 * 2**10  # the largest body that is not counted if it has come whole
PIECE_BYTES: Final = 64 * 2**10  # most that is unpacked at a time: 0.1 to 0.3 ms
WINDOW_BYTES: Final = 8 * 2**10  # most that is given to zlib at a time: packed bytes may unpack to nothing, slowly
PIECES_A_TURN: Final = 4
SHARE: Final = 3  # times the bytes that are left for all: what one client's open requests may have
MAX_MEMBERS: Final = 1024  # of one gzip body: bgzip makes a member of each 64 KiB
LEAST_BYTES_A_SECOND: Final = 512  # the pace of a client that is slow, and not stalling
GZIP: Final = 31  # zlib's wbits: the format of what it unpacks
ZLIB: Final = 15
RAW_DEFLATE: Final = -15
CODINGS: Final = ("gzip", "deflate")


async def read_body(request: web.Request) -> bytes:
    """The body of `request`, unpacked.

    Its bytes count as held until `release_body`, and as open until the request has been answered.
    Raises RequestError: 400 if it is not packed as its header says, 408 if it comes too slowly, 413 if it is too
    long, 415 for a coding that is not known, 503 if too many bytes are held or open.
    """
    payload, intake = request.content, request.app[INTAKE]
    if payload.is_eof() and payload.total_bytes <= intake.small and hdrs.CONTENT_ENCODING not in request.headers:
        return payload.read_nowait()
    return await intake.read(request)


def release_body(request: web.Request) -> None:
    """The bytes of `request`'s body are decoded and no longer kept; later calls do nothing."""
    request.app[INTAKE].release(request.content)


def hand_on_body(request: web.Request) -> None:
    """The front that `request` is passed on to counts its body, and this one no longer does."""
    request.app[INTAKE].close(request.content)


class Intake:
    """The bodies that one front reads, and how many bytes of them it holds; `board` has those of all fronts."""

    def __init__(self, options: ListenOptions, board: Board | None = None) -> None:
        self._board = board or Board()
        self._most_held, self._most_open = options.max_body_memory, options.max_open_memory
        # more than all may hold would never fit
        self._most = min(MAX_BODY_BYTES, options.max_body_memory, options.max_open_memory)
        self.small = min(SMALL_BYTES, self._most)  # a body up to this size that has come whole is not counted
        self._seconds = options.read_timeout
        self._held: dict[StreamReader, int] = {}  # bytes, by the stream that a body came from
        self._open: dict[StreamReader, int] = {}  # the same, until the request is over
        self._whose: dict[StreamReader, bytes] = {}  # the client that a body came from
        self._shares: Counts[bytes] = Counts()  # open bytes of each client
        self._total = 0
        self._reading: set[StreamReader] = set()
        self._unpacking = asyncio.Semaphore(PIECES_A_TURN)

    async def read(self, request: web.Request) -> bytes:
        """As `read_body`, for a body of any kind."""
        payload, coding = request.content, _coding_of(request)
        if (request.content_length or 0) > self._most:
            raise self._too_large()
        # The task of this one request: its end is the last moment at which its body can be in use.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self.close(payload))
        self._whose[payload] = owner_of(request) or (request.remote or "").encode()
        _ask_for(request)
        self._reading.add(payload)
        try:
            return await self._whole(payload, None if coding is None else Unpacker(coding))
        finally:
            self._reading.discard(payload)

    @property
    def held(self) -> int:
        """Bytes of the bodies that are being read or decoded here."""
        return self._total

    def end(self) -> None:
        """The server ends: requests whose bodies are not whole are told so."""
        for payload in self._reading:
            payload.set_exception(shut_down())

    def release(self, payload: StreamReader) -> None:
        """Nothing of the body that came from `payload` is held any more."""
        self._count(-self._held.pop(payload, 0))

    def close(self, payload: StreamReader) -> None:
        """The request whose body came from `payload` is over here; later calls do nothing."""
        self.release(payload)
        size, client = self._open.pop(payload, 0), self._whose.pop(payload, b"")
        self._board.add(Counter.OPEN_BYTES, -size)
        self._shares[client] -= size
        if not self._shares[client]:
            del self._shares[client]

    def _count(self, size: int) -> None:
        self._total += size
        self._board.add(Counter.BODY_BYTES, size)

    async def _whole(self, payload: StreamReader, unpacker: "Unpacker | None") -> bytes:
        body, packed, pace = io.BytesIO(), 0, Pace(payload, self._seconds)
        while not payload.at_eof():
            data = await pace.next()
            if unpacker is None:
                self._keep(payload, body, data)
                continue
            packed += len(data)
            if packed > self._most:
                raise self._too_large()
            await self._unpack(unpacker, data, payload, body)
        if unpacker is not None:
            unpacker.finish()
        return body.getvalue()

    def _keep(self, payload: StreamReader, body: io.BytesIO, data: bytes) -> None:
        """Add `data` to `body` and to what is held, within both bounds."""
        held = self._held.get(payload, 0) + len(data)
        if held > self._most:
            raise self._too_large()
        if (total := self._board.total(Counter.BODY_BYTES)) + len(data) > self._most_held:
            raise _too_many(
                f"the server holds {total} bytes of request bodies and may hold {self._most_held} (--max-body-memory)"
            )
        if (total := self._board.total(Counter.OPEN_BYTES)) + len(data) > self._most_open:
            raise _too_many(
                f"open requests have bodies of {total} bytes and may have {self._most_open} (--max-open-memory)"
            )
        client, left = self._whose[payload], self._most_open - total - len(data)
        share = self._shares[client] + len(data)
        if share > held and share > SHARE * left:  # one request alone has all that there is
            raise _too_many(
                f"open requests of this API key or address have bodies of {share} bytes, and may have {SHARE} times "
                f"the {left} that are left of {self._most_open} (--max-open-memory)"
            )
        self._held[payload] = self._open[payload] = held
        self._shares[client] = share
        self._count(len(data))
        self._board.add(Counter.OPEN_BYTES, len(data))
        body.write(data)

    async def _unpack(self, unpacker: "Unpacker", data: bytes, payload: StreamReader, body: io.BytesIO) -> None:
        pieces = unpacker.pieces(data)
        while True:
            # Held over the turn of the loop: so few pieces of all bodies come between two turns.
            async with self._unpacking:
                piece = next(pieces, None)
                if piece is None:
                    return
                self._keep(payload, body, piece)
                await asyncio.sleep(0)

    def _too_large(self) -> RequestError:
        message = f"the request body is over {self._most} bytes; send a shorter one"
        return RequestError(message, code="body_too_large", status=413)


def _too_many(what: str) -> RequestError:
    return RequestError(f"{what}; send the request again later", code="too_many_bytes", status=503)


INTAKE = web.AppKey("intake", Intake)


class Pace:
    """Reads a body at its client's pace, which may be slow, but not stall.

    Time counts only while there is nothing to read, so the time that unpacking takes is not the client's. Each
    `LEAST_BYTES_A_SECOND * seconds` bytes have `seconds` of waiting; a long body that comes steadily has no
    deadline in all.
    """

    def __init__(self, payload: StreamReader, seconds: float) -> None:
        self._payload = payload
        self._seconds = self._left = seconds
        self._stretch = LEAST_BYTES_A_SECOND * seconds
        self._got = 0

    async def next(self) -> bytes:
        """What has come, once there is something or the body has ended; RequestError (408) if that takes too long."""
        if data := self._payload.read_nowait():
            # Reading lets the parser go on with what it has. That may be thousands of chunks of a byte each.
            await asyncio.sleep(0)
            return data
        return await self._wait()

    async def _wait(self) -> bytes:
        began = anyio.current_time()
        with anyio.move_on_after(self._left) as scope:
            data = await self._payload.readany()
        if scope.cancelled_caught:
            raise RequestError(
                f"of the request body, {self._payload.total_bytes} bytes have come, and too few in the last "
                f"{self._seconds:g} seconds; send it again, at {LEAST_BYTES_A_SECOND} bytes a second or faster",
                code="request_timeout",
                status=408,
            )
        self._left -= anyio.current_time() - began
        self._got += len(data)
        if self._got >= self._stretch:
            self._got, self._left = 0, self._seconds
        return data


class Unpacker:
    """A gzip or deflate body, unpacked in pieces: each `next` of an iterator of `pieces` is a bounded piece of work.

    Several members of gzip are one body (RFC 1952). `deflate` is zlib's format (RFC 9110), or bare deflate, which
    some clients send under this name. Bytes after the end that begin no other member are an error, and so is an
    end that does not come.
    """

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._stream = zlib.decompressobj(GZIP)
        self._members = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What `data`, the next bytes of the body, unpack to."""
        view = memoryview(data)
        for start in range(0, len(data), WINDOW_BYTES):
            yield from self._window(view[start : start + WINDOW_BYTES])

    def finish(self) -> None:
        """There are no more bytes: RequestError (400) if there ought to be; no bytes at all are no body."""
        if self._members and not self._stream.eof:
            raise self._broken(f"its {self._coding} data end too early")

    def _window(self, waiting: bytes | memoryview) -> Iterator[bytes]:
        full = False  # zlib may have more to give than it had room for
        while waiting or full:
            if self._stream.eof or not self._members:
                self._begin(waiting[0])
            try:
                piece = self._stream.decompress(waiting, PIECE_BYTES)
            except zlib.error as error:
                raise self._broken(f"it is not {self._coding}, as its Content-Encoding says ({error})") from None
            yield piece
            full = len(piece) == PIECE_BYTES and not self._stream.eof
            waiting = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail

    def _begin(self, first: int) -> None:
        """Make ready for a member whose first byte is `first`."""
        self._members += 1
        if self._members > 1 and self._coding != "gzip":
            raise self._broken(f"more bytes come after the end of its {self._coding} data")
        if self._members > MAX_MEMBERS:
            raise self._broken(f"it has more than {MAX_MEMBERS} gzip members")
        # zlib's header names its method, 8, in the low half of the first byte.
        deflate = ZLIB if first & 0x0F == 8 else RAW_DEFLATE
        self._stream = zlib.decompressobj(GZIP if self._coding == "gzip" else deflate)

    def _broken(self, what: str) -> RequestError:
        message = f"the request body cannot be read: {what}; check how it is encoded"
        return RequestError(message, code="invalid_body")


async def without_expecting(request: web.Request) -> None:
    """aiohttp's place to answer `Expect`, which is before anybody has looked at the request; `read_body` does it."""


def _ask_for(request: web.Request) -> None:
    """Tell a client that waits with its body that it is wanted. Other expectations mean nothing here (RFC 9110)."""
    expected = "100-continue" in members(request.headers, hdrs.EXPECT)
    waits = expected and not request.content.total_bytes
    if waits and request.version >= HttpVersion11 and request.transport is not None:
        request.transport.write(CONTINUE)


def _coding_of(request: web.Request) -> str | None:
    """How the body is packed, or None; RequestError (415) for what is not known here."""
    given = joined(request.headers, hdrs.CONTENT_ENCODING)
    coding = given.strip().lower().removeprefix("x-")  # x-gzip is an old name of gzip (RFC 9110)
    if coding in ("", "identity"):
        return None
    if coding in CODINGS:
        return coding
    message = f"the Content-Encoding {given[:80]!r} is not known here; send the body as it is, or as gzip or deflate"
    raise RequestError(message, code="unsupported_encoding", status=415)
