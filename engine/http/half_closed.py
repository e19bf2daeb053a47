"""Clients that say that they will send no more, and still want their answer: `nc -N`, and tools of HTTP/1.0.

The end of what a client sends looks the same whether it has closed one direction or is gone. So what is asked is
answered, and meanwhile the connection is probed. An interim answer (100, which clients of HTTP/1.1 pass over) makes the
system of a client that is gone say so at once; it is repeated ever more rarely. In a stream a comment takes its place,
and the events do the same. Of HTTP/1.0, which has neither, TCP's keep-alive tells once the client's system has
forgotten the connection: on Linux within about a minute.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from aiohttp import web
from aiohttp.http import HttpVersion11, StreamWriter

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNKED_COMMENT = b"3\r\n:\n\n\r\n"  # of server-sent events, which are all that is sent in chunks
FIRST_LOOK, LAST_LOOK = 0.01, 1.0  # seconds to the first look and between two; each is twice the one before
REPEATED_FROM = 8  # looks after which 100 is sent again, and then each time that they have doubled
PROBES = (("SO_KEEPALIVE", 1), ("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3))


class HalfClosed(web.RequestHandler):
    """A connection that goes on while a whole request is being answered, though its client sends no more."""

    __slots__ = ("_answered", "_body", "_ended", "_told")

    def tell_half_closed(self, told: Callable[[], None] | None) -> None:
        """Call `told` once the client sends no more, at once if that is so: who answers may have somebody to tell in
        turn. With None, call nothing any more."""
        self._told = told
        if told is not None and getattr(self, "_ended", False):
            told()

    def data_received(self, data: bytes) -> None:
        """Parse, and remember the last body that began."""
        super().data_received(data)
        if self._messages:
            self._body = self._messages[-1][1]

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send what is left of an answer, and count it."""
        finished = await super().finish_response(request, resp, start_time)
        self._answered = getattr(self, "_answered", 0) + 1
        return finished

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open while there is something to answer; None or False closes it."""
        if getattr(self, "_ended", False):
            return True
        if self.transport is None or self._idle() or self._unfinished():
            return False
        self._ended = True
        sock = self.transport.get_extra_info("socket")
        for name, value in PROBES:
            level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
            with suppress(AttributeError, OSError):  # not every system and socket has them
                sock.setsockopt(level, getattr(socket, name), value)
        self._loop.call_later(FIRST_LOOK, self._look, 1)
        if (told := getattr(self, "_told", None)) is not None:
            told()
        return True

    def _idle(self) -> bool:
        """Whether all that was asked is answered: the next request will not come. Most clients close as soon as they
        have their answer, which is before this connection's task waits for another."""
        return self._request_count == getattr(self, "_answered", 0)

    def _unfinished(self) -> bool:
        """Whether the body is cut off of the request whose turn it is, or of one that was answered before its end;
        requests before it are still answered."""
        if self._current_request is not None:
            return not self._current_request.content.is_eof()
        body = self._messages[0][1] if self._messages else getattr(self, "_body", None)
        return body is not None and not body.is_eof()

    def _look(self, number: int) -> None:
        """End the connection if nothing is left to answer, or nobody to answer to; else look again later."""
        transport = self.transport
        if transport is None:
            return
        if transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            transport.abort()
            return
        if self._idle() or self._unfinished():
            transport.close()
            return
        if not self._messages:
            self._close = True  # with the answer to the last request
        doubled = number >= REPEATED_FROM and number & (number - 1) == 0
        if number == 1 or doubled:
            transport.write(self._probe())
        self._loop.call_later(min(FIRST_LOOK * 2.0 ** min(number, 10), LAST_LOOK), self._look, number + 1)

    def _probe(self) -> bytes:
        """What may be sent now and is passed over: nothing, where a whole answer has begun."""
        request = self._current_request
        if request is None:
            return b""
        writer = cast(StreamWriter, request.writer)
        if not writer.output_size:
            return CONTINUE if request.version >= HttpVersion11 else b""
        if writer.chunked and not writer._eof:
            return CHUNKED_COMMENT
        return b""
