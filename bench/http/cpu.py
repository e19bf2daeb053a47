"""CPU time that the front process spends on one event, and on one whole request, over HTTP.

    python -m bench.http.cpu [--against DIR] [--rows chat,requests,chats] [--streams 64] [--turns 5] [--json FILE]

The echo model answers, and the core is a process of its own (`--placement split`), so the front's CPU time is that of
HTTP, tokenizer and detokenizer alone. It is read from /proc before and after each load. The load comes from this
process over raw sockets. `chat` and `completions` stream replies of `TOKENS` tokens, and their figure is CPU time for
each event; the figure of `requests` and `chats` is CPU time for one request that is answered whole, one after another
on connections that are kept. `--against DIR` measures a second checkout, with the Python of its own .venv, in turn with
this one: the last column is the median of the turns' ratios. Linux alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread

from bench.lib.processes import cpu_seconds
from engine.client.bench.process import free_port

HERE = Path(__file__).parents[2]
TOKENS = 64
REQUESTS = 20  # that a connection sends, one after another
PATIENCE = 120.0
SAMPLING = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True} | SAMPLING),
    "completions": ("/v1/completions", {"prompt": "a", "stream": True} | SAMPLING),
    "requests": ("/v1/completions", {"prompt": "a"} | SAMPLING | {"max_tokens": 1}),
    "chats": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | SAMPLING | {"max_tokens": 1}),
}

WHOLE = ("requests", "chats")


def start(checkout: Path, port: int, log: Any) -> "subprocess.Popen[bytes]":
    """`engine serve` of `checkout` on `port`, its core in a process of its own."""
    python = sys.executable if checkout == HERE else str(checkout / ".venv/bin/python")
    options = ["--model", "echo", "--placement", "split", "--port", str(port), "--max-running", "256"]
    command = [python, "-m", "engine.cli", "serve", *options]
    return subprocess.Popen(command, cwd=checkout, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


async def streamed(port: int, sent: bytes) -> int:
    """Send one request and read its stream to the end; how many events came."""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(sent)
        data = bytearray()
        while not data.endswith(b"0\r\n\r\n"):
            data += await stream.receive(1 << 16)
            assert data.startswith(b"HTTP/1.1 200"), data[:200]
    return data.count(b"data: ")


async def kept(port: int, sent: bytes) -> int:
    """Send `REQUESTS` requests one after another on one connection; how many were answered."""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        for _ in range(REQUESTS):
            await stream.send(sent)
            data = bytearray()
            while not data.endswith(b"}"):
                data += await stream.receive(1 << 16)
                assert data.startswith(b"HTTP/1.1 200"), data[:200]
    return REQUESTS


async def load(port: int, row: str, streams: int) -> int:
    """`streams` clients at once; how many events or requests they had."""
    sent, client, done = request(*BODIES[row]), kept if row in WHOLE else streamed, []

    async def one() -> None:
        done.append(await client(port, sent))

    async with anyio.create_task_group() as group:
        for _ in range(streams):
            group.start_soon(one)
    return sum(done)


def wait(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Until the server answers a request; SystemExit when it ends before or does not within two minutes."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE and process.poll() is None:
        try:
            anyio.run(streamed, port, request(*BODIES["completions"]))
            return
        except (OSError, AssertionError, anyio.EndOfStream):
            time.sleep(0.2)
    raise SystemExit(f"the server on port {port} did not start")


def measure(port: int, pid: int, row: str, streams: int) -> float:
    """Microseconds of the front's CPU time for each event or request."""
    before = cpu_seconds(pid)
    count = anyio.run(load, port, row, streams)
    return (cpu_seconds(pid) - before) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rows", default=",".join(BODIES))
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="loads in a turn: a clock tick is 10 ms")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checkouts = [HERE, *([options.against.resolve()] if options.against else [])]
    rows: dict[str, list[list[float]]] = {row: [[] for _ in checkouts] for row in options.rows.split(",")}
    with ExitStack() as stack:
        servers = []
        for checkout in checkouts:
            port = free_port()
            process = start(checkout, port, subprocess.DEVNULL)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            wait(port, process)
            servers.append((port, process.pid))
        for turn in range(options.turns + 1):
            for row, values in rows.items():
                order = list(zip(servers, values, strict=True))
                for (port, pid), into in order if turn % 2 else order[::-1]:
                    spent = [measure(port, pid, row, options.streams) for _ in range(options.rounds)]
                    if turn:  # the first warms up
                        into.append(statistics.fmean(spent))
    print(f"{options.streams} clients, {options.turns} turns; us of the front's CPU time, median (min - max)")
    for row, values in rows.items():
        cells = [f"{statistics.median(one):7.1f} ({min(one):.1f} - {max(one):.1f})" for one in values]
        ratios = [ours / theirs for ours, theirs in zip(values[0], values[-1], strict=True)]
        ratio = f"  ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
        print(f"{row:12s} {'   against '.join(cells)}{ratio if options.against else ''}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
