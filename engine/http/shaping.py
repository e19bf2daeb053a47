"""One shape for every error of HTTP, whatever it was that raised it.

    handler ── raises ──> status, {"error": {message, type, param, code}} ──finish──> headers ──> answer

`finish` is of whoever serves. Left out: errors inside a stream (`sse`), and what is no request at all (`connections`).
"""

from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.http.anthropic.reply import error_of
from engine.http.intake import CODINGS
from engine.http.request_id import ANTHROPIC_PATHS
from engine.http.sse import describe_error, words_of
from engine.http.wire import error_object, json_response

ANTHROPIC_VERSION = "anthropic-version"  # a header of all of Anthropic's clients


async def shaped(
    request: web.Request, handler: Handler, finish: Callable[[int, dict[str, str]], None]
) -> web.StreamResponse:
    """What `handler` answers, or its error; `finish` is told the status of that, and adds to its headers."""
    try:
        return _ending_with_body(request, await handler(request))
    except ConnectionError:  # the client is gone: nobody to tell
        raise
    except web.RequestPayloadError as error:  # it is not encoded as its headers say
        message = f"the request body cannot be read: {' '.join(str(error).split())}; check how it is encoded"
        status, body, headers = 400, error_object(message, status=400, code="invalid_body"), {}
    except web.HTTPException as error:
        code, message = _http_words(request, error)
        status, body = error.status, error_object(message, status=error.status, code=code)
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    except Exception as error:
        status, body = describe_error(error, words_of(request))
        headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 415:
        headers["Accept-Encoding"] = ", ".join(CODINGS)
    finish(status, headers)
    theirs = request.path.startswith(ANTHROPIC_PATHS) or ANTHROPIC_VERSION in request.headers
    worded = error_of(body, status) if theirs else body
    return _ending_with_body(request, json_response(worded, status=status, headers=headers))


def _ending_with_body(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """`response`, and the end of its connection if the body is not whole: nobody reads it, so the rest is dropped
    unparsed until the client has its answer."""
    if not request.content.is_eof():
        response.force_close()
        request.protocol.close()
    return response


def _http_words(request: web.Request, error: web.HTTPException) -> tuple[str, str]:
    """The code and the message of an error that aiohttp itself raises."""
    match error:
        case web.HTTPNotFound():
            return "not_found", f"there is no {request.path}; the routes are {', '.join(_paths(request.app))}"
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return "method_not_allowed", f"{request.path} does not take {error.method}; use {allowed}"
        case _:
            return "http_error", error.reason


def _paths(app: web.Application) -> list[str]:
    return sorted({resource.canonical for resource in app.router.resources()})
