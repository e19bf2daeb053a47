"""An answer on its way from a worker to a client, byte for byte.

The head keeps its status, its reason and all headers that go from end to end; those of this router's own (the id of a
request that has none, what CORS shares) are added. The body is written as it comes and in the coding in which it comes.
A client of HTTP/1.0 is asked for in HTTP/1.0, so its worker sends no chunks.
"""

from typing import Final

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11, StreamWriter
from multidict import CIMultiDict

from engine.client.bench.wire import HEAD_END, Address
from engine.http.half_closed import HalfClosed
from engine.http.keys import CLIENT, KEY
from engine.http.passing import OWN_HEADERS
from engine.http.repeated import members
from engine.http.request_id import HEADER, rename
from engine.router.keys import CREDENTIALS, credentials
from engine.router.wire import Head, Upstream

OWN: Final = frozenset(str(name).lower().encode() for name in OWN_HEADERS)
# What this router has judged, or says anew, and what a worker would judge by other rules than it has.
PREFLIGHT: Final = frozenset({b"access-control-request-method", b"access-control-request-headers"})
JUDGED: Final = OWN | PREFLIGHT | {b"host", b"origin", CLIENT.lower().encode()}
FETCH: Final = b"sec-fetch-"
SHOWN: Final = frozenset(name.lower().encode() for name in CREDENTIALS)
KEPT: Final = frozenset({b"transfer-encoding", b"content-length", b"content-encoding"})  # what frames the same body
DROPPED: Final = OWN - KEPT
SHARED: Final = b"access-control-"  # what a worker shares with origins is this router's to say


def request_head(request: web.Request, address: Address, length: int, key: str | None, via: str) -> bytes:
    """The head of `request` for the worker at `address`; its body has `length` bytes. With a `key`, that is sent in
    place of the client's, and the client is named beside it (`engine.router.keys`). `via` is what this router adds of
    itself."""
    version = "1.1" if request.version >= HttpVersion11 else "1.0"
    host = f"[{address.host}]" if ":" in address.host else address.host
    path = request.raw_path if request.raw_path.startswith("/") else request.rel_url.raw_path_qs
    lines = [f"{request.method} {address.prefix}{path} HTTP/{version}\r\nHost: {host}:{address.port}".encode()]
    dropped = JUDGED | _bytes_of(members(request.headers, hdrs.CONNECTION))
    if key is not None:
        dropped |= SHOWN
    lines += [f"{name}: {value}".encode() for name, value in credentials(request.get(KEY), key).items()]
    for name, value in request.raw_headers:
        low = name.lower()
        if low not in dropped and not low.startswith(FETCH):
            lines.append(b"%b: %b" % (name, value))
    lines.append(b"Via: " + via.encode())
    if length or request.method not in ("GET", "HEAD", "DELETE", "OPTIONS"):
        lines.append(b"Content-Length: %d" % length)
    return b"\r\n".join(lines) + HEAD_END


def _bytes_of(names: frozenset[str]) -> frozenset[bytes]:
    """`names` as they came."""
    return frozenset(name.encode(errors="surrogateescape") for name in names)


class Relayed(web.StreamResponse):
    """An answer whose head goes out with the first of its body, in one write, and whose body is framed already."""

    _send_headers_immediately = False
    _length_check = False

    @classmethod
    def of(cls, head: Head) -> "Relayed":
        """The answer that begins with the worker's `head`."""
        dropped = DROPPED | head.connection - KEPT
        if b"transfer-encoding" in head.names:  # which says alone where the body ends
            dropped |= {b"content-length"}
        headers = CIMultiDict(
            (name.decode("latin-1"), value.decode("utf-8", "replace"))
            for name, value in head.headers
            if (low := name.lower()) not in dropped and not low.startswith(SHARED)
        )
        return cls(status=head.status, reason=head.reason, headers=headers)


async def relay(request: web.Request, upstream: Upstream, head: Head) -> Relayed:
    """Answer `request` with what comes over `upstream`, whose answer began with `head`.

    Raises WorkerError where the worker breaks off; the client's connection is then closed, as its answer is not whole.
    ConnectionError where the client has left."""
    response = Relayed.of(head)
    if (id := response.headers.get(HEADER)) is not None:
        rename(request, id)
    if not upstream.framed:
        response.force_close()  # its end is that of the connection
    client = request.protocol
    assert isinstance(client, HalfClosed)
    client.tell_half_closed(upstream.half_close)  # whose probes tell whether the client is there (`half_closed`)
    writer = await response.prepare(request)
    assert isinstance(writer, StreamWriter)
    try:
        while True:
            if data := upstream.take():
                await response.write(data)
                await writer.drain()
            elif upstream.ended:
                break
            else:
                transport = request.transport
                if transport is None or transport.is_closing():
                    raise ConnectionResetError("the client has left")
                upstream.go_direct(transport)
                await upstream.woken()
                await writer.drain()
    except Exception:
        if request.transport is not None:
            request.transport.abort()
        raise
    finally:
        client.tell_half_closed(None)
    await response.write_eof()
    return response
