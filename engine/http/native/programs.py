"""/v1/programs/end: programs that make no more calls, so that nothing of theirs is kept in the cache.

Whose a program is follows from the API key and from `cache_salt`: ids of somebody else's are unknown. Who says nothing
loses what is kept a minute after the program's last call. Left out: what runs; it goes on.
"""

from typing import Annotated

from aiohttp import web
from msgspec import Meta

from engine.http.keys import owner_of
from engine.http.openapi import Route
from engine.http.service import SERVICE, checked_program, salt_of
from engine.http.wire import Body, Reply, json_response

MOST = 4096  # programs that end in one request


class EndBody(Body):
    """The ids that requests had as `program`, and their `cache_salt`."""

    programs: Annotated[list[str], Meta(max_length=MOST)]
    cache_salt: str | None = None


class EndReply(Reply, frozen=True):
    """How many were named."""

    ended: int


async def end(request: web.Request, body: EndBody) -> web.Response:
    """End programs; unknown ones are ignored."""
    programs = [checked_program(each, f"programs[{index}]") for index, each in enumerate(body.programs)]
    await request.app[SERVICE].front.end_programs(owner_of(request), salt_of(body.cache_salt), programs)
    return json_response(EndReply(len(programs)))


ROUTES = (Route("POST", "/v1/programs/end", end, takes=EndBody, gives=EndReply),)
