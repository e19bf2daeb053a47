"""The id of a request: on its answer, in the log lines about it, and for /abort_request.

A client gives it in the header X-Request-Id; other requests may have the same one. Of several, as a proxy may add one,
the first counts. Without one it is the id of what was
asked for (`chatcmpl-…`), or one made here.
"""

from secrets import token_hex

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.errors import RequestError, counted
from engine.http.tracing import TRACE
from engine.logs import REQUEST_ID

HEADER = "X-Request-Id"
ANTHROPIC_HEADER = "Request-Id"
ANTHROPIC_PATHS = "/v1/messages"
MAX_LENGTH = 256
ID = web.RequestKey("id", str)
PASSED = web.RequestKey("passed", bool)  # another front answers (`passing`), and logs and traces the request


def new_id() -> str:
    """An id for what has none, or for what could not be read and asked for one."""
    return f"req-{token_hex(16)}"


def check_id(id: str, name: str) -> None:
    """Raise RequestError unless `id`, which the client calls `name`, can go into a header and a log."""
    if not 1 <= len(id) <= MAX_LENGTH or not (id.isascii() and id.isprintable()):
        raise RequestError(
            f"{name} is {id[:80]!r} ({counted(len(id), 'character')}); send 1 to {MAX_LENGTH} printable ASCII "
            "characters",
            param=name,
        )


@web.middleware
async def name_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Find or make the id of `request`. Raises RequestError for one that cannot be taken."""
    given = request.headers.get(HEADER)
    if given is None:
        rename(request, new_id())
    else:
        check_id(given, HEADER)
        rename(request, given)
    return await handler(request)


def called(request: web.Request, rid: str) -> str:
    """The id of `request`, which asks for what we call `rid`: the client's, or from now on `rid`."""
    if (trace := TRACE.get()) is not None:
        trace.id = rid
    if HEADER not in request.headers:
        rename(request, rid)
    return request[ID]


def ensure_named(request: web.Request) -> None:
    """Give `request` an id if it was refused before it had one, or for the one it gave."""
    if ID not in request:
        rename(request, new_id())


async def send_id(request: web.Request, response: web.StreamResponse) -> None:
    """Put the id of `request` into the headers of its answer, as Anthropic's clients know it too."""
    ensure_named(request)
    response.headers[HEADER] = request[ID]
    if request.path.startswith(ANTHROPIC_PATHS):
        response.headers[ANTHROPIC_HEADER] = request[ID]


def rename(request: web.Request, id: str) -> None:
    """From now on `request` is known by `id`."""
    request[ID] = id
    REQUEST_ID.set(id)
