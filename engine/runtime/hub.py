"""The hub: stands between the core and several front processes, and knows which message is whose.

    scheduler ──Tokens, Failed, Answer──> hub ──> the line of the front whose request or question it is
              ──Stats, WorkerReady, Fatal──>  ──> all lines
    front ──Admit, Abort, StopHit, …──> hub ──> scheduler
          ──PeerAsk──> all other lines, whose PeerAnswers come back as one

The core waits for a front that is behind and still reads, as it does for one that is alone, and so holds the device
back. It never waits for one that does not read: what that is sent is kept, and who runs the fronts ends it (fronts.py).
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from socket import socket
from typing import Any, Protocol

import anyio
import msgspec

from engine.messages import FromFrontProcess, ToFront
from engine.messages.control import Answer, Fatal, Stats, WorkerReady
from engine.messages.fronts import Drained, FrontLost, Listening, PeerAnswer, PeerAnswers, PeerAsk, PeerValue, Refused
from engine.messages.reply import Failed, Tokens
from engine.runtime.channel import Outbox, pack
from engine.runtime.readiness import Readiness
from engine.sched.fronts import front_of, front_of_number

ENOUGH = 1 << 20  # bytes that a line keeps before the core waits for its front
PATIENCE = 1.0  # seconds without a byte taken after which the core does not wait
ANSWER_SECONDS = 5.0  # that fronts get to answer each other
MOST_SENT = 1 << 18  # bytes of one call


class Line(Protocol):
    """The way to one front."""

    @property
    def holds_back(self) -> bool: ...
    def put(self, frame: bytes, /) -> None: ...
    async def room(self) -> None: ...


class SocketLine:
    """Sends frames to a socket at once, and keeps what that does not take."""

    def __init__(self, sock: socket) -> None:
        self.kept = 0  # bytes
        self.moved = time.monotonic()  # when it last took any
        self._sock = sock
        self._frames: deque[memoryview] = deque()
        self._loop = asyncio.get_running_loop()
        self._less = asyncio.Event()
        self._closed = False

    def put(self, frame: bytes) -> None:
        """Send `frame` after all that is kept."""
        if self._closed:
            return
        left = memoryview(frame)
        if not self._frames:
            left = left[self._sent(left) :]
            if not left or self._closed:
                return
            self._loop.add_writer(self._sock, self._writable)
        self._frames.append(left)
        self.kept += len(left)

    def _sent(self, data: memoryview | bytes) -> int:
        """How many bytes of `data` the socket takes now."""
        try:
            count = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # who reads sees the end of the stream
            self.close()
            return 0
        self.moved = time.monotonic()
        return count

    def _writable(self) -> None:
        """The socket takes more."""
        batch, size = [self._frames[0]], len(self._frames[0])
        for frame in list(self._frames)[1:64]:
            if size > MOST_SENT:
                break
            batch.append(frame)
            size += len(frame)
        sent = self._sent(batch[0] if len(batch) == 1 else b"".join(batch))
        if self._closed:
            return
        self.kept -= sent
        while sent:
            first = self._frames.popleft()
            if sent < len(first):
                self._frames.appendleft(first[sent:])
                break
            sent -= len(first)
        if not self._frames:
            self._loop.remove_writer(self._sock)
        self._less.set()

    @property
    def holds_back(self) -> bool:
        """Whether the core is to wait for this front."""
        return self.kept > ENOUGH and time.monotonic() - self.moved < PATIENCE

    async def room(self) -> None:
        """Wait until the core need wait no longer."""
        while self.holds_back:
            self._less.clear()
            with anyio.move_on_after(PATIENCE):
                await self._less.wait()

    def close(self) -> None:
        """Send nothing more."""
        if not self._closed:
            self._closed = True
            if self._frames:
                self._loop.remove_writer(self._sock)
            self._frames.clear()
            self.kept = 0
            self._less.set()


class Question:
    """What one front has asked the others: whose answers are still to come, and those that came."""

    def __init__(self, asked: PeerAsk, others: set[int]) -> None:
        self.asked = asked
        self.missing = others
        self.values: dict[int, bytes] = {}


class Hub(Readiness):
    """Joins `count` fronts to the scheduler."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.on_stats: list[Callable[[Stats], None]] = []
        self.scheduler: Outbox[Any] | None = None  # once there is one
        self._stats: Stats | None = None
        self._lines: dict[int, Line] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._questions: dict[tuple[int, int], Question] = {}

    # ── from the core ────────────────────────────────────────────────────────────────────────

    async def send(self, message: ToFront) -> None:
        """Pass on what the scheduler says."""
        match message:
            case Tokens():
                await self._put(front_of(message.rids[0]), message)
            case Failed():
                await self._put(front_of(message.rid), message)
            case Answer():
                await self._put(front_of_number(message.number), message)
            case _:
                self._note(message)
                self.to_all(message)

    async def _put(self, front: int, message: ToFront) -> None:
        line = self._lines.get(front)
        if line is not None:  # else nobody waits for it any more
            line.put(pack(self._encoder, message))
            if line.holds_back:
                await line.room()

    def _note(self, message: Stats | WorkerReady | Fatal) -> None:
        match message:
            case Stats():
                self._stats = message
                for listener in self.on_stats:
                    listener(message)
            case WorkerReady():
                self.info = message
                self._changes.tell()
            case Fatal():
                self.failure = self.failure or f"the {message.actor} cannot go on: {message.cause}"
                self._changes.tell()

    # ── fronts ───────────────────────────────────────────────────────────────────────────────

    def to_all(self, message: Any) -> None:
        """Send `message` to every front that is there."""
        frame = pack(self._encoder, message)
        for line in self._lines.values():
            line.put(frame)

    def join(self, front: int, line: Line) -> None:
        """`front` is there, and is told what the others know."""
        self._lines[front] = line
        for message in (self._stats, self.info):
            if message is not None:
                line.put(pack(self._encoder, message))

    async def leave(self, front: int) -> None:
        """`front` is gone: the scheduler ends its requests, and nobody waits for its answers."""
        if self._lines.pop(front, None) is None:
            return
        for key, question in list(self._questions.items()):
            if question.asked.asker == front:
                del self._questions[key]
            else:
                self._answered(key, front, None)
        await self._to_scheduler(FrontLost(front))

    async def take(self, front: int, message: FromFrontProcess) -> None:
        """Pass on what `front` says."""
        match message:
            case PeerAsk():
                self._ask(front, message)
            case PeerAnswer():
                self._answered((message.asker, message.number), front, message.value)
            case Listening() | Drained() | Refused():
                raise AssertionError(f"{message} is for who runs the fronts")
            case _:
                await self._to_scheduler(message)

    async def _to_scheduler(self, message: Any) -> None:
        assert self.scheduler is not None, "a front speaks before there is a core"
        await self.scheduler.send(message)

    # ── what fronts ask each other ───────────────────────────────────────────────────────────

    def _ask(self, front: int, asked: PeerAsk) -> None:
        key = front, asked.number
        others = self._lines.keys() - {front}
        self._questions[key] = Question(asked, set(others))
        frame = pack(self._encoder, asked)
        for other in others:
            self._lines[other].put(frame)
        if others:
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._close, key)
        else:
            self._close(key)

    def _answered(self, key: tuple[int, int], front: int, value: bytes | None) -> None:
        """`front` has answered, with None if it has nothing to say."""
        question = self._questions.get(key)
        if question is None or front not in question.missing:
            return
        question.missing.discard(front)
        if value is not None:
            question.values[front] = value
        if not question.missing:
            self._close(key)

    def _close(self, key: tuple[int, int]) -> None:
        """Give whoever asked what has come."""
        question, line = self._questions.pop(key, None), self._lines.get(key[0])
        if question is not None and line is not None:
            values = tuple(PeerValue(front, question.values[front]) for front in sorted(question.values))
            line.put(pack(self._encoder, PeerAnswers(key[1], values)))
