"""Serve with several front processes: the sockets first, then device and front processes, then the core in this one.

    serve_fronts ── early workers, early fronts: they import ──> boot once it is known that a start can work
          └──────── core, hub, fronts.py, signals

As in serve.py, what this module imports at its top is what starting the processes takes.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from socket import socket
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from engine.config import Config
from engine.http.listening import bound, url_of
from engine.runtime.board import Board
from engine.runtime.process import Start, spawn
from engine.runtime.serve import Service, check_server, early_workers

if TYPE_CHECKING:
    from engine.runtime.fronts import StartFront

log = logging.getLogger("engine")


@contextmanager
def early_fronts(board: Board, sockets: Sequence[Sequence[socket]]) -> "Iterator[StartFront]":
    """Starts the front processes, which import, and ends them with the block; what it yields starts that of a number,
    these first."""
    assert board.descriptor is not None
    inherited = [(board.descriptor, *(each.fileno() for each in own)) for own in sockets]
    early = [spawn("engine.runtime.front_process", *descriptors) for descriptors in inherited]
    left = dict(enumerate(early))
    try:
        yield lambda number: left.pop(number, None) or spawn("engine.runtime.front_process", *inherited[number])
    finally:
        for _, process in early:
            process.kill()
        for sock, process in early:
            process.wait()
            sock.close()


def serve_fronts(config: Config, count: int, began: float) -> int:
    """Serve over HTTP with so many fronts until a signal or a failure; the process's exit code."""
    sockets = bound(config.server, count)
    board = Board.shared(count)
    with early_workers(config) as start, early_fronts(board, sockets) as start_front:
        run = partial(_serve, config, board, sockets, start, start_front, began=began)
        return anyio.run(run, backend_options={"use_uvloop": True})


async def _serve(
    config: Config,
    board: Board,
    sockets: Sequence[Sequence[socket]],
    start: Start,
    start_front: "StartFront",
    *,
    began: float,
) -> int:
    from engine.http.log import LoadLog
    from engine.http.origins import warn_of_any_origin
    from engine.plugin.checkpoints import open_checkpoint
    from engine.plugin.registry import Plugins
    from engine.runtime.actor import supervise
    from engine.runtime.core import core_actors, say_scheduling
    from engine.runtime.fronts import FrontProcesses
    from engine.runtime.hub import Hub

    keyed = check_server(config.server)
    warn_of_any_origin(config.server)
    plugins = Plugins.load(config.model.plugins)
    say_scheduling(plugins, config)
    # Here, before the fronts do the same, as the model may be on its way from the hub.
    checkpoint = await anyio.to_thread.run_sync(open_checkpoint, plugins, config.model.model, abandon_on_cancel=True)
    name = (*config.server.served_model_name, checkpoint.name())[0]
    hub = Hub(board.count)
    hub.on_stats.append(LoadLog().on_stats)
    actors, hub.scheduler = core_actors(config, hub, start, board.count)
    fronts = FrontProcesses(config, hub, board, sockets, start_front, name)
    log.info("%d front processes serve HTTP", board.count)
    async with supervise(*actors, fronts), anyio.create_task_group() as group:
        service = Service(fronts, config.server, group, began=began, keyed=keyed)
        service.start()
        await fronts.listening.wait()
        service.started(url_of(config.server.host, sockets[0][0].getsockname()[1]))
    return service.code
