"""A host other than the first: joins it, runs workers for it, and ends them when it no longer wants them.

It serves no HTTP and holds no model of its own. Each worker gets a connection to host 0, opened and proven here, and is
a child of this process. When host 0 says so it all ends; when host 0 is only gone, the workers are ended and it is
called again for a while. Left out: host 0's side (nodes.py).
"""

import logging
import signal
import socket
import time
from collections import defaultdict
from functools import partial
from typing import Protocol

import anyio
import anyio.abc
import anyio.to_thread

from engine import __version__
from engine.config import Config
from engine.errors import ConfigError, EngineError
from engine.logs import set_up_logging
from engine.messages import ToNode
from engine.messages.control import Ping
from engine.messages.nodes import Attach, Bye, EndRanks, Join, RankEnded, StartRanks, TurnedAway, Welcome
from engine.runtime.alike import alike
from engine.runtime.channel import BlockingFrames, Frames
from engine.runtime.interfaces import interface, resolved, watched
from engine.runtime.meeting import check_hosts, meeting
from engine.runtime.process import Process, exit_cause, spawn_on
from engine.runtime.token import SECONDS, enter, read_token

log = logging.getLogger("engine.nodes")

RETRY_SECONDS = 300.0  # that host 0 is called in vain before this one gives up
CALL_SECONDS = 1.0  # between two calls
SAY_SECONDS = 10.0
PING_SECONDS = 1.0
SILENT_SECONDS = 8.0  # after which host 0 is gone


class StartOn(Protocol):
    """Starts a worker on a connected socket, which stays the caller's to close."""

    def __call__(self, sock: socket.socket) -> Process: ...


def start_worker(sock: socket.socket) -> Process:
    """As it is usual."""
    return spawn_on("engine.worker", sock)


def run_node(config: Config, start: StartOn = start_worker) -> int:
    """Run workers for host 0 until that ends; the process's exit code. Raises ConfigError if it does not want us."""
    set_up_logging(config.process.log_level)
    parallel = config.parallel
    log.info("engine %s: node %d of %d", __version__, parallel.node_rank, parallel.nnodes)
    return anyio.run(partial(_run, config, start), backend_options={"use_uvloop": True})


async def _run(config: Config, start: StartOn) -> int:
    check_hosts(config.parallel)
    caller = Caller(config)
    said = await anyio.to_thread.run_sync(alike, config, abandon_on_cancel=True)
    code: list[int] = []
    refused: list[EngineError] = []

    async def work() -> None:
        try:
            code.append(await _stay(config, start, caller, said))
        except EngineError as error:
            refused.append(error)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for _ in received:
                break
        log.info("ending")
        tasks.cancel_scope.cancel()
    if refused:
        raise refused[0]
    return code[0] if code else 0


async def _stay(config: Config, start: StartOn, caller: "Caller", said: dict[str, str]) -> int:
    """Join host 0, again and again; the exit code."""
    until, told = time.monotonic() + RETRY_SECONDS, 0.0
    while True:
        try:
            sock = await anyio.to_thread.run_sync(caller.call, abandon_on_cancel=True)
        except OSError as error:
            now = time.monotonic()
            if now > until:
                log.error("node 0 has not answered at %s for %.0f s: %s", caller.where, RETRY_SECONDS, error)
                return 1
            if now - told > SAY_SECONDS:
                log.info("waiting for node 0 at %s: %s", caller.where, error)
                told = now
            await anyio.sleep(CALL_SECONDS)
            continue
        bye = await Stay(config, start, caller, said).live(sock)
        if bye is not None:
            if bye.cause:
                log.error("node 0 has ended: %s", bye.cause)
            else:
                log.info("node 0 has ended")
            return 1 if bye.cause else 0
        until = time.monotonic() + RETRY_SECONDS


class Caller:
    """Opens connections to host 0, which are trusted then."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for what cannot work."""
        host, port = meeting(config.parallel)
        self.where = f"{host}:{port}"
        self._host, self._port = host, port
        self._token = read_token(config.parallel.token_file)
        said = config.parallel.dist_interface
        self._own = interface(said) if said else None

    def call(self) -> socket.socket:
        """Raises OSError where host 0 does not answer, NotTrusted where it is not ours."""
        source = (self._own[1], 0) if self._own else None
        try:
            address = resolved(self._host)
        except ConfigError as error:  # its name may not be known yet
            raise OSError(str(error)) from None
        sock = socket.create_connection((address, self._port), timeout=SECONDS, source_address=source)
        try:
            watched(sock, SILENT_SECONDS)
            enter(sock, self._token, self.where)
        except BaseException:
            sock.close()
            raise
        return sock

    def interface(self, sock: socket.socket) -> str:
        """The interface that workers are to use: the chosen one, or that of a connection to host 0."""
        return (self._own or interface(sock.getsockname()[0]))[0]


