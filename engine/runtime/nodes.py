"""Host 0's side of an engine on several hosts: who has joined, and the workers that the others run for it.

    node n ──Join──> Nodes ──StartRanks──> node n ──Attach, a connection a rank──> RemoteChild, for the group

A worker of another host speaks to this one over a connection of its own, so a plan takes no detour. A node that falls
silent, or whose connection ends, is gone: its ranks' frames end, and the group with them. It may join again.
Left out: what a node does (node.py), and when a group is started (actors/executor.py).
"""

import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from engine.config import Config, ServerOptions
from engine.errors import ConfigError, EngineError
from engine.messages import FromNode, FromWorker
from engine.messages.control import Ping
from engine.messages.nodes import Attach, Bye, EndRanks, Join, RankEnded, StartRanks, TurnedAway, Welcome
from engine.runtime.alike import alike, differences
from engine.runtime.changes import Changes
from engine.runtime.channel import Frames, open_channel
from engine.runtime.interfaces import interface, resolved, watched
from engine.runtime.meeting import meeting
from engine.runtime.process import LINGER_SECONDS, Child
from engine.runtime.token import SECONDS, admit, read_token

log = logging.getLogger("engine.nodes")

PING_SECONDS = 1.0
SILENT_SECONDS = 8.0  # after which a node is gone
FAREWELL_SECONDS = 1.0
WAIT_SECONDS = 10.0  # between two lines of the log that name whom a start waits for


class Node:
    """One that has joined."""

    def __init__(self, join: Join, address: str) -> None:
        self.number = join.node
        self.own = join
        self.name = f"node {join.node} at {address}"
        self.heard = time.monotonic()
        self.cause = ""  # why it is gone
        self.gone = anyio.Event()
        self.children: dict[tuple[int, int], RemoteChild] = {}  # by life and rank
        self.tell, self.told = open_channel()

    def leave(self, cause: str) -> None:
        """It is gone, and the frames of its ranks end."""
        if not self.gone.is_set():
            self.cause = cause
            self.gone.set()
            for child in self.children.values():
                child.ended(f"its host is gone: {cause}")


class RemoteProcess:
    """A worker of a node as a process: to be ended, with all of its life, by the node."""

    pid = 0

    def __init__(self, end: Callable[[], None]) -> None:
        self.kill = end

    def wait(self) -> int:
        raise AssertionError("a remote worker is waited for by its node")


class RemoteChild(Child[FromWorker]):
    """A worker that a node has started, and the frames to it, once it is `attached`."""

    def __init__(self, node: Node, life: int) -> None:
        self.process = RemoteProcess(partial(node.tell.send_nowait, EndRanks(life)))
        self.place = f" ({node.name})"
        self.node = node
        self.attached = anyio.Event()
        self._cause = ""
        self._ended = anyio.Event()
        self._stream: anyio.abc.SocketStream | None = None

    def attach(self, frames: Frames[FromWorker], stream: anyio.abc.SocketStream) -> None:
        """It speaks over `stream`."""
        self.frames, self._stream = frames, stream
        self.attached.set()

    def ended(self, cause: str) -> None:
        """It has ended, or nobody can know: either way its frames end."""
        if not self._ended.is_set():
            self._cause = cause
            self._ended.set()
            if self._stream is not None:
                shut(self._stream)
            self.attached.set()

    def config(self, config: Config) -> Config:
        """What it is booted with: no secrets of the server, and what is its node's own affair."""
        own = self.node.own
        replace = msgspec.structs.replace
        return replace(
            config,
            model=replace(config.model, model=own.model),
            process=replace(config.process, threads=own.threads, log_level=own.log_level),
            parallel=replace(config.parallel, node_rank=own.node, dist_interface=own.interface),
            server=ServerOptions(),
        )

    async def end(self) -> None:
        self.process.kill()
        with anyio.CancelScope(shield=True):
            if not self.node.gone.is_set():
                with anyio.move_on_after(LINGER_SECONDS):
                    await self._ended.wait()
            if self._stream is not None:
                await anyio.aclose_forcefully(self._stream)

    async def exit_cause(self) -> str:
        with anyio.move_on_after(LINGER_SECONDS):
            await self._ended.wait()
        return self._cause or "its connection has ended, and its host does not say why"

    @property
    def why(self) -> str:
        """Why it could not be attached; empty where it was."""
        return self._cause


