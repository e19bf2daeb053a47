"""The HTTP of a router: its own routes, and all others to its workers.

A request passes the same door (`engine.http.origins`), the same check of its key (`engine.http.keys`) and the same
limits (`engine.http.connections`) as at an engine. Left out: what is done with it (`proxy`, `admin`, `everywhere`).
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import anyio
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from engine.errors import RequestError
from engine.http.connections import listen
from engine.http.fields import IGNORED, Ignored
from engine.http.intake import INTAKE, Intake, without_expecting
from engine.http.keys import Keys, key_check, keys_in
from engine.http.listening import cannot_listen, url_of
from engine.http.openapi import Route
from engine.http.origins import Access, Gate, warn_of_any_origin
from engine.http.request_id import name_request, send_id
from engine.http.shaping import shaped
from engine.router import admin, everywhere, home
from engine.router.health import LOOP
from engine.router.log import log_request
from engine.router.proxy import proxied
from engine.router.router import ROUTER, Router

if TYPE_CHECKING:
    from aiohttp.typedefs import Middleware

CLOSE_SECONDS = 1.0  # what handlers still running at the end get; draining happens before
ROUTES: Sequence[Route] = (*admin.ROUTES, *everywhere.ROUTES, *home.ROUTES)
OWN: Final[dict[tuple[str, str], Route]] = {(route.method, route.path): route for route in ROUTES}
OPERATORS = frozenset((route.method, route.path) for route in admin.ROUTES)
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"})


def create_app(router: Router) -> web.Application:
    """Raises ConfigError for options that say nothing of who may call."""
    options = router.config.server
    open_paths = frozenset(route.path for route in ROUTES if route.open)
    gate = Gate(Access.of(options), pages=frozenset({"/"}), methods=METHODS)
    keys = _by_route(key_check(Keys(options), frozenset()))
    checks = [shape_errors, name_request, refuse_loops, gate.middleware(), keys]
    if options.log_requests or router.config.router.log_level == "debug":
        checks.insert(0, log_request(open_paths))
    app = web.Application(middlewares=checks)
    app.on_response_prepare.append(send_id)
    app[ROUTER] = router
    app[IGNORED] = Ignored(strict=True)
    app[INTAKE] = Intake(options)
    gate.join(app)
    app.add_routes([route.served(strict=True) for route in ROUTES])
    app.add_routes([web.route("*", "/{path:(?s:.*)}", to_a_worker, expect_handler=without_expecting)])
    return app


async def to_a_worker(request: web.Request) -> web.StreamResponse:
    """Any other route: a worker answers."""
    return await proxied(request.app[ROUTER], request)


def _by_route(check: "Middleware") -> "Middleware":
    """`check`, but not on open routes. On those of operators an admin's key is as good, and those that change something
    need it, and then no other.

    The route that was found decides, as a path does not say whose a request is: another method of the path, or a path
    that only reads alike once it is unquoted, is a worker's."""

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        own = None if resource is None else OWN.get((request.method, resource.canonical))
        if own is None:
            return await check(request, handler)
        admins, found = request.app[ROUTER].admin_keys, (own.method, own.path)
        if found in admin.CHANGES:
            admins.check(keys_in(request))
        if own.open or (found in OPERATORS and admins.have(keys_in(request))):
            return await handler(request)
        return await check(request, handler)

    return check_key


@web.middleware
async def refuse_loops(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what this router has sent itself: it, or another one, has it for a worker."""
    via = request.app[ROUTER].via
    if any(via in line for line in request.headers.getall(hdrs.VIA, ())):
        raise RequestError(
            f"the request came back to the router that it was sent by ({via}); remove the worker whose URL is that of "
            "a router before it",
            code="loop",
            status=LOOP,
        )
    return await handler(request)


@web.middleware
async def shape_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer the router's own errors in the shape of an engine's."""
    router = request.app[ROUTER]

    def finish(status: int, headers: dict[str, str]) -> None:
        router.metrics.count_error(status)
        if status in (429, 503):
            headers["Retry-After"] = str(router.dispatcher.retry_seconds())

    return await shaped(request, handler, finish)


async def serve(router: Router, *, started: Callable[[str], None]) -> None:
    """Serve until cancelled, which ends what is open; `started` gets the URL of the open port.

    Raises ConfigError if the address cannot be listened on."""
    options = router.config.server
    warn_of_any_origin(options)
    runner = web.AppRunner(create_app(router), handler_cancellation=True, shutdown_timeout=CLOSE_SECONDS)
    await runner.setup()
    assert runner.server is not None, "it is set up"
    listener = None
    try:
        async with router.running():
            try:
                listener = await listen(runner.server, options, router.metrics.count_error)
            except OSError as error:
                raise cannot_listen(options, error) from error
            started(url_of(options.host, listener.port))
            await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            if listener is not None:
                listener.close()
            with suppress(ConnectionError):
                await runner.cleanup()
