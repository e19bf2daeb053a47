"""Routes for operators: health, metrics, and the two that act on running work, abort and flush."""

from aiohttp import web

from engine.errors import RequestError
from engine.http.service import SERVICE
from engine.http.wire import Body, BodyDecoder, json_response


class AbortBody(Body):
    rid: str | None = None
    abort_all: bool = False


ABORT = BodyDecoder(AbortBody)


async def health(request: web.Request) -> web.Response:
    """GET /health: 200 when a request would be served now, else 503 with the cause."""
    state = request.app[SERVICE].front.health()
    if state.ok:
        return json_response({"status": state.status})
    return json_response({"status": state.status, "cause": state.cause}, status=503)


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics, for Prometheus."""
    body, content_type = request.app[SERVICE].metrics.page(request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


async def abort_request(request: web.Request) -> web.Response:
    """POST /abort_request: end one request by its exact id, or all; unknown ids are no error."""
    body = ABORT.decode(await request.read())
    if body.abort_all == (body.rid is not None):
        message = f"rid is {body.rid!r} and abort_all is {body.abort_all}; send a rid, or abort_all: true, not both"
        raise RequestError(message, param="rid")
    return json_response({"aborted": request.app[SERVICE].front.abort(body.rid)})


async def flush_cache(request: web.Request) -> web.Response:
    """GET or POST /flush_cache: forget every cached prefix that no running request uses."""
    flushed = await request.app[SERVICE].front.flush()
    return json_response({"freed": flushed.freed, "in_use": flushed.in_use})
