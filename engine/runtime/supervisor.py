"""Start an engine of several front processes around the core in this one: what launch.py is to one front.

    early_fronts ── sockets; front processes, which import ──> boot once it is known that a start can work
    open_fronts  ── core, hub, fronts.py

What this module imports at its top is what starting the processes takes, as in serve.py, which adds signals.
"""

import logging
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from socket import socket
from typing import TYPE_CHECKING, NamedTuple

import anyio.to_thread

from engine.config import Config
from engine.http.listening import bound, url_of
from engine.runtime.board import Board
from engine.runtime.process import Start, end_early, spawn

if TYPE_CHECKING:
    from engine.runtime.fronts import FrontProcesses, StartFront

MODULE = "engine.runtime.front_process"
LONGEST, SHORT = 60, "/tmp"  # the path of a Unix socket has 104 bytes or a few more
log = logging.getLogger("engine")


class EarlyFronts(NamedTuple):
    """What several fronts share, and what starts the process of one."""

    board: Board
    sockets: Sequence[Sequence[socket]]
    start: "StartFront"
    url: str
    folder: str  # of sockets for each other


@contextmanager
def early_fronts(config: Config, count: int) -> Iterator[EarlyFronts]:
    """Listens, and starts so many front processes, which import; ends them with the block. Raises ConfigError if the
    host and port cannot be listened on."""
    sockets = bound(config.server, count)
    board = Board.shared(count)
    assert board.descriptor is not None
    inherited = [(board.descriptor, *(each.fileno() for each in own)) for own in sockets]
    early = [spawn(MODULE, *descriptors) for descriptors in inherited]
    left = dict(enumerate(early))
    folder = tempfile.TemporaryDirectory(prefix="engine-", dir=SHORT if len(tempfile.gettempdir()) > LONGEST else None)
    url = url_of(config.server.host, sockets[0][0].getsockname()[1])
    try:
        yield EarlyFronts(
            board, sockets, lambda number: left.pop(number, None) or spawn(MODULE, *inherited[number]), url, folder.name
        )
    finally:
        end_early(early)
        for each in {each for own in sockets for each in own}:
            each.close()
        board.close()
        folder.cleanup()


@asynccontextmanager
async def open_fronts(
    config: Config, early: EarlyFronts, start: Start | None = None
) -> "AsyncIterator[FrontProcesses]":
    """A running engine as who serves it sees it; fronts and device may still be loading. `start` starts a worker.

    Raises ConfigError and PluginError for what cannot work."""
    from engine.http.log import LoadLog
    from engine.http.origins import warn_of_any_origin
    from engine.plugin.checkpoints import open_checkpoint
    from engine.plugin.registry import Plugins
    from engine.runtime.actor import supervise
    from engine.runtime.core import core_actors, say_scheduling
    from engine.runtime.fronts import FrontProcesses
    from engine.runtime.hub import Hub

    warn_of_any_origin(config.server)
    plugins = Plugins.load(config.model.plugins)
    say_scheduling(plugins, config)
    # Before the fronts do the same, and in a thread that a Ctrl-C may leave behind: the model may be on its way here.
    checkpoint = await anyio.to_thread.run_sync(open_checkpoint, plugins, config.model.model, abandon_on_cancel=True)
    hub = Hub(early.board.count)
    hub.on_stats.append(LoadLog().on_stats)
    actors, hub.scheduler = core_actors(config, hub, start, plugins, early.board.count)
    name = (*config.server.served_model_name, checkpoint.name())[0]
    fronts = FrontProcesses(
        config, hub, early.board, listening=early.sockets, start=early.start, model_name=name, folder=early.folder
    )
    log.info("%d front processes serve HTTP", early.board.count)
    async with supervise(*actors, fronts):
        yield fronts
