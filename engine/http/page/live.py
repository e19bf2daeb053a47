"""/live/events: what goes on in the engine, for the page and for `engine top`, as server-sent events.

    viewer ──GET /live/events──> front ──Look──> scheduler      twice a second at most, and only while somebody looks
           <── event ──────────────────<─Snapshot──┘

A snapshot tells how prompts begin that others have sent, so it is for this machine alone unless the server has keys.
A proxy of this machine that says for whom it asks counts as its client does. Viewers are few, of all fronts together.
Left out: experts, which /expert_distribution tells, and what the metrics have anyway.
"""

from array import array
from collections.abc import AsyncIterator
from typing import Final

import anyio
from aiohttp import web
from msgspec.structs import asdict

from engine.errors import RequestError
from engine.http.openapi import Route
from engine.http.origins import is_local
from engine.http.repeated import joined
from engine.http.service import SERVICE
from engine.http.sse import data_event, send_events
from engine.http.wire import Reply, to_json
from engine.messages.looking import HEAD, Snapshot
from engine.runtime.board import Counter
from engine.runtime.front import Front, Health

PAUSE_SECONDS: Final = 0.5  # between two events
MOST_VIEWERS: Final = 8  # of all fronts
FORWARDED: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


class LiveRows(Reply, frozen=True):
    """Requests that have a slot, a number of each in each list, at most 512. A phase is 0 while the prompt is computed,
    1 while it decodes, and 2 while its last token or its vector is on the way."""

    slots: list[int]
    phases: list[int]
    prompts: list[int]
    cached: list[int]
    computed: list[int]
    replies: list[int]
    pages: list[int]


class LiveSteps(Reply, frozen=True):
    """The last steps while somebody looks, oldest first; the last one has the number `last`. `idle` is what the device
    waited before each, in seconds."""

    last: int
    seconds: list[float]
    idle: list[float]
    rows: list[int]
    tokens: list[int]


class LivePages(Reply, frozen=True):
    """A letter for `each` pages, by number, of the owner that most of them have: `.` free, `c` cached alone, `k` cached
    for a session or a program, `s` in the tree and used by requests that run, `r` of one request alone, `i` on their
    way there from a tier, `o` on their way to one. No letters where there are too many pages."""

    each: int
    owners: str


class LiveTier(Reply, frozen=True):
    """A tier below the device, `host` or `store`, which has room for so many pages, 0 if that is not known, and holds
    `used`. The letters of its map: `.` free, `c` cached, `a` cached and asked for again, `i` on their way there, `o` on
    their way out. A store tells no places, so its letters stand in order."""

    tier: str
    pages: int
    used: int
    map: LivePages


class LiveTree(Reply, frozen=True):
    """Nodes of the radix tree, parents first: the place of each one's parent or -1, its pages, its locks, how many
    children are not told, and its first token ids, none for what was sent with a cache_salt."""

    parents: list[int]
    pages: list[int]
    locks: list[int]
    hidden: list[int]
    heads: list[list[int]]


class LiveChannel(Reply, frozen=True):
    """Messages that wait for an actor, of `capacity` at most; 0 where admission bounds them."""

    actor: str
    waiting: int
    capacity: int


class LiveAssets(Reply, frozen=True):
    kind: str
    state: str
    count: int


class LiveEvent(Reply, frozen=True):
    """The `number`-th snapshot, which took the scheduler so many `seconds`. `counts` are those of /server_info, and
    `queue` the lengths of the first prompts that wait. No cache hits more than the share `ceiling` of prompts, which is
    known where there are tiers, else 0."""

    number: int
    seconds: float
    status: str
    cause: str
    counts: dict[str, int]
    copies: list[dict[str, int]]
    rows: LiveRows
    queue: list[int]
    steps: LiveSteps
    pages: LivePages
    tree: LiveTree
    channels: list[LiveChannel]
    assets: list[LiveAssets]
    tiers: list[LiveTier]
    ceiling: float
    viewers: int
    open: int


