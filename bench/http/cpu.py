"""CPU time that the front processes spend on one event, and on one whole request, over HTTP.

    python -m bench.http.cpu [--against DIR] [--fronts 1,2,4] [--rows chat,requests,chats] [--streams 64,256,1024]
        [--tokens 64] [--turns 5] [--json FILE]

The echo model answers, and the core is a process of its own (`--placement split`, or the supervisor of several fronts),
so the fronts' CPU time is that of HTTP, tokenizer and detokenizer alone. It is read from /proc before and after each
load, and is the sum of all fronts. The last column is what as many cores as fronts could do in a second: fronts x
1,000,000 / microseconds. The load comes from this process over raw sockets. `chat` and `completions` stream replies of
`--tokens` tokens, and their figure is CPU time for each event, the request's own share among it: two runs with other
`--tokens` tell both apart. The figure of `requests` and `chats` is CPU time for one
request that is answered whole, one after another on connections that are kept. `--against DIR` measures a second
checkout, with the Python of its own .venv, in turn with this one, as one front; the ratio is the median of the turns'
ratios of our first server to it. Linux alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import anyio
import anyio.abc
import anyio.to_thread

from bench.lib.processes import cpu_seconds, fronts
from engine.client.bench.process import free_port

HERE = Path(__file__).parents[2]
REQUESTS = 20  # that a connection sends, one after another
PATIENCE = 120.0
SAMPLING = {"temperature": 0, "ignore_eos": True}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True} | SAMPLING),
    "completions": ("/v1/completions", {"prompt": "a", "stream": True} | SAMPLING),
    "requests": ("/v1/completions", {"prompt": "a"} | SAMPLING | {"max_tokens": 1}),
    "chats": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | SAMPLING | {"max_tokens": 1}),
}

WHOLE = ("requests", "chats")
THEIRS = "theirs"


class Server(NamedTuple):
    name: str
    port: int
    pid: int
    fronts: int


def start(
    checkout: Path, fronts: int, most: int, port: int, log: IO[bytes], kept: int, *more: str
) -> "subprocess.Popen[bytes]":
    """`engine serve` of `checkout` on `port` for `most` streams of at most `kept` tokens, its core in another process
    than its fronts; `more` are options."""
    python = sys.executable if checkout == HERE else str(checkout / ".venv/bin/python")
    options = ["--model", "echo", "--port", str(port), "--max-running", str(most), "--kv-tokens", str(kept * most)]
    options += ["--placement", "split"] if fronts == 1 else ["--fronts", str(fronts)]
    command = [python, "-m", "engine.cli", "serve", *options, *more]
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


async def load(port: int, row: str, streams: int, tokens: int) -> int:
    """`streams` clients at once; how many events or requests they had."""
    path, body = BODIES[row]
    sent, client, done = request(path, {"max_tokens": tokens} | body), kept if row in WHOLE else streamed, []

    async def one() -> None:
        done.append(await client(port, sent))

    async with anyio.create_task_group() as group:
        for _ in range(streams):
            group.start_soon(one)
    return sum(done)


def wait(port: int, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    """Until the server answers a request; SystemExit when it ends before or does not within two minutes."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE and process.poll() is None:
        try:
            anyio.run(streamed, port, request(*BODIES["completions"]))
            return
        except (OSError, AssertionError, anyio.EndOfStream):
            time.sleep(0.2)
    log.seek(0)
    raise SystemExit(f"the server on port {port} did not start:\n{log.read()[-2000:].decode(errors='replace')}")


def measure(server: Server, row: str, streams: int, tokens: int) -> float:
    """Microseconds of the fronts' CPU time for each event or request."""
    pids = fronts(server.pid)
    before = sum(map(cpu_seconds, pids))
    count = anyio.run(load, server.port, row, streams, tokens)
    return (sum(map(cpu_seconds, pids)) - before) / count * 1e6


def show(servers: list[Server], row: str, streams: int, values: list[list[float]]) -> None:
    """A line for each server; the last may be the other checkout."""
    for server, one in zip(servers, values, strict=True):
        middle = statistics.median(one)
        cell = f"{middle:7.1f} ({min(one):.1f} - {max(one):.1f})"
        ratio = ""
        if server.name == THEIRS:
            ratios = [ours / theirs for ours, theirs in zip(values[0], one, strict=True)]
            ratio = f"  ours / theirs {statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
        print(f"{row:12s} {streams:6d} {server.name:10s} {cell:26s} {server.fronts * 1e6 / middle:12,.0f}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--fronts", default="1")
    parser.add_argument("--rows", default=",".join(BODIES))
    parser.add_argument("--streams", default="64")
    parser.add_argument("--tokens", type=int, default=64, help="of a streamed reply")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="loads in a turn: a clock tick is 10 ms")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    streams = [int(each) for each in options.streams.split(",")]
    wanted = [(HERE, int(each), f"{each} fronts") for each in options.fronts.split(",")]
    if options.against:
        wanted.append((options.against.resolve(), 1, THEIRS))
    rows: dict[tuple[str, int], list[list[float]]] = {
        (row, count): [[] for _ in wanted] for row in options.rows.split(",") for count in streams
    }
    with ExitStack() as stack:
        servers = []
        for checkout, count, name in wanted:
            port = free_port()
            log = stack.enter_context(tempfile.TemporaryFile())
            process = start(checkout, count, max(streams), port, log, max(512, 2 * options.tokens))
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            wait(port, process, log)
            servers.append(Server(name, port, process.pid, count))
        for turn in range(options.turns + 1):
            for (row, count), values in rows.items():
                order = list(zip(servers, values, strict=True))
                for server, into in order if turn % 2 else order[::-1]:
                    spent = [measure(server, row, count, options.tokens) for _ in range(options.rounds)]
                    if turn:  # the first warms up
                        into.append(statistics.fmean(spent))
    print(f"{options.turns} turns; us of the fronts' CPU time, median (min - max); a second on a core for each front")
    for (row, count), values in rows.items():
        show(servers, row, count, values)
    if options.json:
        named = {f"{row} {count}": values for (row, count), values in rows.items()}
        options.json.write_text(json.dumps({"servers": [server.name for server in servers], **named}, indent=2))


if __name__ == "__main__":
    main()
