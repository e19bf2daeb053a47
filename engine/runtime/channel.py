"""Channels: how actors, and processes, hand each other messages.

In one event loop a channel is a `Sender` and a `Receiver`, which hand the struct over uncopied. Between
processes it is `Frames`: each message one frame, a 4-byte little-endian length and then msgpack.
Both sides have `send` and async iteration, so an actor does not know which it holds. A request passes several
channels, so neither end gives up its turn of the event loop without need: a sender waits where there is no room, a
receiver where there is nothing, and after `AT_ONCE` messages in a row.

What happens when a channel is full: a memory channel of bounded size and a socket both make the
sender wait. The channels on a request's way in (`open_channel`) are sized by admission instead: the
front opens a limited number of requests and each sends at most three messages, so a sender there never
waits, and no cycle of full channels can form between scheduler and detokenizer.
"""

import asyncio
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

HEADER = 4
MAX_FRAME = 1 << 28
AT_ONCE = 16  # messages that a receiver takes before others have their turn


class Outbox(Protocol[T_contra]):
    """The sending end; `send` waits while the channel is full."""

    async def send(self, item: T_contra, /) -> None: ...


class _Held(Generic[T]):
    """What is in one channel, and who waits for what."""

    __slots__ = ("capacity", "items", "receiver", "senders")

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.items: deque[T] = deque()
        self.receiver: asyncio.Future[None] | None = None
        self.senders: deque[asyncio.Future[None]] = deque()


class Sender(Generic[T]):
    """The end of a channel that messages are put into."""

    __slots__ = ("_held",)

    def __init__(self, held: _Held[T]) -> None:
        self._held = held

    @property
    def fill(self) -> tuple[int, int]:
        """How many messages are in the channel, and how many it holds; 0 if admission bounds them."""
        held = self._held
        return len(held.items), 0 if held.capacity == math.inf else int(held.capacity)

    async def send(self, item: T) -> None:
        """Put `item` in, once there is room."""
        held = self._held
        while len(held.items) >= held.capacity:
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            held.senders.append(room)
            try:
                await room
            except BaseException:
                if room.done() and not room.cancelled():  # there was room, for the next one now
                    _wake(held)
                raise
        self.send_nowait(item)

    def send_nowait(self, item: T) -> None:
        """Put `item` in. Raises anyio.WouldBlock where there is no room."""
        held = self._held
        if len(held.items) >= held.capacity:
            raise anyio.WouldBlock
        held.items.append(item)
        if (receiver := held.receiver) is not None and not receiver.done():
            receiver.set_result(None)


class Receiver(Generic[T]):
    """The end of a channel that messages are taken from, by one task at a time."""

    __slots__ = ("_held", "_in_a_row")

    def __init__(self, held: _Held[T]) -> None:
        self._held = held
        self._in_a_row = 0

    def __len__(self) -> int:
        """How many messages are waiting to be taken."""
        return len(self._held.items)

    @property
    def capacity(self) -> int:
        """How many messages the channel holds; 0 if admission bounds them."""
        return 0 if self._held.capacity == math.inf else int(self._held.capacity)

    def __aiter__(self) -> "Receiver[T]":
        return self

    async def __anext__(self) -> T:
        return await self.receive()

    async def receive(self) -> T:
        """The next message, once there is one."""
        held = self._held
        self._in_a_row += 1
        if self._in_a_row > AT_ONCE and held.items:
            self._in_a_row = 0
            await asyncio.sleep(0)
        while not held.items:
            assert held.receiver is None, "one task receives"
            self._in_a_row = 0
            held.receiver = asyncio.get_running_loop().create_future()
            try:
                await held.receiver
            finally:
                held.receiver = None
        return self.receive_nowait()

    def receive_nowait(self) -> T:
        """The next message. Raises anyio.WouldBlock where there is none."""
        held = self._held
        if not held.items:
            raise anyio.WouldBlock
        item = held.items.popleft()
        if held.senders:
            _wake(held)
        return item


def _wake(held: _Held[Any]) -> None:
    """Let the first sender go on that still waits."""
    while held.senders:
        if not (room := held.senders.popleft()).done():
            room.set_result(None)
            return


def channel(capacity: float) -> tuple[Sender[Any], Receiver[Any]]:
    """A channel within one event loop that holds `capacity` messages, then makes its sender wait."""
    held: _Held[Any] = _Held(capacity)
    return Sender(held), Receiver(held)


def open_channel() -> tuple[Sender[Any], Receiver[Any]]:
    """A channel whose senders never wait, because admission bounds what they send (see above)."""
    return channel(math.inf)


def received(inbox: Receiver[T], first: T) -> list[T]:
    """`first` and whatever else already waits in `inbox`, in order, without waiting for more."""
    batch = [first]
    while inbox:
        batch.append(inbox.receive_nowait())
    return batch


