"""Channels: how actors, and processes, hand each other messages.

In one event loop a channel is an anyio memory stream and hands the struct over uncopied. Between
processes it is `Frames`: each message one frame, a 4-byte little-endian length and then msgpack.
Both sides have `send` and async iteration, so an actor does not know which it holds.

What happens when a channel is full: a memory channel of bounded size and a socket both make the
sender wait. The channels on a request's way in (`open_channel`) are sized by admission instead: the
front opens a limited number of requests and each sends at most three messages, so a sender there never
waits, and no cycle of full channels can form between scheduler and detokenizer.
"""

import math
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import anyio
import anyio.abc
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

HEADER = 4
MAX_FRAME = 1 << 28


class Outbox(Protocol[T_contra]):
    """The sending end; `send` waits while the channel is full."""

    async def send(self, item: T_contra, /) -> None: ...


def channel(capacity: int) -> tuple[MemoryObjectSendStream[Any], MemoryObjectReceiveStream[Any]]:
    """A channel within one event loop that holds `capacity` messages, then makes its sender wait."""
    return anyio.create_memory_object_stream[Any](capacity)


def open_channel() -> tuple[MemoryObjectSendStream[Any], MemoryObjectReceiveStream[Any]]:
    """A channel whose senders never wait, because admission bounds what they send (see above)."""
    return anyio.create_memory_object_stream[Any](math.inf)


def received(inbox: "MemoryObjectReceiveStream[T]", first: T) -> list[T]:
    """`first` and whatever else already waits in `inbox`, in order, without waiting for more."""
    batch = [first]
    while True:
        try:
            batch.append(inbox.receive_nowait())
        except (anyio.WouldBlock, anyio.EndOfStream):
            return batch


def pack(encoder: msgspec.msgpack.Encoder, message: Any) -> bytearray:
    """One frame. Encoded in place behind room for the length: no second copy."""
    frame = bytearray(HEADER)
    encoder.encode_into(message, frame, HEADER)
    frame[:HEADER] = (len(frame) - HEADER).to_bytes(HEADER, "little")
    return frame


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

    async def send(self, message: Any) -> None:
        """Raises BrokenResourceError when the peer is gone."""
        await self.send_packed(bytes(pack(self._encoder, message)))

    async def send_packed(self, frame: bytes) -> None:
        """As `send`, of what `pack` has made: one frame may go to several peers."""
        async with self._sending:
            await self._stream.send(frame)

    async def __aiter__(self) -> AsyncIterator[T]:
        buffer = self._buffer
        while True:
            while len(buffer) >= HEADER and len(buffer) >= HEADER + (length := frame_length(buffer)):
                message = self._decoder.decode(memoryview(buffer)[HEADER : HEADER + length].tobytes())
                del buffer[: HEADER + length]
                yield message
            try:
                buffer += await self._stream.receive(1 << 18)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return

    @property
    def sock(self) -> socket.socket:
        """What they travel over."""
        found: socket.socket = self._stream.extra(anyio.abc.SocketAttribute.raw_socket)
        return found

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def abort(self) -> None:
        """Close at once: a peer that is out of reach takes nothing more."""
        await anyio.aclose_forcefully(self._stream)


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