async def live_events(request: web.Request) -> web.StreamResponse:
    """Tell what goes on, twice a second at most: steps, rows, queue, pages, radix tree, channels."""
    service = request.app[SERVICE]
    check_near(request, keyed=service.options.keyed)
    board = service.front.board
    if (viewers := board.total(Counter.VIEWERS)) >= MOST_VIEWERS:
        message = f"{viewers} viewers look already, and at most {MOST_VIEWERS} may; close another page that looks"
        raise RequestError(message, code="too_many_viewers", status=503)
    view = request.app[LIVE]
    board.add(Counter.VIEWERS)
    try:
        return await send_events(request, _snapshots(service.front), view)
    finally:
        board.add(Counter.VIEWERS, -1)


def check_near(request: web.Request, *, keyed: bool) -> None:
    """Raise RequestError (403) for who is on another machine, unless the server asks for keys: then who comes here has
    sent one."""
    forwarded = any(joined(request.headers, name) for name in FORWARDED)
    if keyed or (not forwarded and (not request.remote or is_local(request.remote))):
        return
    raise RequestError(
        "the live view shows what others have sent, so without API keys only this machine may see it; start the "
        "server with --api-key, or look from the machine that it runs on",
        code="not_local",
        status=403,
    )


async def _snapshots(front: Front) -> AsyncIterator[Snapshot]:
    last = 0
    while True:
        made = await front.look()
        if made.number != last:
            last = made.number
            yield made
        if front.draining:
            return
        await anyio.sleep(PAUSE_SECONDS)


class LiveEvents:
    """The events of one front: each is made once, for all viewers."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._made: tuple[int, str] = 0, ""  # the snapshot and the status of the last event
        self._event = b""

    def event(self, made: Snapshot) -> bytes:
        health = self._front.health()
        if self._made != (made.number, health.status):
            self._made, self._event = (made.number, health.status), data_event(to_json(self._told(made, health)))
        return self._event

    def _told(self, made: Snapshot, health: Health) -> LiveEvent:
        front, steps, tree = self._front, made.steps, made.tree
        return LiveEvent(
            made.number,
            made.seconds,
            health.status,
            health.cause,
            made.counts,
            [asdict(copy) for copy in made.copies],
            LiveRows(*(numbers(getattr(made.rows, name)) for name in made.rows.__struct_fields__)),
            numbers(made.queue),
            LiveSteps(
                steps.last, seconds(steps.seconds), seconds(steps.idle), numbers(steps.rows), numbers(steps.tokens)
            ),
            LivePages(made.pages.each, made.pages.owners),
            LiveTree(
                numbers(tree.parents), numbers(tree.pages), numbers(tree.locks), numbers(tree.hidden), heads(tree.heads)
            ),
            [LiveChannel(each.actor, each.waiting, each.capacity) for each in (*made.channels, *front.channels())],
            [LiveAssets(each.kind, each.state, each.count) for each in made.assets],
            [
                LiveTier(each.tier, each.pages, each.used, LivePages(each.map.each, each.map.owners))
                for each in made.tiers
            ],
            made.ceiling,
            front.board.total(Counter.VIEWERS),
            front.board.total(Counter.REQUESTS),
        )


def heads(column: bytes) -> list[list[int]]:
    """HEAD ids of each node, without the -1 that stand for none."""
    ids = numbers(column)
    found = [ids[at : at + HEAD] for at in range(0, len(ids), HEAD)]
    return [head if head[-1] >= 0 else head[: head.index(-1)] for head in found]


LIVE: Final = web.AppKey("live", LiveEvents)


def numbers(column: bytes) -> list[int]:
    """An int32 column."""
    return array("i", column).tolist()


def seconds(column: bytes) -> list[float]:
    """A float32 column, in whole microseconds."""
    return [int(1e6 * each + 0.5) / 1e6 for each in array("f", column)]


ROUTES = (Route("GET", "/live/events", live_events, events=(LiveEvent,), done=False),)