def shut(stream: anyio.abc.SocketStream) -> None:
    """Have whoever reads `stream` see its end, though the peer does not answer."""
    raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
    with suppress(OSError), socket.socket(fileno=os.dup(raw.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


class Nodes:
    """All hosts but this one."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for what cannot work."""
        self._config = config
        self._count = config.parallel.nnodes
        host, self.port = meeting(config.parallel)
        self.interface, self.address = interface(config.parallel.dist_interface or resolved(host))
        self._token = read_token(config.parallel.token_file)
        self._alike: dict[str, str] | None = None
        self._joined: dict[int, Node] = {}
        self._changes = Changes()
        self._life = 0
        self.farewell = ""  # why the engine ends, where it fails

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Listen for nodes. Raises ConfigError where that cannot be."""
        where = f"{self.address}:{self.port}"
        self._alike = await anyio.to_thread.run_sync(alike, self._config, abandon_on_cancel=True)
        try:
            listener = await anyio.create_tcp_listener(local_host=self.address, local_port=self.port)
        except OSError as error:
            raise ConfigError(f"--rendezvous: this host cannot listen on {where}: {error}") from None
        log.info("nodes join at %s (%s)", where, self.interface)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch)
            tasks.start_soon(listener.serve, self._arrived)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    # ── the workers of a life ────────────────────────────────────────────────────────────────

    async def start(self) -> list[RemoteChild]:
        """Waits for all nodes, and has them start their workers; these in the order of their ranks, each attached or
        ended. They are the caller's to end."""
        await self._all_joined()
        self._life += 1
        each, life = self._config.parallel.node_ranks, self._life
        children: list[RemoteChild] = []
        for number in range(1, self._count):
            node, ranks = self._joined[number], tuple(range(number * each, (number + 1) * each))
            node.children.clear()
            for rank in ranks:
                child = node.children[life, rank] = RemoteChild(node, life)
                children.append(child)
            node.tell.send_nowait(StartRanks(life, ranks))
        for child in children:
            await child.attached.wait()
        return children

    async def _all_joined(self) -> None:
        """Waits for whom there is none; says for whom."""
        while missing := [number for number in range(1, self._count) if number not in self._joined]:
            listed = ", ".join(map(str, missing))
            log.info(
                "waiting for node%s %s of %d to join at %s:%d (engine serve --node-rank %d …)",
                "s" if len(missing) > 1 else "", listed, self._count, self.address, self.port, missing[0],
            )  # fmt: skip
            until = time.monotonic() + WAIT_SECONDS
            while len(missing) == len([n for n in range(1, self._count) if n not in self._joined]):
                with anyio.move_on_after(until - time.monotonic()) as scope:
                    await self._changes.next()
                if scope.cancelled_caught:
                    break

    @contextmanager
    def meeting_place(self) -> Iterator[str]:
        """Where the ranks' own rendezvous is to be, on the interface of this host: a port that is kept free for rank 0
        by a socket that is bound to it, too, and does not listen."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((self.address, 0))
            yield f"tcp://{self.address}:{sock.getsockname()[1]}"

    # ── who comes and goes ───────────────────────────────────────────────────────────────────

    async def _arrived(self, stream: anyio.abc.SocketStream) -> None:
        """Someone has connected: hear them out, if they have our token."""
        address = str(stream.extra(anyio.abc.SocketAttribute.remote_address)[0])
        kept = False
        try:
            trusted = False
            with anyio.move_on_after(SECONDS):
                trusted = await admit(stream, self._token)
            if not trusted:
                log.warning("a connection from %s does not have our token, and is refused", address)
                return
            watched(stream.extra(anyio.abc.SocketAttribute.raw_socket), SILENT_SECONDS)
            frames: Frames[Any] = Frames(stream, FromNode | FromWorker)
            first = await anext(aiter(frames), None)
            match first:
                case Attach():
                    kept = self._attach(first, frames, stream)
                case Join():
                    await self._join(first, frames, address)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError, msgspec.DecodeError) as error:
            log.debug("a connection from %s has ended: %s", address, error)
        finally:
            if not kept:
                await anyio.aclose_forcefully(stream)

    def _attach(self, said: Attach, frames: Frames[FromWorker], stream: anyio.abc.SocketStream) -> bool:
        for node in self._joined.values():
            child = node.children.get((said.life, said.rank))
            if child is not None and not child.attached.is_set():
                child.attach(frames, stream)
                return True
        return False

    async def _join(self, join: Join, frames: Frames[Any], address: str) -> None:
        """Have it as one of us until its connection ends, if it may be."""
        node = Node(join, address)
        cause = self._refusal(join, node.name)
        if cause:
            log.warning("turned away: %s", cause)
            await frames.send(TurnedAway(cause))
            return
        self._joined[node.number] = node
        self._changes.tell()
        log.info("%s has joined", node.name)
        node.tell.send_nowait(Welcome())
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._talk, node, frames)
                tasks.start_soon(self._hear, node, frames)
                await node.gone.wait()
                tasks.cancel_scope.cancel()
        finally:
            node.leave("this one ends")
            if self._joined.get(node.number) is node:
                del self._joined[node.number]
            self._changes.tell()
            log.info("%s is gone: %s", node.name, node.cause)

    def _refusal(self, join: Join, name: str) -> str:
        if not 0 < join.node < self._count:
            return f"{name}: --node-rank is {join.node}, and node 0 has --nnodes {self._count}"
        if (held := self._joined.get(join.node)) is not None:
            return f"{held.name} has joined already: two hosts have --node-rank {join.node}"
        assert self._alike is not None
        return differences(name, join.alike, self._alike)

    async def _talk(self, node: Node, frames: Frames[Any]) -> None:
        """Pass on what there is to tell; a node that is still there when this engine ends is told that."""
        try:
            with suppress(anyio.BrokenResourceError):
                async for message in node.told:
                    await frames.send(message)
        finally:
            if not node.gone.is_set():
                with anyio.move_on_after(FAREWELL_SECONDS, shield=True), suppress(anyio.BrokenResourceError):
                    await frames.send(Bye(self.farewell))

    async def _hear(self, node: Node, frames: Frames[Any]) -> None:
        async for message in frames:
            node.heard = time.monotonic()
            if isinstance(message, RankEnded) and (child := node.children.get((message.life, message.rank))):
                child.ended(message.cause)
        node.leave("its connection has ended; its engine was ended, or killed")

    async def _watch(self) -> None:
        """Ask nodes for a word each second; who has none for long is gone. While this process was held up itself,
        nobody read what they said."""
        while True:
            due = time.monotonic() + PING_SECONDS
            await anyio.sleep(PING_SECONDS)
            late = time.monotonic() - due
            for node in list(self._joined.values()):
                node.heard += late
                node.tell.send_nowait(Ping())
                if (quiet := time.monotonic() - node.heard) > SILENT_SECONDS:
                    node.leave(f"no word from it for {quiet:.0f} s; it is down, or the link to it is cut")


class LostNode(EngineError):
    """A node has left while its workers were to start."""


def check_attached(children: Sequence[RemoteChild]) -> None:
    """Raises LostNode where a node has left, and ConfigError where a worker could not be started."""
    for child in children:
        if child.node.gone.is_set():
            raise LostNode(f"{child.node.name} has left: {child.node.cause}")
        if child.why:
            raise ConfigError(f"a worker of {child.node.name} cannot be started: {child.why}")