class Stay:
    """One time of being joined, and the workers of it."""

    def __init__(self, config: Config, start: StartOn, caller: Caller, said: dict[str, str]) -> None:
        self._config = config
        self._start = start
        self._caller = caller
        self._said = said
        self._heard = time.monotonic()
        self._workers: dict[int, list[Process]] = defaultdict(list)  # by life
        self._over = 0  # the last life that is to end

    async def live(self, sock: socket.socket) -> Bye | None:
        """Until host 0 says Bye, or is gone. Raises ConfigError where it turns us away."""
        own = self._interface_of(sock)
        frames: Frames[ToNode] = Frames(await anyio.abc.SocketStream.from_socket(sock), ToNode)
        last: Bye | TurnedAway | None = None
        try:
            async with anyio.create_task_group() as tasks:
                await frames.send(self._join(own))
                tasks.start_soon(self._watch, frames, tasks)
                async for message in frames:
                    self._heard = time.monotonic()
                    if isinstance(message, Bye | TurnedAway):
                        last = message
                        break
                    self._handle(message, frames, tasks)
                tasks.cancel_scope.cancel()
        except* anyio.BrokenResourceError:
            pass
        finally:
            await self._end_all(frames)
        if isinstance(last, TurnedAway):
            raise ConfigError(last.cause)
        if last is None:
            log.warning("node 0 is gone; its workers here have ended, and it is called again")
        return last

    def _interface_of(self, sock: socket.socket) -> str:
        return self._caller.interface(sock)

    def _join(self, own: str) -> Join:
        config = self._config
        return Join(
            config.parallel.node_rank,
            self._said,
            config.model.model,
            config.process.threads,
            config.process.log_level,
            own,
        )

    def _handle(self, message: ToNode, frames: Frames[ToNode], tasks: anyio.abc.TaskGroup) -> None:
        match message:
            case Welcome():
                log.info("joined node 0 at %s", self._caller.where)
            case StartRanks():
                log.info("starting %s", ", ".join(f"rank {rank}" for rank in message.ranks))
                for rank in message.ranks:
                    tasks.start_soon(self._worker, message.life, rank, frames)
            case EndRanks():
                self._over = max(self._over, message.life)
                for process in self._workers.pop(message.life, ()):
                    process.kill()

    async def _worker(self, life: int, rank: int, frames: Frames[ToNode]) -> None:
        """Start one, and say when and why it has ended."""
        try:
            process = await anyio.to_thread.run_sync(self._started, life, rank)
        except OSError as error:
            await frames.send(RankEnded(life, rank, str(error)))
            return
        self._workers[life].append(process)
        if life <= self._over:  # it is no longer wanted
            process.kill()
        code = await anyio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        await frames.send(RankEnded(life, rank, exit_cause(code)))

    def _started(self, life: int, rank: int) -> Process:
        with self._caller.call() as sock:
            BlockingFrames(sock, receives=None).send(Attach(life, rank))
            return self._start(sock)

    async def _watch(self, frames: Frames[ToNode], tasks: anyio.abc.TaskGroup) -> None:
        """Say each second that we are there; end where host 0 has no word for long."""
        while (quiet := time.monotonic() - self._heard) < SILENT_SECONDS:
            await frames.send(Ping())
            due = time.monotonic() + PING_SECONDS
            await anyio.sleep(PING_SECONDS)
            self._heard += time.monotonic() - due  # while this process was held up, nobody read
        log.warning("no word from node 0 for %.0f s; it is down, or the link to it is cut", quiet)
        tasks.cancel_scope.cancel()

    async def _end_all(self, frames: Frames[ToNode]) -> None:
        """End all workers, and the connection."""
        processes = [process for workers in self._workers.values() for process in workers]
        for process in processes:
            process.kill()
        with anyio.CancelScope(shield=True):
            for process in processes:
                await anyio.to_thread.run_sync(process.wait)
            await frames.abort()
