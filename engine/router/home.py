"""The page of an engine, at the address of its router: the chat goes to workers, the live view shows which there are.

Left out: the live view of a worker, which its own address has.
"""

from aiohttp import web

from engine.errors import RequestError
from engine.http.openapi import Route
from engine.http.page.files import page
from engine.router.router import ROUTER


async def home(request: web.Request) -> web.Response:
    """Chat through the router and see its workers: a page, which asks for the API key itself where there is one."""
    return page("home.html", router=True, keyed=request.app[ROUTER].config.server.keyed)


async def live_events(request: web.Request) -> web.Response:
    """Refuse: a worker would take the router's own address for its viewer's."""
    raise RequestError(
        "a router has no live view of its own; open / at a worker's address, which GET /workers lists",
        code="not_supported",
        status=404,
    )


ROUTES = (
    Route("GET", "/", home, open=True, content="text/html"),
    Route("GET", "/live/events", live_events),
)
