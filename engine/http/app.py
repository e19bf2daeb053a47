"""The HTTP server: routes, one shape for every error, and its life on a port.

A request passes the door (`origins`) and the check of its key (`keys`) before its handler runs.
A client that disconnects cancels its handler (`handler_cancellation`), which closes the reply's generator and so
aborts the request. Left out: TLS and rate limits, which a proxy in front does well.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import anyio
from aiohttp import web
from aiohttp.typedefs import Handler

from engine.config import ServerOptions
from engine.http.admin import routes as admin
from engine.http.anthropic import routes as anthropic
from engine.http.connections import listen
from engine.http.exporting import tracing_to
from engine.http.fields import IGNORED, Ignored, send_ignored
from engine.http.intake import INTAKE, Intake
from engine.http.keys import Keys, key_check
from engine.http.listening import cannot_listen, url_of
from engine.http.log import QUIET, LoadLog, log_request
from engine.http.native import routes as native
from engine.http.openai import routes as openai
from engine.http.openapi import DOCUMENT, Route, describe
from engine.http.origins import Access, Gate, warn_of_any_origin
from engine.http.page import routes as page
from engine.http.page.live import LIVE, LiveEvents
from engine.http.passing import PASSAGE, Passage
from engine.http.request_id import name_request, send_id
from engine.http.responses import routes as responses
from engine.http.responses.store import STORE, ResponseStore
from engine.http.service import SERVICE, Service
from engine.http.shaping import shaped
from engine.http.turns import TURNS, Turns
from engine.http.wire import to_json

if TYPE_CHECKING:
    import socket

    from engine.runtime.front import Front

MOST_RETRY_SECONDS = 60  # that Retry-After says: clients sleep for as long as it does
CLOSE_SECONDS = 1.0  # what handlers still running at the end get; draining happens before
ROUTES = (
    *openai.ROUTES,
    *responses.ROUTES,
    *anthropic.ROUTES,
    *native.ROUTES,
    *admin.ROUTES,
    *page.ROUTES,
)


def create_app(front: "Front", options: ServerOptions, routes: Sequence[Route] = ROUTES) -> web.Application:
    """The application of `routes` over `front`; it adds its metrics to `front.on_stats`.

    Run it with `handler_cancellation=True`, as `serve` does, or clients that leave are not noticed.
    Raises ConfigError for options that say nothing of who may call.
    """
    open_paths = frozenset(route.path for route in routes if route.open)
    pages = frozenset(route.path for route in routes if route.content == "text/html")
    methods = frozenset(route.method for route in routes)
    gate, keys = Gate(Access.of(options), pages=pages, methods=methods), Keys(options)
    checks = [shape_errors, name_request, gate.middleware()]
    if keys.asked:
        checks.append(key_check(keys, open_paths))
    if options.log_requests:
        checks.insert(0, log_request)
    app = web.Application(middlewares=checks)
    if (open_tracing := tracing_to(options.otlp_endpoint)) is not None:
        tracing = open_tracing()
        app.middlewares.insert(0, tracing.middleware)
        app.on_cleanup.append(lambda app: tracing.close())
    app.on_response_prepare.extend((send_id, send_ignored))
    app[IGNORED] = Ignored(strict=options.strict_fields)
    gate.join(app)
    app[SERVICE] = service = Service(front, options)
    front.on_stats.append(service.metrics.on_stats)
    app[QUIET] = open_paths
    app[INTAKE] = Intake(options, front.board)
    app[PASSAGE] = Passage(front.peers)
    app[LIVE] = LiveEvents(front)
    app[TURNS] = Turns()
    app[STORE] = store = ResponseStore(front.board, front.peers)
    app.on_cleanup.append(lambda app: store.close())
    app[DOCUMENT] = to_json(describe(routes, models=service.models, keyed=keys.asked))
    app.add_routes([route.served(strict=options.strict_fields) for route in routes])
    return app


async def serve(
    front: "Front",
    options: ServerOptions,
    routes: Sequence[Route] = ROUTES,
    *,
    started: Callable[[str], None],
    sockets: Sequence["socket.socket"] = (),
) -> None:
    """Serve `routes` until cancelled, which ends what is open with an error; `started` gets the URL of the open port.

    One front of several gets its `sockets`, which listen; what is said once is said by who started it.
    Raises ConfigError if `options.host` and `options.port` cannot be listened on, or there are too few descriptors.
    """
    app, load = create_app(front, options, routes), LoadLog()
    if not sockets:
        front.on_stats.append(load.on_stats)
        warn_of_any_origin(options)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=CLOSE_SECONDS)
    await runner.setup()
    assert runner.server is not None, "it is set up"
    listener = None
    try:
        try:
            listener = await listen(
                runner.server,
                options,
                app[SERVICE].metrics.count_error,
                board=front.board,
                sockets=sockets,
                passage=app[PASSAGE].path,
            )
        except OSError as error:
            raise cannot_listen(options, error) from error
        started(url_of(options.host, listener.port))
        await anyio.sleep_forever()
    finally:
        front.on_stats.remove(app[SERVICE].metrics.on_stats)
        if not sockets:
            front.on_stats.remove(load.on_stats)
        front.end()  # whatever cancels us: each stream gets the event that says why it ends
        app[INTAKE].end()
        with anyio.CancelScope(shield=True):
            if listener is not None:
                listener.close()
            await runner.cleanup()


@web.middleware
async def shape_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error with {"error": {message, type, param, code}}, or as Anthropic words it on its routes."""
    service = request.app[SERVICE]

    def finish(status: int, headers: dict[str, str]) -> None:
        service.metrics.count_error(status)
        if status == 503:
            draining = service.front.health().status == "draining"
            headers["Retry-After"] = str(retry_seconds(service.options.drain_seconds) if draining else 1)

    return await shaped(request, handler, finish)


def retry_seconds(drain_seconds: float) -> int:
    """When to ask again a server that drains for so long: another one may stand in its place earlier, so soon."""
    return min(max(1, math.ceil(drain_seconds)), MOST_RETRY_SECONDS)
