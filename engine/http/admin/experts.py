"""Routes that tell how a mixture's tokens spread over its experts: counted between a start and a stop.

The counts are of layers and experts, enough for a heat map; /metrics has them too, once they have been started.
"""

from array import array

import anyio
from aiohttp import web

from engine.errors import EngineError
from engine.http.openapi import Route
from engine.http.service import SERVICE, Service
from engine.http.wire import Reply, json_response
from engine.messages.questions import CountAction, CountExperts, ExpertCounts

SCRAPE_SECONDS = 2.0  # metrics do not wait longer for the device, and tell what was counted last


class CountingReply(Reply, frozen=True):
    counting: bool


class DistributionReply(Reply, frozen=True):
    """`counts[i][e]` tokens chose expert e in layer `layers[i]`; each token counts once for each of its experts."""

    counting: bool
    layers: tuple[int, ...]
    counts: list[list[int]]


async def start(request: web.Request) -> web.Response:
    """Count from nothing on how many tokens choose each expert."""
    return json_response(CountingReply((await _changed(request.app[SERVICE], "start")).counting))


async def stop(request: web.Request) -> web.Response:
    """Count no more; what was counted can still be dumped."""
    return json_response(CountingReply((await _changed(request.app[SERVICE], "stop")).counting))


async def dump(request: web.Request) -> web.Response:
    """Tell how many tokens chose each expert, by layer, since the start."""
    counted = await _counts(request.app[SERVICE], "look")
    counts = array("q", counted.counts).tolist()
    each = len(counts) // len(counted.layers)
    rows = [counts[first : first + each] for first in range(0, len(counts), each)]
    return json_response(DistributionReply(counted.counting, counted.layers, rows))


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
    """Asks the device for what it has counted, if it counts, or another front has heard more of it."""
    known = service.metrics.experts
    counts = known.counted is not None and known.counted.counting
    if not counts and known.changes == service.metrics.rows.expert_changes():
        return
    with anyio.move_on_after(SCRAPE_SECONDS):
        try:
            await _counts(service, "look")
        except EngineError:  # it is going down: the page tells what was counted last
            return


ROUTES = (
    Route("POST", "/expert_distribution/start", start, gives=CountingReply),
    Route("POST", "/expert_distribution/stop", stop, gives=CountingReply),
    Route("GET", "/expert_distribution/dump", dump, gives=DistributionReply),
    Route("POST", "/expert_distribution/dump", dump, gives=DistributionReply),
)
