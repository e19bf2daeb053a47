"""Streams of replies: what a step says is written to its client in that step, and no task is woken for it.

    mailbox ──> Choice: bytes of the event ──> the connection's transport
                   └──> gathered, while the client takes nothing ──> the handler, once it does

A handler sends the first events itself, through aiohttp, so that a request that is refused at once is still answered
with its own status. Then it sleeps, and each choice writes its events where they are made, in chunks of HTTP/1.1. It is
woken at the end, by an error, or when the client is slow: the transport holds as much as it may, so what comes is
gathered, merged into one event, and written once the client has taken the rest. So memory is bounded by the length of
the reply, and no other connection notices. Left out: how an API words events (`Events`), and streams that are not made
of mailboxes (`sse.send_events`).
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec
from aiohttp import web
from aiohttp.http import StreamWriter

from engine.errors import Words
from engine.http.sse import HEADERS, failure_event, words_of
from engine.http.turns import TURNS, Turns
from engine.http.wire import to_json
from engine.messages.reply import Chunk
from engine.runtime.mailbox import Gathered, Mailbox

Around = tuple[bytes, bytes]  # what stands before and after the JSON of a text


class Events(Protocol):
    """How one API words the numbered choices of an answer."""

    def event(self, part: tuple[int, Chunk], /) -> bytes:
        """Bytes to write for a part of a choice: no event, one or several, whole."""

    def plain(self, index: int, /) -> Around | None:
        """The event of the text of plain tokens of choice `index` from now on, until `event` is called for it again;
        None where `event` must see them."""


class Heads(dict[int, bytes]):
    """What is written before the JSON of a text, by its length: the head of a chunk of HTTP/1.1, where there is one,
    and the beginning of the event."""

    def __init__(self, around: Around, *, chunked: bool) -> None:
        self._before, after = around
        self._rest = len(self._before) + len(after)
        self._chunked = chunked

    def __missing__(self, length: int) -> bytes:
        head = b"%x\r\n" % (self._rest + length) if self._chunked else b""
        self[length] = head + self._before
        return self[length]


class EventStream(web.StreamResponse):
    """An answer whose head goes out with its first events, in one write."""

    _send_headers_immediately = False

    def __init__(self) -> None:
        super().__init__(headers=HEADERS)


class Choice(Gathered):
    """Takes one reply, and writes its events or gathers what they will be of."""

    __slots__ = ("_heads", "_index", "_stream", "_tail", "around", "waits")

    def __init__(self, stream: "Stream", index: int) -> None:
        super().__init__()
        self._stream = stream
        self._index = index
        self.around: Around | None = None  # of plain tokens
        self._heads: Heads | None = None  # the same, where they are written from here
        self._tail = b""
        self.waits = False  # for the handler, with what is gathered

    def tokens(self, text: str, ids: list[int], now: float) -> None:
        """Plain tokens."""
        stream = self._stream
        if (transport := stream.transport) is None or (heads := self._heads) is None:
            super().tokens(text, ids, now)
            stream.told(self)
            return
        if (watch := self.watch) is not None:
            watch.tokens(len(ids), now)
        self._tokens += len(ids)
        if text:
            self._say(text, transport, heads)

    def _say(self, text: str, transport: asyncio.Transport, heads: Heads) -> None:
        """Write the event of a text."""
        stream = self._stream
        said = to_json(text)
        if transport.is_closing():
            stream.fail(ConnectionResetError("the client has left"))
            return
        transport.write(b"".join((heads[len(said)], said, self._tail)))
        if transport.get_write_buffer_size() > stream.most:
            stream.wake()

    def chunk(self, chunk: Chunk) -> None:
        """Any other part. The text of the last one is written as that of plain tokens is: the handler, which ends the
        answer, waits for those of others that end in the same step."""
        stream = self._stream
        if chunk.finish is not None:
            if chunk.text and (transport := stream.transport) is not None and (heads := self._heads) is not None:
                self._say(chunk.text, transport, heads)
                chunk = msgspec.structs.replace(chunk, text="")
            stream.left -= 1
        super().chunk(chunk)
        stream.told(self)

    def fail(self, error: Exception) -> None:
        """The reply ends with `error`, and so does the stream."""
        self._stream.fail(error)

    def events(self) -> bytes:
        """The events of what is gathered."""
        self.waits = False
        events = self._stream.events
        data = events.event((self._index, self.take()))
        around = events.plain(self._index)
        if around is not self.around:
            self.around = around
            self._heads = None
        return data

    def go_direct(self, *, chunked: bool) -> None:
        """Find out what is written around plain tokens."""
        if self._heads is None and self.around is not None:
            self._heads = Heads(self.around, chunked=chunked)
            self._tail = self.around[1] + (b"\r\n" if chunked else b"")


class Stream:
    """The way of several choices to one client. `transport` is there while they write to it themselves, and may hold
    `most` bytes; `left` is how many have not ended."""

    def __init__(self, events: Events, boxes: Sequence[Mailbox], turns: Turns) -> None:
        self.events = events
        self._turns = turns
        self.transport: asyncio.Transport | None = None
        self.most = 0
        self.left = len(boxes)
        self._chunked = False
        self._waiting: list[Choice] = []  # in order, those that have gathered something for the handler
        self._error: Exception | None = None
        self._wanted: asyncio.Future[None] | None = None
        self._choices = [Choice(self, index) for index in range(len(boxes))]
        for box, choice in zip(boxes, self._choices, strict=True):
            box.hand_to(choice)

    # ── called by choices ────────────────────────────────────────────────────────────────────

    def told(self, choice: Choice) -> None:
        """`choice` has gathered something: write it, or leave it to the handler. What ends the reply is for the
        handler, which ends the answer with it in one write."""
        if self.transport is None or not self.left:
            if not choice.waits:
                choice.waits = True
                self._waiting.append(choice)
            self.wake()
            return
        try:
            data = choice.events()
        except Exception as error:  # of this request alone: the others of the step go on
            self.fail(error)
            return
        choice.go_direct(chunked=self._chunked)
        if data:
            self._write(self.transport, data)

    def _write(self, transport: asyncio.Transport, data: bytes) -> None:
        if transport.is_closing():
            self.fail(ConnectionResetError("the client has left"))
            return
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        if transport.get_write_buffer_size() > self.most:
            self.wake()

    def fail(self, error: Exception) -> None:
        """End the stream with `error`, unless it has one."""
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """From now on leave all to the handler."""
        self.transport = None
        if (wanted := self._wanted) is not None:
            self._wanted = None
            self._turns.wake(wanted)

    # ── called by the handler ────────────────────────────────────────────────────────────────

    async def begun(self) -> None:
        """Wait until there is something to write. Raises the error of a request that ends before."""
        await self._woken()
        if not self._waiting:
            self._raise()

    async def send(self, request: web.Request, response: web.StreamResponse) -> bytes:
        """Write all events but the last, which are returned; raises the error that ends the stream."""
        writer = await response.prepare(request)
        assert isinstance(writer, StreamWriter)
        while self.left:
            if self._waiting:
                if data := self._events():
                    await response.write(data)
                    await writer.drain()
                else:
                    writer.send_headers()
            elif self._error is not None:
                self._raise()
            else:
                self._go_direct(request, response, writer)
                await self._woken()
                if self.left:
                    await writer.drain()
        return self._events()

    def _events(self) -> bytes:
        """The events of all that is gathered."""
        waiting, self._waiting = self._waiting, []
        return b"".join([choice.events() for choice in waiting])

    def _go_direct(self, request: web.Request, response: web.StreamResponse, writer: StreamWriter) -> None:
        """Let choices write to the connection, if its headers are sent and bytes need no change on the way."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        if not writer.output_size or writer.length is not None or response.compression:
            return
        self._chunked = writer.chunked
        self.most = transport.get_write_buffer_limits()[1]
        for choice in self._choices:
            choice.go_direct(chunked=writer.chunked)
        self.transport = transport

    async def _woken(self) -> None:
        if not self._waiting and self._error is None:
            self._wanted = wanted = asyncio.get_running_loop().create_future()
            await wanted

    def _raise(self) -> None:
        """Raise the error, which is held here no longer: its traceback leads to the whole request."""
        error, self._error = self._error, None
        assert error is not None, "an error is raised once"
        raise error


async def send_replies(
    request: web.Request,
    opened: AbstractAsyncContextManager[Sequence[Mailbox]],
    events: Events,
    *,
    failure: Callable[[Exception, Words], bytes] = failure_event,
) -> web.StreamResponse:
    """Answer `request` with the replies that come into the mailboxes of `opened`, which are left before the last event
    is sent. What is raised before the first is raised here; `failure` makes the event of an error after that."""
    async with opened as boxes:
        stream = Stream(events, boxes, request.app[TURNS])
        await stream.begun()
        response = EventStream()
        try:
            last = await stream.send(request, response)
        except ConnectionError:  # the client is gone: nobody to tell
            raise
        except Exception as error:
            last = failure(error, words_of(request))
    await response.write_eof(last)
    return response
