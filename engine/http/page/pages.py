"""Pages for people: a chat and a live view at /, and /docs, the OpenAPI document to read.

Both are public, and ask for the API key themselves where there is one. Left out: what they show (live.py, and the API).
"""

from aiohttp import web

from engine.http.openapi import Route, openapi_document
from engine.http.page.files import page
from engine.http.service import SERVICE


async def home(request: web.Request) -> web.Response:
    """Chat with the model and see the engine at work: a page, which asks for the API key itself where there is one."""
    return page("home.html", keyed=request.app[SERVICE].options.keyed)


async def docs(request: web.Request) -> web.Response:
    """Show every route and object for people: a page, which asks for the API key itself where there is one."""
    return page("docs.html")


ROUTES = (
    Route("GET", "/openapi.json", openapi_document),
    Route("GET", "/", home, open=True, content="text/html"),
    Route("GET", "/docs", docs, open=True, content="text/html"),
)
