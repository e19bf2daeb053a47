"""What a plugin's HTTP routes are made of. Imports aiohttp, so only a route's own module imports this, no manifest.

A handler is a coroutine function of aiohttp's request and, if its route has a `takes`, of the body, decoded:

    async def hello(request: web.Request, body: HelloBody) -> web.Response:
        return json_response(HelloReply(f"hello {body.name}"))

A `RequestError` becomes an error of its status in the usual shape. A client that leaves cancels the handler.
"""

from aiohttp import web

from engine.http.service import SERVICE
from engine.http.wire import Body, Reply, json_response
from engine.messages.reply import Chunk
from engine.messages.request import Embed, Generate
from engine.params.sampling import SamplingParams
from engine.runtime.front import Front

__all__ = ["Body", "Chunk", "Embed", "Front", "Generate", "Reply", "SamplingParams", "front_of", "json_response"]


def front_of(request: web.Request) -> Front:
    """The engine behind `request`: `generate(Generate(...))` is a stream of chunks, `health()` says how it is."""
    return request.app[SERVICE].front
