"""What every handler shares, and the one way from a Generate to an answer, whole or streamed.

A handler makes a `Generate` and a `Reply`, which knows how one API words its answers; `answer` does the rest.
Leaving `answer` in any way, the handler's cancellation by a vanished client included, closes the front's
generator, and that aborts the request.
"""

from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from engine.config import ServerOptions
from engine.errors import RequestError
from engine.http.metrics import Metrics
from engine.http.sse import Events, send_events
from engine.http.wire import json_response
from engine.messages import Chunk, Generate

if TYPE_CHECKING:
    from engine.front import Front


class Reply(Events, Protocol):
    """One API's wording of a reply: an event for each chunk, or one JSON object for all."""

    def whole(self, text: str, ids: list[int], last: Chunk) -> bytes:
        """The JSON of a reply that is not streamed; `last` is its last chunk."""


class Service:
    """The front, the metrics and the options of one server."""

    def __init__(self, front: "Front", options: ServerOptions) -> None:
        self.front = front
        self.options = options
        self.model = front.model_name
        self.metrics = Metrics(front, self.model)

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) unless `name` is the served model or left out."""
        if name is not None and name != self.model:
            message = f"the model {name!r} is not served here; use {self.model!r}, or leave model out"
            raise RequestError(message, param="model", code="model_not_found", status=404)


SERVICE = web.AppKey("service", Service)


async def answer(
    request: web.Request, generate: Generate, reply: Reply, *, endpoint: str, stream: bool
) -> web.StreamResponse:
    """Run `generate` and answer `request` with it; errors raised before the first chunk reach the caller."""
    headers = {"X-Request-Id": generate.rid}
    service = request.app[SERVICE]
    async with aclosing(service.metrics.watch(service.front.generate(generate), endpoint)) as chunks:
        if stream:
            return await send_events(request, chunks, reply, headers)
        texts: list[str] = []
        ids: list[int] = []
        async for chunk in chunks:
            texts.append(chunk.text)
            ids.extend(chunk.ids)
    assert chunk.finish is not None, f"the stream of {generate.rid} ended without a finish"
    return json_response(reply.whole("".join(texts), ids, chunk), headers=headers)
