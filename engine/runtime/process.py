"""Child processes of an engine: started with a socket, spoken to in frames, and ended with their parent.

Left out: what runs in them, and when one is started again.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import anyio
import anyio.abc
import anyio.to_thread

from engine.config import Config
from engine.runtime.channel import Frames

SMALL_MACHINE = 4  # processors up to which one process for front and core is the faster placement


def placement(config: Config) -> str:
    """`single` or `split`, with `auto` decided."""
    if config.process.placement != "auto":
        return config.process.placement
    return "single" if (os.cpu_count() or 1) <= SMALL_MACHINE else "split"


class Process(Protocol):
    """A started process, as subprocess.Popen has it."""

    pid: int

    def wait(self) -> int: ...
    def kill(self) -> None: ...


Start = Callable[[], tuple[socket.socket, Process]]  # our end of its socket, and the process


def spawn(module: str) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """Start `python -m module FD` with a connected socket as descriptor FD, and return our end of it.

    In a session of its own, so that Ctrl-C in a terminal reaches only the parent, which drains. The
    child notices a dead parent by the end of the stream, and we a dead child.
    """
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        theirs.close()
    return ours, process


async def connected(sock: socket.socket, kind: Any) -> Frames[Any]:
    """The frames, of messages of `kind`, over our end of a socket from `spawn`."""
    return Frames(await anyio.abc.UNIXSocketStream.from_socket(sock), kind)


async def put_down(process: Process, frames: Frames[Any] | None) -> None:
    """End a process, however far it has come, and close the frames to it."""
    with anyio.CancelScope(shield=True):
        process.kill()
        await anyio.to_thread.run_sync(process.wait)
        if frames is not None:
            await frames.aclose()


@asynccontextmanager
async def frames_of(sock: socket.socket, process: Process, kind: Any) -> AsyncIterator[Frames[Any]]:
    """The frames, of messages of `kind`, of a process from `spawn`. It does not outlive the context."""
    frames: Frames[Any] | None = None
    try:
        frames = await connected(sock, kind)
        yield frames
    finally:
        await put_down(process, frames)


async def ended(process: Process) -> int:
    """The exit code of a process whose stream has ended; it is killed if it lingers."""
    with anyio.move_on_after(5):
        return await anyio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
    process.kill()
    return await anyio.to_thread.run_sync(process.wait)


def exit_cause(code: int) -> str:
    """A process's exit code in words."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "; the system may have run out of memory (see dmesg)" if name == "SIGKILL" else ""
        return f"it was killed by {name}{hint}"
    return f"it exited with code {code}"
