"""What a router adds to a request: microseconds of CPU for one event and one request, and milliseconds for its client.

    python -m bench.router.cost [--streams 64,256] [--tokens 256] [--turns 5] [--policy round_robin] [--json FILE]

- `paced`: a fake worker gives each stream an event of one token every 50 ms, so that no two events come in one read.
  The floor beside it is a bare relay in Python (`bare_relay`), which writes what it reads.
- `paced front`: `engine serve` with a model whose steps take 50 ms (`paced_echo`) and its core in another process. So
  the front, too, writes each event by itself. Its CPU time in the same load, the router before it, stands beside the
  router's, and the ratio is that of the two.
- `front`: the same with the echo model, which writes as fast as it can, so one read often has several events.
- `requests`: answers that are not streamed, of the fake worker, one after another on connections that are kept.
- `added`: p50 and p99 of such a request by one client, over the router and without it, in turn.

CPU time is that of the router's one process, from /proc before and after each load; the figure of a stream's event has
the request's own share in it. The load comes from this process over raw sockets. Linux alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import anyio

from bench.http.cpu import BODIES, HERE, kept, load, request, start, wait
from bench.lib.figures import shown
from bench.lib.processes import cpu_seconds, fronts
from engine.client.bench.process import free_port

PACE = 0.05  # seconds
SAMPLES = 400  # requests of one client, for percentiles


def spawn(words: list[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", *words]
    return subprocess.Popen(command, cwd=HERE, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def ready(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Until the router at `port` has a worker."""
    for _ in range(300):
        try:
            anyio.run(kept, port, request(*BODIES["requests"]))
            return
        except (OSError, AssertionError, anyio.EndOfStream):
            assert process.poll() is None, "the router has ended"
            time.sleep(0.1)
    raise SystemExit(f"no router on port {port}")


def spent(pids: list[int], port: int, row: str, streams: int, tokens: int) -> list[float]:
    """Microseconds of each process's CPU time for one event or request."""
    before = [cpu_seconds(pid) for pid in pids]
    count = anyio.run(load, port, row, streams, tokens)
    return [(cpu_seconds(pid) - first) / count * 1e6 for pid, first in zip(pids, before, strict=True)]


async def latencies(port: int) -> list[float]:
    """Milliseconds of each of SAMPLES requests, one after another on one connection."""
    sent, found = request(*BODIES["requests"]), []
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        for _ in range(SAMPLES):
            began = time.perf_counter()
            await stream.send(sent)
            data = b""
            while not data.endswith(b"}"):
                data += await stream.receive(1 << 16)
            found.append(1e3 * (time.perf_counter() - began))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="64,256")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--policy", default="round_robin")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    streams = [int(each) for each in options.streams.split(",")]
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with ExitStack() as stack:

        def run(words: list[str]) -> "subprocess.Popen[bytes]":
            process = spawn(words, stack.enter_context(tempfile.TemporaryFile()))
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            return process

        def served(port: int, *more: str) -> int:
            """The process id of the front of an engine on `port`."""
            log = stack.enter_context(tempfile.TemporaryFile())
            serving = start(HERE, 1, max(streams), port, log, max(512, 2 * options.tokens), *more)
            stack.callback(serving.wait, 30)
            stack.callback(serving.terminate)
            wait(port, serving, log)
            return fronts(serving.pid)[0]

        def routed(worker: int) -> "tuple[int, subprocess.Popen[bytes]]":
            port = free_port()
            words = ["engine.cli", "router", "--workers", f"http://127.0.0.1:{worker}", "--port", str(port)]
            return port, run([*words, "--policy", options.policy, "--log-level", "warning"])

        fake, engine, slow, bare = (free_port() for _ in range(4))
        run(["bench.router.fake_worker", str(fake), str(PACE)])
        relay = run(["bench.router.bare_relay", str(bare), str(fake)])
        pairs = [
            ("paced front", slow, served(slow, "--model", "paced-echo", "--plugins", "bench/router/paced_echo.py")),
            ("front", engine, served(engine)),
        ]
        (paced, router), *before = routed(fake), *(routed(port) for _, port, _ in pairs)
        for port, process in ((paced, router), *before):
            ready(port, process)
        for turn in range(options.turns + 1):
            if turn == 1:
                found.clear()  # the first warms up
            for count in streams:
                (ours,) = spent([router.pid], paced, "chat", count, options.tokens)
                note(f"paced, {count} streams: router, us an event", ours)
                (floor,) = spent([relay.pid], bare, "chat", count, options.tokens)
                note(f"paced, {count} streams: bare relay, us an event", floor)
                note(f"paced, {count} streams: router / bare relay", ours / floor)
                for (row, _, front), (port, other) in zip(pairs, before, strict=True):
                    ours, theirs = spent([other.pid, front], port, "chat", count, options.tokens)
                    note(f"{row}, {count} streams: router, us an event", ours)
                    note(f"{row}, {count} streams: front, us an event", theirs)
                    note(f"{row}, {count} streams: router / front", ours / theirs)
                (ours,) = spent([router.pid], paced, "requests", count, 1)
                note(f"requests, {count} connections: router, us a request", ours)
            direct, over = anyio.run(latencies, fake), anyio.run(latencies, paced)
            for name, share in (("p50", 0.5), ("p99", 0.99)):
                place = int(share * SAMPLES)
                note(f"added {name}, ms", over[place] - direct[place])
                note(f"direct {name}, ms", direct[place])
    print(f"{options.turns} turns, {options.tokens} tokens a stream, policy {options.policy}; median (min - max)")
    for name, values in found.items():
        print(f"{name:50s} {shown(values, 2)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
