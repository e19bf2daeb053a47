"""Where workers are named beside --workers and HTTP: a file, which may change, and the addresses of a DNS name.

Each of them has its own workers: one that it no longer names is drained, and one that was added over HTTP stays. A file
that cannot be read, and a name that is not known for a moment, change nothing.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

from engine.errors import ConfigError
from engine.http.keys import stamp_of
from engine.router.workers import Fleet, named

FILE_SECONDS: Final = 1.0
DNS_SECONDS: Final = 5.0
log = logging.getLogger("engine.router")


def discover(fleet: Fleet) -> list[Callable[[], Coroutine[Any, Any, None]]]:
    """Add the workers that the options name, and return the tasks that look for others. Raises ConfigError."""
    options = fleet.config.router
    for url in options.workers:
        fleet.add(url, "--workers")
    tasks: list[Callable[[], Coroutine[Any, Any, None]]] = []
    if options.workers_file is not None:
        become(fleet, "--workers-file", read_workers(options.workers_file))
        tasks.append(partial(follow_file, fleet, options.workers_file))
    if options.workers_dns is not None:
        name, _, port = options.workers_dns.rpartition(":")
        if not name or not port.isdecimal():
            raise ConfigError(f"--workers-dns is {options.workers_dns!r}, but takes NAME:PORT")
        tasks.append(partial(follow_name, fleet, name, int(port)))
    return tasks


def become(fleet: Fleet, source: str, urls: list[str]) -> None:
    """Let the workers of `source` be those at `urls`."""
    wanted = {named(url) for url in urls}
    for url in wanted:
        if url not in fleet.workers or fleet.workers[url].draining:
            fleet.add(url, source)
    for worker in list(fleet.workers.values()):
        if worker.source == source and worker.url not in wanted:
            fleet.drain(worker)


def read_workers(path: str) -> list[str]:
    """The URLs in the file: one a line, without blank lines and those that begin with `#`. Raises ConfigError."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--workers-file {path} cannot be read: {error}") from None
    return [named(line) for line in lines if line and not line.startswith("#")]


async def follow_file(fleet: Fleet, path: str) -> None:
    """Read the file again whenever it has changed."""
    before = stamp_of(path)
    while True:
        await asyncio.sleep(FILE_SECONDS)
        if (stamp := stamp_of(path)) == before:
            continue
        before = stamp
        try:
            urls = read_workers(path)
        except ConfigError as error:
            log.error("%s; the workers stay as they are", error)
            continue
        become(fleet, "--workers-file", urls)


async def follow_name(fleet: Fleet, name: str, port: int) -> None:
    """Ask for the addresses of `name` again and again."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except OSError as error:
            log.error("--workers-dns %s: %s; the workers stay as they are", name, error)
        else:
            addresses = sorted({str(entry[4][0]) for entry in found})
            become(fleet, "--workers-dns", [f"http://{_bracketed(each)}:{port}" for each in addresses])
        await asyncio.sleep(DNS_SECONDS)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
