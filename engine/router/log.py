"""The access log of a router: one line for each request that ends, and at debug why it went where it went."""

import logging
from time import perf_counter
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.http.log import LEFT
from engine.http.request_id import ensure_named
from engine.router.proxy import DECISION

if TYPE_CHECKING:
    from aiohttp.typedefs import Middleware

log = logging.getLogger("engine.router.access")


def log_request(quiet: frozenset[str]) -> "Middleware":
    """A middleware that logs each request once it is answered or its client has left; of the paths in `quiet` only
    those that fail."""

    @web.middleware
    async def log_it(request: web.Request, handler: Handler) -> web.StreamResponse:
        began, status = perf_counter(), LEFT
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            ensure_named(request)
            if status != 200 or request.path not in quiet:
                log.info("%s", line_of(request, status, perf_counter() - began))

    return log_it


def line_of(request: web.Request, status: int, seconds: float) -> str:
    """The line; with the reason of the decision where the log shows debug."""
    words = [f"{request.method} {request.rel_url.raw_path[:200]}", str(status)]
    decision = request.get(DECISION)
    if decision is not None and decision.worker:
        words.append(f"worker={decision.worker}")
        if decision.tries > 1:
            words.append(f"tries={decision.tries}")
        if decision.first is not None:
            words.append(f"ttfb={decision.first:.3f}")
    words.append(f"seconds={seconds:.3f}")
    if decision is not None and decision.worker and log.isEnabledFor(logging.DEBUG):
        words.append(f"matched={decision.matched}/{decision.chars} reason={decision.reason!r}")
    return " ".join(words)
