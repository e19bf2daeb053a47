"""/v1/sessions: the sessions that requests have named (service.py), for those who named them, to list and to end.

Whose a session is follows from the API key and from `cache_salt`: an id of somebody else's is unknown. What a session
does is in engine/sched/sessions.py.
"""

from typing import Literal

from aiohttp import web

from engine.errors import RequestError
from engine.http.keys import owner_of
from engine.http.openapi import Route
from engine.http.request_id import check_id
from engine.http.service import SERVICE, salt_of
from engine.http.wire import Body, Reply, json_response


class SessionQuery(Body):
    """`cache_salt` is that of the requests."""

    cache_salt: str | None = None


class SessionReply(Reply, frozen=True):
    """`pages` of the device and others `below`, in the host, hold `tokens`; `running` requests are of it; it ends in
    `seconds_left` unless it is used."""

    id: str
    pages: int
    below: int
    tokens: int
    running: int
    idle_seconds: float
    seconds_left: float
    object: Literal["session"] = "session"


class SessionsReply(Reply, frozen=True):
    data: list[SessionReply]
    object: Literal["list"] = "list"


class EndedReply(Reply, frozen=True):
    id: str
    deleted: bool = True
    object: Literal["session"] = "session"


async def sessions(request: web.Request, query: SessionQuery) -> web.Response:
    """List the sessions of the API key under `cache_salt`, the one used last first."""
    front = request.app[SERVICE].front
    size = 0 if front.info is None else front.info.page_size
    kept = await front.sessions(owner_of(request), salt_of(query.cache_salt))
    data = [
        SessionReply(each.id, each.pages, each.below, held, each.running, each.idle, each.left)
        for each in kept
        for held in [(each.pages + each.below) * size]
    ]
    return json_response(SessionsReply(data))


async def end_session(request: web.Request, query: SessionQuery) -> web.Response:
    """End a session: its pages are kept no longer than those of others."""
    id = request.match_info["session_id"]
    salt = salt_of(query.cache_salt)
    check_id(id, "session_id")
    if not await request.app[SERVICE].front.end_session(owner_of(request), salt, id):
        message = (
            f"there is no session {id!r} under this API key and cache_salt; GET /v1/sessions lists those there are"
        )
        raise RequestError(message, param="session_id", code="session_not_found", status=404)
    return json_response(EndedReply(id))


ROUTES = (
    Route("GET", "/v1/sessions", sessions, takes=SessionQuery, gives=SessionsReply),
    Route("DELETE", "/v1/sessions/{session_id:.+}", end_session, takes=SessionQuery, gives=EndedReply),
)
