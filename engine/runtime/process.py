"""Child processes of an engine: started with a socket, spoken to in frames, and ended with their parent.

Left out: what runs in them, and when one is started again.
"""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import anyio
import anyio.abc
import anyio.to_thread

from engine.config import Config
from engine.errors import ConfigError
from engine.runtime.channel import Frames
from engine.runtime.processors import processors

T = TypeVar("T")

SMALL_MACHINE = 4  # processors up to which one process for front and core is the faster placement
CORES_OF_A_FRONT = 4  # where a GPU makes tokens: one is the front's, and the others are for all else
MOST_FRONTS = 8  # that are started without being asked for
GPUS = tuple(map(Path, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))  # one of these is there beside a GPU
LINGER_SECONDS = 5.0  # that a process may take to end once it has closed its frames


def placement(config: Config) -> str:
    """`single` or `split`, with `auto` decided."""
    if config.process.placement != "auto":
        return config.process.placement
    return "single" if processors() <= SMALL_MACHINE else "split"


def fronts(config: Config) -> int:
    """How many front processes serve HTTP, with `auto` decided. Raises ConfigError for several where one process is to
    hold front and core.

    A CPU makes no more tokens than one front sends, and each front takes memory; nor is a core given away where there
    are few."""
    process = config.process
    if process.fronts == "auto":
        if process.placement != "auto" or process.device == "cpu" or not any(path.exists() for path in GPUS):
            return 1
        return min(max(processors() // CORES_OF_A_FRONT, 1), MOST_FRONTS)
    if process.fronts > 1 and process.placement != "auto":
        raise ConfigError(
            f"--placement is {process.placement} and --fronts is {process.fronts}; several fronts have a placement of "
            "their own: leave one of the options out"
        )
    return process.fronts


class Process(Protocol):
    """A started process, as subprocess.Popen has it."""

    pid: int

    def wait(self) -> int: ...
    def kill(self) -> None: ...


Start = Callable[[], tuple[socket.socket, Process]]  # our end of its socket, and the process


def spawn(module: str, *inherited: int) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """Start `python -m module FD` with a connected socket as descriptor FD, and return our end of it. It also has the
    descriptors `inherited`.

    In a session of its own, so that Ctrl-C in a terminal reaches only the parent, which drains. The
    child notices a dead parent by the end of the stream, and we a dead child.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        return ours, spawn_on(module, theirs, *inherited)


def spawn_on(module: str, sock: socket.socket, *inherited: int) -> "subprocess.Popen[bytes]":
    """As `spawn`, with a socket that is connected already; ours may be closed then."""
    return subprocess.Popen(
        [sys.executable, "-m", module, str(sock.fileno())],
        pass_fds=(sock.fileno(), *inherited),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


class Child(Generic[T]):
    """A process that `start` has started, and the frames to it. It does not outlive its context.

    `start` is the one seam between an engine and its processes. One of another host, whose frames travel over TCP, is
    a RemoteChild (nodes.py); `place` says so, for people."""

    place = ""

    def __init__(self, process: Process, frames: Frames[T]) -> None:
        self.process = process
        self.frames = frames

    @classmethod
    async def start(cls, start: Start, receives: Any) -> "Child[T]":
        """Start one that sends messages of the types `receives`. Raises OSError where the system starts no more."""
        sock, process = start()
        try:
            kind = anyio.abc.UNIXSocketStream if sock.family == socket.AF_UNIX else anyio.abc.SocketStream
            return cls(process, Frames(await kind.from_socket(sock), receives))
        except BaseException:
            sock.close()
            process.kill()
            process.wait()
            raise

    def config(self, config: Config) -> Config:
        """What it is told of `config`."""
        return config

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.end()

    async def end(self) -> None:
        """End it, however far it has come."""
        self.process.kill()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.process.wait)
            await self.frames.aclose()

    async def leave(self) -> None:
        """Close the frames, at which it ends by itself; or is ended if it lingers."""
        with anyio.CancelScope(shield=True):
            await self.frames.aclose()
            await self.exit_cause()

    async def exit_cause(self) -> str:
        """Why it has ended, in words, once its frames have; it is killed if it lingers."""
        with anyio.move_on_after(LINGER_SECONDS):
            return exit_cause(await anyio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True))
        self.process.kill()
        return exit_cause(await anyio.to_thread.run_sync(self.process.wait))


def end_early(early: Sequence[tuple[socket.socket, Process]]) -> None:
    """End processes that `spawn` has started, whoever has taken them over."""
    for _, process in early:
        process.kill()
    for sock, process in early:
        process.wait()
        sock.close()


async def end_all(children: Sequence[Child[Any]]) -> None:
    """End several, none of them waiting for another."""
    for child in children:
        child.process.kill()
    for child in children:
        await child.end()


def exit_cause(code: int) -> str:
    """A process's exit code in words."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "; the system may have run out of memory (see dmesg)" if name == "SIGKILL" else ""
        return f"it was killed by {name}{hint}"
    return f"it exited with code {code}"
