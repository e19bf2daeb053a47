"""`engine router` as a process: it serves until a signal, which lets what is open come to its end for a while."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import anyio

from engine import __version__
from engine.errors import counted
from engine.logs import set_up_logging
from engine.router.app import serve
from engine.router.options import RouterConfig
from engine.router.router import Router
from engine.runtime.actor import first_failure
from engine.runtime.allocator import give_back_large_blocks, keep_for_good

POLL_SECONDS = 0.05
log = logging.getLogger("engine.router")


def run_router(config: RouterConfig) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises ConfigError."""
    set_up_logging(config.router.log_level)
    give_back_large_blocks()
    with one_failure():
        anyio.run(_serve, config, backend_options={"use_uvloop": True})
    return 0


@contextmanager
def one_failure() -> Iterator[None]:
    """Raise the first failure of a task group by itself: people are told that one."""
    try:
        yield
    except BaseExceptionGroup as failures:
        failure = first_failure(failures)
        raise failure from failure.__cause__


async def _serve(config: RouterConfig) -> None:
    router = Router(config)

    def started(url: str) -> None:
        keep_for_good()
        log.info("engine %s: routing by %s on %s", __version__, config.router.policy, url)

    async with anyio.create_task_group() as group:
        group.start_soon(partial(serve, router, started=started))
        await drained(router)
        group.cancel_scope.cancel()


async def drained(router: Router) -> None:
    """Return once a signal has come and what was open has ended, or had the time of --drain-seconds; or at once with a
    second signal."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        async for _ in received:
            if router.draining:
                return
            router.draining = True
            break
        if count := router.open:
            log.info(
                "draining: %s may go on for up to %.0f s", counted(count, "request"), router.config.server.drain_seconds
            )
        async with anyio.create_task_group() as group:

            async def second() -> None:
                async for _ in received:
                    group.cancel_scope.cancel()

            group.start_soon(second)
            with anyio.move_on_after(router.config.server.drain_seconds):
                while router.open:
                    await anyio.sleep(POLL_SECONDS)
            group.cancel_scope.cancel()