def pack(encoder: msgspec.msgpack.Encoder, message: Any) -> bytes:
    """One frame. Most are short, so a copy costs less than making room for the length first."""
    body = encoder.encode(message)
    return len(body).to_bytes(HEADER, "little") + body


def frame_length(header: bytes | bytearray) -> int:
    length = int.from_bytes(header[:HEADER], "little")
    if length > MAX_FRAME:
        raise ConnectionError(f"a frame of {length} bytes is over the {MAX_FRAME} byte bound: not our protocol")
    return length


class Frames(Generic[T]):
    """Frames over a connected socket, inside the event loop. Iteration ends when the peer closes."""

    def __init__(self, stream: anyio.abc.ByteStream, receives: Any) -> None:
        self._stream = stream
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._buffer = bytearray()
        self._sending = anyio.Lock()
        # Where bytes that the kernel takes at once need not pass the stream, which keeps none of its own.
        self._direct = self.sock if isinstance(stream, anyio.abc.UNIXSocketStream) else None

    async def send(self, message: Any) -> None:
        """Raises BrokenResourceError when the peer is gone."""
        await self.send_packed(pack(self._encoder, message))

    async def send_packed(self, frame: bytes) -> None:
        """As `send`, of what `pack` has made: one frame may go to several peers."""
        if self._direct is not None and not self._sending.locked():
            frame = frame[_taken(self._direct, frame) :]
            if not frame:
                return
        async with self._sending:
            await self._stream.send(frame)

    async def __aiter__(self) -> AsyncIterator[T]:
        buffer = self._buffer
        while True:
            while len(buffer) >= HEADER and len(buffer) >= HEADER + (length := frame_length(buffer)):
                yield self._first(length)  # which nothing here holds after that
            try:
                data = await self._receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
            if not data:
                return
            buffer += data

    def _first(self, length: int) -> T:
        """The message of `length` bytes that the buffer begins with."""
        frame = memoryview(self._buffer)[HEADER : HEADER + length].tobytes()
        del self._buffer[: HEADER + length]
        return self._decoder.decode(frame)

    async def _receive(self) -> bytes:
        """What has come; nothing at the end. A Unix socket is read here, because anyio's stream lets the event loop
        report an invalid state where it is cancelled in the turn in which bytes come."""
        sock = self._direct
        if sock is None:
            return await self._stream.receive(1 << 18)
        await anyio.lowlevel.checkpoint()
        while True:
            try:
                return sock.recv(1 << 18)
            except BlockingIOError:
                await anyio.wait_readable(sock)
            except OSError:
                return b""

    @property
    def sock(self) -> socket.socket:
        """What they travel over."""
        found: socket.socket = self._stream.extra(anyio.abc.SocketAttribute.raw_socket)
        return found

    async def aclose(self) -> None:
        self._wake_reader()
        await self._stream.aclose()

    async def abort(self) -> None:
        """Close at once: a peer that is out of reach takes nothing more."""
        self._wake_reader()
        await anyio.aclose_forcefully(self._stream)

    def _wake_reader(self) -> None:
        """Whoever waits for more is told that there is none."""
        if self._direct is not None and self._direct.fileno() >= 0:
            anyio.notify_closing(self._direct)


def _taken(sock: socket.socket, frame: bytes) -> int:
    """How many bytes of `frame` the kernel takes now; none where it fails, which who sends the rest is told."""
    try:
        return sock.send(frame)
    except OSError:
        return 0


class BlockingFrames(Generic[T]):
    """The same frames for a process that has no event loop: the device worker. Any thread may send."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Raises ConnectionError when the peer is gone, or out of reach."""
        with self._sending, _as_connection_error():
            self._socket.sendall(pack(self._encoder, message))

    def receive(self) -> T | None:
        """The next message; None once the peer has closed. Raises ConnectionError where it is out of reach."""
        header = self._exactly(HEADER)
        body = header and self._exactly(frame_length(header))
        return self._decoder.decode(body) if body else None

    def waiting(self, seconds: float = 0.0) -> bool:
        """Whether `receive` would return at once (a frame has begun to arrive, or the peer closed), now or, if not,
        after `seconds`: poll itself can wait for no less than a millisecond."""
        if seconds and not self._poll.poll(0):
            time.sleep(seconds)
        return bool(self._poll.poll(0))

    def _exactly(self, count: int) -> bytearray | None:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            with _as_connection_error():
                got = self._socket.recv_into(view)
            if not got:
                return None
            view = view[got:]
        return data


@contextmanager
def _as_connection_error() -> Iterator[None]:
    """The system has several errors for a host that cannot be reached, such as TimeoutError."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise ConnectionError(str(error)) from error
