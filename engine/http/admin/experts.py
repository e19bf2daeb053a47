"""Routes that tell how a mixture's tokens spread over its experts, and where those lie.

`/expert_distribution` is the map: all that a page needs for a heat map of layers and experts, and for the balance of
ranks over time. Beside it, what was counted between a start and a stop; /metrics has that too, once it has begun.
"""

from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import anyio
from aiohttp import web

from engine.errors import EngineError
from engine.http.openapi import Route
from engine.http.service import SERVICE, Service
from engine.http.wire import Reply, json_response
from engine.messages.questions import (
    CountAction,
    CountExperts,
    ExpertCounts,
    ExpertMap,
    LookAtExperts,
    RebalanceExperts,
)

SCRAPE_SECONDS = 2.0  # metrics do not wait longer for the device, and tell what was counted last


class CountingReply(Reply, frozen=True):
    counting: bool


class DistributionReply(Reply, frozen=True):
    """`counts[i][e]` tokens chose expert e in layer `layers[i]`; each token counts once for each of its experts."""

    counting: bool
    layers: tuple[int, ...]
    counts: list[list[int]]


class WindowReply(Reply, frozen=True):
    """Steps up to number `step`, from the window before on: their `choices` of experts, the largest load of a rank over
    the mean one (`balance`), and the share of choices that went elsewhere than in the window before (`drift`)."""

    step: int
    choices: int
    balance: float
    drift: float


class ExpertMapReply(Reply, frozen=True):
    """Of layer `layers[i]`: `counts[i][e]` choices of expert e since the start, `placement[i][r]` the experts that rank
    group r holds, in the order of their slots, `loads[i][r]` how many of those choices it would compute as experts lie
    now, and `balance[i]` the largest of these over their mean. `moved` layers have been rearranged so far, and
    `waiting` ones still will be. `windows` are the last ones, oldest first."""

    layers: tuple[int, ...]
    ranks: int
    counts: list[list[int]]
    placement: list[list[list[int]]]
    loads: list[list[float]]
    balance: list[float]
    moved: int
    waiting: int
    windows: list[WindowReply]


class RebalanceReply(Reply, frozen=True):
    """So many `layers` are looked at, one after the other, and rearranged where that gains something."""

    layers: int


async def look(request: web.Request) -> web.Response:
    """Tell where experts lie, how often each was chosen, and how even that is, by layer and over time."""
    return json_response(map_reply(await request.app[SERVICE].front.ask(LookAtExperts())))


async def rebalance(request: web.Request) -> web.Response:
    """Move experts between devices so that each has as much to do, by what was chosen since this was last asked."""
    return json_response(RebalanceReply(await request.app[SERVICE].front.ask(RebalanceExperts())))


async def start(request: web.Request) -> web.Response:
    """Count from nothing on how many tokens choose each expert."""
    return json_response(CountingReply((await _changed(request.app[SERVICE], "start")).counting))


async def stop(request: web.Request) -> web.Response:
    """Count no more; what was counted can still be dumped."""
    return json_response(CountingReply((await _changed(request.app[SERVICE], "stop")).counting))


async def dump(request: web.Request) -> web.Response:
    """Tell how many tokens chose each expert, by layer, since the start."""
    counted = await _counts(request.app[SERVICE], "look")
    rows = lined(array("q", counted.counts), len(counted.layers))
    return json_response(DistributionReply(counted.counting, counted.layers, rows))


def map_reply(found: ExpertMap) -> ExpertMapReply:
    lines, ranks = len(found.layers), found.ranks
    loads = lined(array("d", found.loads), lines)
    places = [lined(line, ranks) for line in lined(array("i", found.placement), lines)]
    balance = [max(line) * ranks / sum(line) if any(line) else 1.0 for line in loads]
    windows = [WindowReply(each.step, each.choices, each.balance, each.drift) for each in found.windows]
    counts = lined(array("q", found.counts), lines)
    return ExpertMapReply(found.layers, ranks, counts, places, loads, balance, found.moved, found.waiting, windows)


def lined(numbers: Sequence[Any], lines: int) -> list[list[Any]]:
    """`numbers` in so many lines of the same length."""
    each = len(numbers) // max(lines, 1)
    return [list(numbers[line * each : (line + 1) * each]) for line in range(lines)]


async def _changed(service: Service, action: CountAction) -> ExpertCounts:
    """The counts after `action`; the /metrics of every front show them from now on."""
    counted = await _counts(service, action)
    service.metrics.row.note_experts()
    return counted


async def _counts(service: Service, action: CountAction) -> ExpertCounts:
    """The counts after `action`, which /metrics shows from now on."""
    changes = service.metrics.rows.expert_changes()
    service.metrics.experts.counted = counted = await service.front.ask(CountExperts(action))
    service.metrics.experts.changes = changes
    return counted


async def refresh(service: Service) -> None:
    """Asks the device for what it has counted, if it counts, or another front has heard more of it; and of a mixture
    for its last window, which waits for no step; stages of a pipeline wait for each other."""
    known, info = service.metrics.experts, service.front.info
    if info is not None and info.mixture:
        with anyio.move_on_after(SCRAPE_SECONDS), suppress(EngineError):
            service.metrics.mixture.found = await service.front.ask(LookAtExperts(now=False))
    counts = known.counted is not None and known.counted.counting
    if not counts and known.changes == service.metrics.rows.expert_changes():
        return
    with anyio.move_on_after(SCRAPE_SECONDS):
        try:
            await _counts(service, "look")
        except EngineError:  # it is going down: the page tells what was counted last
            return


ROUTES = (
    Route("POST", "/expert_distribution/rebalance", rebalance, gives=RebalanceReply),
    Route("GET", "/expert_distribution", look, gives=ExpertMapReply),
    Route("POST", "/expert_distribution/start", start, gives=CountingReply),
    Route("POST", "/expert_distribution/stop", stop, gives=CountingReply),
    Route("GET", "/expert_distribution/dump", dump, gives=DistributionReply),
    Route("POST", "/expert_distribution/dump", dump, gives=DistributionReply),
)
