"""CPU time of the front and of the core for a request, where routers are told of the cache, and where they are not.

    python -m bench.http.cache_events [--characters 2000] [--streams 16] [--turns 5] [--rounds 4] [--json FILE]

The echo model answers chats of so many characters with one token, whole, over kept connections; each prompt is another
one, so that pages are evicted all along. `off` is a server without --cache-events, `on` one with it, `read` one with a
reader of /v1/cache/events as well, whose own CPU time is not counted. Servers take turns, and ratios are of one turn.
Linux alone.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import anyio

from bench.http.cpu import HERE, REQUESTS, request, start, wait
from bench.lib.figures import shown
from bench.lib.processes import children, cpu_seconds, fronts
from engine.client.bench.process import free_port

KINDS = ("off", "on", "read")
CACHED = 8  # prompts of each client that the cache has room for


class Server(NamedTuple):
    kind: str
    port: int
    pid: int
    core: int


async def answered(port: int, characters: int, numbers: Iterator[int]) -> int:
    """Send `REQUESTS` chats, each with a number of its own at the beginning; how many were answered."""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        for _ in range(REQUESTS):
            text = f"{next(numbers)} " + "What is it that you know of this? " * (characters // 34)
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0}
            await stream.send(request("/v1/chat/completions", body))
            data = bytearray()
            while not data.endswith(b"}"):
                data += await stream.receive(1 << 16)
                assert data.startswith(b"HTTP/1.1 200"), data[:200]
    return REQUESTS


async def load(server: Server, characters: int, streams: int, numbers: Iterator[int]) -> tuple[int, int]:
    """How many requests were answered, and how many bytes of events came meanwhile."""
    done: list[int] = []
    read = [0]

    async def one() -> None:
        done.append(await answered(server.port, characters, numbers))

    async def follow() -> None:
        async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
            await stream.send(b"GET /v1/cache/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            while True:
                read[0] += len(await stream.receive(1 << 16))

    async with anyio.create_task_group() as following:
        if server.kind == "read":
            following.start_soon(follow)
        async with anyio.create_task_group() as group:
            for _ in range(streams):
                group.start_soon(one)
        following.cancel_scope.cancel()
    return sum(done), read[0]


def measure(server: Server, options: argparse.Namespace, numbers: Iterator[int]) -> tuple[float, float]:
    """Microseconds of the front's and of the core's CPU time for each request."""
    processes = fronts(server.pid), [server.core]
    before = [sum(map(cpu_seconds, pids)) for pids in processes]
    count = 0
    for _ in range(options.rounds):
        more, read = anyio.run(load, server, options.characters, options.streams, numbers)
        assert (read > 1000) == (server.kind == "read"), "events come where they are asked for"
        count += more
    after = [sum(map(cpu_seconds, pids)) for pids in processes]
    spent = [(end - begin) / count * 1e6 for begin, end in zip(before, after, strict=True)]
    return spent[0], spent[1]


def started(stack: ExitStack, kind: str, options: argparse.Namespace) -> Server:
    port = free_port()
    log = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    more = [] if kind == "off" else ["--cache-events"]
    kept = CACHED * (options.characters + 200)
    process = start(HERE, 1, options.streams, port, log, kept, *more)
    stack.callback(_end, process)
    wait(port, process, log)
    core = next(pid for pid, module in children(process.pid).items() if module == "engine.runtime.core")
    return Server(kind, port, process.pid, core)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="loads in a turn: a clock tick is 10 ms")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    values: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    numbers = itertools.count()
    with ExitStack() as stack:
        servers = [started(stack, kind, options) for kind in KINDS]
        for turn in range(options.turns + 1):
            for server in servers if turn % 2 else servers[::-1]:
                spent = measure(server, options, numbers)
                if turn:  # the first warms up
                    values[server.kind].append(spent)
    print(f"CPU us of a request of {options.characters} characters, {options.turns} turns, median (min - max)")
    for place, name in enumerate(("front", "core")):
        off = [spent[place] for spent in values["off"]]
        for kind in KINDS:
            one = [spent[place] for spent in values[kind]]
            ratio = statistics.median(mine / other for mine, other in zip(one, off, strict=True))
            print(f"  {name:6s} {kind:5s} {shown(one):32s} to off {ratio:.3f}")
    if options.json:
        options.json.write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
