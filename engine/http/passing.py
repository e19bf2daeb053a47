"""A request about what another front has is passed on to that front, and the answer comes back byte by byte.

    client ── front 1 ──(Unix socket)── front 0, which has resp_00…

The id of a thing that one front keeps begins with the number of that front, and `Route.kept` says where a request names
such an id. The front that has it takes the request as from a client: it checks the key, the origin and the host,
counts, logs and traces; the front between does not log or trace, and counts the body no longer. Nothing of it goes
through the core's event loop. If the front that had it is gone, so is what it had, and whoever was asked says so.
Left out: requests that name no front; they ask all of them (`Service.abort`).
"""

import errno
import io
import re
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from engine.errors import WorkerError
from engine.http.intake import hand_on_body
from engine.http.repeated import members
from engine.http.request_id import HEADER, ID, PASSED

if TYPE_CHECKING:
    from engine.runtime.peers import Peers

CONNECT_SECONDS: Final = 10.0
GONE: Final = (errno.ENOENT, errno.ECONNREFUSED)  # of a connection: nobody listens
# What is said between two neighbours, and the marks of a body that has been unpacked here.
OWN_HEADERS: Final = frozenset(
    {
        hdrs.CONNECTION, hdrs.KEEP_ALIVE, hdrs.PROXY_AUTHENTICATE, hdrs.PROXY_AUTHORIZATION, hdrs.TE, hdrs.TRAILER,
        hdrs.TRANSFER_ENCODING, hdrs.UPGRADE, hdrs.EXPECT, hdrs.CONTENT_LENGTH, hdrs.CONTENT_ENCODING,
    }
)  # fmt: skip
UNSAID: Final = (hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE)  # that no client has sent
NAMED = re.compile(r"[a-z]+_([0-9a-f]{2})[0-9a-f]{30}")


def id_at(front: int, kind: str) -> str:
    """A new id of something that `front` has."""
    return f"{kind}_{front:02x}{uuid4().hex[2:]}"


def front_of(id: str) -> int | None:
    """The front that has, or had, what `id` names."""
    found = NAMED.fullmatch(id)
    return None if found is None else int(found[1], 16)


class Passage:
    """The ways from one front to the others: each listens on a socket in a folder that is this user's alone."""

    def __init__(self, peers: "Peers") -> None:
        self._peers = peers
        self._folder = peers.folder

    def elsewhere(self, id: str | None) -> int | None:
        """The other front that has what `id` names, if one has."""
        number = None if id is None or not self._folder else front_of(id)
        return None if number == self._peers.number or number not in range(self._peers.count) else number

    @property
    def path(self) -> str:
        """Where this front takes what others pass on; empty where it is alone."""
        return self._path(self._peers.number) if self._folder else ""

    async def pass_on(self, request: web.Request, number: int, body: bytes) -> web.StreamResponse | None:
        """The answer of front `number` to `request`; None if that front is gone.

        Raises WorkerError if it ends before it answers, or takes no more. Leaving this ends the request there, as a
        client's leaving."""
        connector = aiohttp.UnixConnector(self._path(number), force_close=True)
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=UNSAID,
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS),
        )
        url = URL(f"http://front{request.rel_url.raw_path_qs}", encoded=True)
        async with session:
            try:
                async with session.request(
                    request.method,
                    url,
                    headers=_headers(request.headers),
                    data=io.BytesIO(body) if body else None,
                    allow_redirects=False,
                ) as answer:
                    return await _relayed(request, answer)
            except aiohttp.ClientError as error:
                if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno in GONE:
                    return None
                raise WorkerError(
                    f"front {number}, which has what the request is about, did not answer ({type(error).__name__}); "
                    "send the request again"
                ) from None

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number}"


PASSAGE = web.AppKey("passage", Passage)


async def passed_on(request: web.Request, id: str | None, body: bytes = b"") -> web.StreamResponse | None:
    """The answer of the front that has what `id` names; None if that is this one, or one that is gone."""
    passage = request.app[PASSAGE]
    number = passage.elsewhere(id)
    if number is None:
        return None
    hand_on_body(request)
    return await passage.pass_on(request, number, body)


async def _relayed(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """`answer`, given to the client of `request` as it comes."""
    request[PASSED] = True
    if (id := answer.headers.get(HEADER)) is not None:
        request[ID] = id
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_headers(answer.headers))
    if answer.content_length is not None:
        response.content_length = answer.content_length
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await response.write(piece)
    except aiohttp.ClientError:  # the answer must not look whole
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the front that answers has ended") from None
    await response.write_eof()
    return response


def _headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Those of `headers` that go from end to end: not those that Connection names (RFC 9110, 7.6.1)."""
    dropped = OWN | members(headers, hdrs.CONNECTION)
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in dropped and value.isprintable()  # what is not UTF-8 means nothing to any route
    )


OWN: Final = frozenset(str(name).lower() for name in OWN_HEADERS)
