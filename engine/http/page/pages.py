"""Pages for people: /docs, the OpenAPI document to read. A page is one file that asks no other server for anything.

Its headers let the browser hold it to that: only its own script runs, it speaks to this server alone, and no other
page can show it in a frame.
"""

import hashlib
import re
from base64 import b64encode
from functools import cache
from pathlib import Path

from aiohttp import web

from engine.http.openapi import Route, openapi_document


async def docs(request: web.Request) -> web.Response:
    """Show every route and object for people: a page, which asks for the API key itself where there is one."""
    page, policy = _page("docs.html")
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return web.Response(body=page, content_type="text/html", charset="utf-8", headers=headers)


@cache
def _page(name: str) -> tuple[bytes, str]:
    """The file `name` beside this one, and the policy that fits it."""
    page = Path(__file__).with_name(name).read_bytes()
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    allowed = " ".join(f"'sha256-{b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


ROUTES = (
    Route("GET", "/openapi.json", openapi_document),
    Route("GET", "/docs", docs, open=True, content="text/html"),
)
