"""Runs a server in a process of its own while it is measured: ours, or a peer's in its own environment."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread
import msgspec

from engine.config import Config, groups
from engine.errors import WorkerError
from engine.options.option import options_of

POLL = 0.01
PATIENCE = 600.0
GRACE = 20.0


class Started(msgspec.Struct, frozen=True):
    """A server that is ready: its URL and process, and when (perf_counter) it was started and was ready."""

    url: str
    pid: int
    began: float
    ready: float


def serve_command(config: Config, port: int) -> list[str]:
    """The command line of `engine serve` with exactly this configuration, on `port` of this machine.

    API keys are not in it, as all users of a machine see command lines; `serve_environment` has them."""
    server = msgspec.structs.replace(config.server, host="127.0.0.1", port=port)
    config = msgspec.structs.replace(config, server=server)
    command = [sys.executable, "-m", "engine.cli", "serve"]
    for group, struct in groups().items():
        for option in options_of(struct):
            value = getattr(getattr(config, group), option.name)
            if option.name in ("api_key", "register_key"):
                continue
            if isinstance(value, bool):
                command.append(option.flag if value else f"--no-{option.flag[2:]}")
            elif value not in (None, ()):
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                command.append(f"{option.flag}={text}")
    return command


def serve_environment(config: Config) -> dict[str, str]:
    """The variables that go with `serve_command`."""
    return {"ENGINE_API_KEY": ",".join(config.server.api_key)} if config.server.api_key else {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def running(
    command: Sequence[str],
    port: int,
    *,
    health: str = "/health",
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> AsyncIterator[Started]:
    """Run `command` in `folder`, a server on `port`, from when `health` answers 200 to the end of the context.

    Raises WorkerError with the last lines it wrote when it ends before, or is not ready within ten minutes.
    """
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        # In a session of its own: Ctrl-C is ours alone, and what it started can be ended with it.
        process = subprocess.Popen(  # noqa: ASYNC220 - starting is quick, and what follows waits without blocking
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
            cwd=folder,
        )
        try:
            async with aiohttp.ClientSession() as http:
                while not await _answers(http, url + health):
                    if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                        log.seek(0)
                        said = log.read()[-2000:].decode(errors="replace")
                        how = "is not ready" if process.returncode is None else f"ended with code {process.returncode}"
                        raise WorkerError(f"the server {how} after {time.perf_counter() - began:.0f} s:\n{said}")
                    await anyio.sleep(POLL)
            yield Started(url, process.pid, began, time.perf_counter())
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_end, process)


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process politely, then all that is left of its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
