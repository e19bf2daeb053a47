"""`engine up --replicas N`: N engines and a router before them, on one machine, by one command.

    engine up: the router ──┬── replica 0   `engine serve` on a free port of 127.0.0.1, which registers here
     (SIGTERM, Ctrl-C)      ├── replica 1   its share of the GPUs, or of the CPU's threads
                            └── replica 2 …

One that dies is started again, later each time; when it has died too often in a row, all ends. A signal
drains the router first, and then the replicas. Left out: replicas on other machines, which register by themselves
(`engine serve --register`).
"""

import logging
import secrets
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
from msgspec.structs import replace

from engine.config import Config
from engine.errors import ConfigError, counted
from engine.logs import set_up_logging
from engine.options.listening import ListenOptions
from engine.options.option import options_of
from engine.router.app import serve
from engine.router.options import RegisterOptions, RouterServerOptions, UpOptions, resolve_router
from engine.router.replica import Replica
from engine.router.router import Router
from engine.router.serve import drained, one_failure
from engine.runtime.channel import BlockingFrames
from engine.runtime.process import exit_cause, spawn
from engine.runtime.processors import cores
from engine.runtime.serve import try_line

MODULE = "engine.router.replica"
DELAYS = (0.0, 1.0, 2.0, 4.0)  # before a replica is started again that soon ended; no more often in a row
LIVED_SECONDS = 30.0  # after which it did not end soon
END_SECONDS = 5.0  # beyond its drain that a replica may take to end
POLL_SECONDS = 0.1
log = logging.getLogger("engine.router")


def run_up(config: Config, options: UpOptions, environ: Mapping[str, str]) -> int:
    """Run until a signal, or until replicas do not start; the exit code. Raises ConfigError."""
    set_up_logging(config.process.log_level)
    with one_failure():
        return anyio.run(Up(config, options, environ).run, backend_options={"use_uvloop": True})


def shares(config: Config, replicas: int, environ: Mapping[str, str], folder: Path = Path("/dev")) -> list[str | None]:
    """The GPUs of each replica; None for each where there are none, or none are wanted. Raises ConfigError where there
    are too few."""
    said = environ.get("CUDA_VISIBLE_DEVICES")
    found = sorted((path.name.removeprefix("nvidia") for path in folder.glob("nvidia[0-9]*")), key=int)
    if said is not None:
        found = [each.strip() for each in said.split(",") if each.strip()]
    if not found or config.process.device == "cpu":
        return [None] * replicas
    each = config.parallel.ranks
    if len(found) < replicas * each:
        raise ConfigError(
            f"--replicas is {replicas} with {counted(each, 'device')} each (--tp, --pp), but there are "
            f"{counted(len(found), 'GPU')}; ask for at most {len(found) // each}, or for --device cpu"
        )
    return [",".join(found[number * each : (number + 1) * each]) for number in range(replicas)]


class Up:
    """The router and its replicas. Raises ConfigError for what cannot work."""

    def __init__(self, config: Config, options: UpOptions, environ: Mapping[str, str]) -> None:
        self._code = 0
        self._count = options.replicas
        self._devices = shares(config, options.replicas, environ)
        said = {each.name: getattr(config.server, each.name) for each in options_of(ListenOptions)}
        own = replace(RouterServerOptions(), **said)
        routing = resolve_router({"policy": options.routing, "log_level": config.process.log_level}, environ)
        key = (routing.router.admin_key or (secrets.token_urlsafe(24),))[0]
        admin = tuple(dict.fromkeys((*(routing.router.admin_key or ()), key)))
        self._router = Router(replace(routing, server=own, router=replace(routing.router, admin_key=admin)))
        self._key = key
        self._config = config
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    async def run(self) -> int:
        """The exit code."""
        try:
            async with anyio.create_task_group() as group:
                listening = anyio.Event()
                urls: list[str] = []

                def started(url: str) -> None:
                    urls.append(url)
                    listening.set()

                group.start_soon(partial(serve, self._router, started=started))
                await listening.wait()
                log.info("%s and a router, which listens on %s", counted(self._count, "engine"), urls[0])
                for number in range(self._count):
                    group.start_soon(self._keep, number, self._config_of(urls[0]), group.cancel_scope)
                group.start_soon(self._announce, urls[0])
                await drained(self._router)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._end()
        return self._code

    def _config_of(self, url: str) -> Config:
        """What a replica is told."""
        config = self._config
        server = replace(config.server, host="127.0.0.1", port=0, api_key=None, api_key_file=None, cors_origins=())
        process = config.process
        if process.fronts == "auto":
            process = replace(process, fronts=1)
        if process.threads is None and self._devices[0] is None:
            process = replace(process, threads=max(1, cores() // self._count))
        register = RegisterOptions(register=(url,), register_key=self._key)
        return replace(config, server=server, process=process, register=register)

    async def _announce(self, url: str) -> None:
        """Say so once all are ready."""
        workers = self._router.fleet.workers
        while sum(each.may_take for each in workers.values()) < self._count:
            await anyio.sleep(POLL_SECONDS)
        log.info("all %d engines are ready on %s", self._count, url)
        model = next((each.models[0] for each in workers.values() if each.models), self._config.model.model)
        keyed = bool(self._config.server.api_key or self._config.server.api_key_file)
        print(try_line(url, model, "chat", keyed=keyed), flush=True)

    async def _keep(self, number: int, config: Config, scope: anyio.CancelScope) -> None:
        """Run replica `number`, again when it dies."""
        failures = 0
        while True:
            sock, process = spawn(MODULE)
            self._running[number] = process
            with sock:
                with suppress(ConnectionError):  # then it has ended, and the exit code says why
                    BlockingFrames(sock, receives=None).send(Replica(config, self._devices[number]))
                began = anyio.current_time()
                while process.poll() is None:
                    await anyio.sleep(POLL_SECONDS)
            failures = 1 if anyio.current_time() - began > LIVED_SECONDS else failures + 1
            cause = exit_cause(process.returncode)
            if failures >= len(DELAYS):
                log.error("replica %d has ended soon, %d times in a row: %s", number, failures, cause)
                self._code = 1
                scope.cancel()
                return
            delay = DELAYS[failures]
            log.error("replica %d has ended: %s; it is started again in %.0f s", number, cause, delay)
            await anyio.sleep(delay)

    async def _end(self) -> None:
        """End all replicas: politely, then not."""
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        with anyio.move_on_after(self._config.server.drain_seconds + END_SECONDS):
            for process in self._running.values():
                await anyio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        for process in self._running.values():
            if process.poll() is None:
                log.warning("a replica did not end, and is killed")
                process.kill()
                process.wait()
