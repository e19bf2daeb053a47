"""Thousands of connections at once, half of them dropped amid their reply: at the end the server holds nothing.

    python -m bench.http.soak [--connections 10000] [--fronts 2] [--rounds 3] [--tokens 16] [--json FILE]

All connections of a round are open before the first asks for a streamed reply. Every other one asks for a long reply,
and is closed, or reset, after some of its events. Then no request may run and no page be held, /health says ok, and
each process has the descriptors that it had, and its memory grows no further: the first round warms up, and from the
second round to the last one a process may grow by `--growth` MiB. The client is one process with raw sockets, whose own
addresses (127.0.0.2 and after) leave ports enough. The exit code is 1 if a check fails. Linux alone.
"""

import argparse
import asyncio
import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any, cast

import uvloop

from bench.lib.processes import children, descriptors, resident
from bench.lib.served import Served

SPARE = 512  # descriptors of a process beside its connections
ADDRESSES = 8  # of the client
AT_A_TIME = 128  # connections that are being opened
KEPT = 16  # descriptors of a process that may be more than before: of pools, made when they are first needed
LONGER = 16  # times as many tokens are asked for by who leaves
TAIL = 64  # bytes, in which a whole reply says that it is done
SECONDS = 600.0  # for a round
SETTLE_SECONDS = 60.0


class Stream(asyncio.Protocol):
    """One streamed reply, which is left after `drop` events (None: read to the end)."""

    def __init__(self, drop: int | None, reset: bool) -> None:
        self.drop = drop
        self.reset = reset
        self.events = 0
        self.outcome = ""
        self.ended = asyncio.get_running_loop().create_future()
        self._tail: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> None:
        self._transport.write(request)
        if self.drop == 0:
            self._leave("dropped")

    def data_received(self, data: bytes) -> None:
        if self._tail is None and not data.startswith(b"HTTP/1.1 200"):
            self._leave(data[9:12].decode("latin-1"))
            return
        self.events += data.count(b"data: ")  # one that is cut in two is not counted
        self._tail = ((self._tail or b"") + data)[-TAIL:]
        if self._tail.endswith(b"0\r\n\r\n") and b"[DONE]" in self._tail:
            self._leave("whole")
        elif self.drop is not None and self.events >= self.drop:
            self._leave("dropped")

    def connection_lost(self, error: Exception | None) -> None:
        self._leave("lost")

    def _leave(self, outcome: str) -> None:
        if not self.outcome:
            self.outcome = outcome
            if self.reset and outcome == "dropped":
                self._transport.abort()
            else:
                self._transport.close()
            self.ended.set_result(None)


def request_of(port: int, tokens: int) -> bytes:
    body = json.dumps({"prompt": "a", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def one_round(port: int, count: int, tokens: int, rng: random.Random) -> dict[str, int]:
    """How many connections came to which end."""
    whole, left = (request_of(port, length) for length in (tokens, LONGER * tokens))
    loop, gate = asyncio.get_running_loop(), asyncio.Semaphore(AT_A_TIME)

    async def opened(index: int) -> Stream:
        drop = rng.randrange(tokens // 2) if index % 2 else None
        async with gate:
            address = (f"127.0.0.{2 + index % ADDRESSES}", 0)
            made = loop.create_connection(
                lambda: Stream(drop, reset=index % 4 == 1), "127.0.0.1", port, local_addr=address
            )
            return (await made)[1]

    async with asyncio.timeout(SECONDS):
        streams = await asyncio.gather(*map(opened, range(count)))
        for stream in streams:
            stream.ask(whole if stream.drop is None else left)
            await asyncio.sleep(0)
        await asyncio.gather(*(stream.ended for stream in streams))
    found: dict[str, int] = {}
    for stream in streams:
        found[stream.outcome] = found.get(stream.outcome, 0) + 1
    return found


def state_of(server: Served) -> dict[str, dict[str, int]]:
    """Descriptors and MiB of each process, by what it runs and its number; not of a spare worker, which is still being
    loaded."""
    spares = server.spares()
    found = {"main": server.pid} | {
        f"{module.removeprefix('engine.')} {number}": pid
        for number, (pid, module) in enumerate(sorted(children(server.pid).items()))
        if pid not in spares
    }
    return {name: {"descriptors": descriptors(pid), "MiB": resident(pid)} for name, pid in found.items()}


def settled(server: Served, before: dict[str, dict[str, int]] | None) -> tuple[dict[str, Any], list[str]]:
    """The state once nothing runs any more, and what is not as it should be when the time is over."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        state = state_of(server)
        wrong = [f"{count} {name}" for name, count in server.held().items() if count]
        for name, now in state.items():
            allowed = (before or state).get(name, now)["descriptors"] + KEPT
            if now["descriptors"] > allowed:
                wrong.append(f"{name} has {now['descriptors']} descriptors, more than {allowed}")
        if not server.ready():
            wrong.append("/health does not say ok")
        if not wrong or time.monotonic() > deadline:
            return state, wrong
        time.sleep(0.2)


def soaked(server: Served, given: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """All rounds: what came of each, and what failed."""
    port = int(server.url.rpartition(":")[2])
    rng = random.Random(0)
    before, failed = settled(server, None)
    rounds: list[dict[str, Any]] = []
    for number in range(given.rounds):
        began = time.monotonic()
        outcomes = uvloop.run(one_round(port, given.connections, given.tokens, rng))
        seconds = time.monotonic() - began
        state, wrong = settled(server, before)
        failed += [f"round {number + 1}: {each}" for each in wrong]
        if outcomes != {"whole": -(-given.connections // 2), "dropped": given.connections // 2}:
            failed.append(f"round {number + 1}: the replies ended as {outcomes}, not half whole and half dropped")
        rounds.append({"outcomes": outcomes, "seconds": seconds, "processes": state})
        memory = ", ".join(f"{name} {one['descriptors']} fd {one['MiB']} MiB" for name, one in state.items())
        print(f"round {number + 1}: {outcomes} in {seconds:.1f} s; {memory}", flush=True)
    if len(rounds) > 2:
        second, last = rounds[1]["processes"], rounds[-1]["processes"]
        for name in second.keys() & last.keys():
            if (grown := last[name]["MiB"] - second[name]["MiB"]) > given.growth:
                failed.append(f"{name} grew by {grown} MiB from the second round to the last, more than {given.growth}")
    return rounds, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--fronts", default="2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="of a reply")
    parser.add_argument("--growth", type=int, default=16, help="MiB")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    needed = given.connections + SPARE
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(
            f"{needed} descriptors are needed and the hard limit is {hard}; raise it, or lower --connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else hard, hard))
    flags = ["--model", "echo", "--kv-tokens", "262144", "--max-running", "256"]
    flags += ["--max-waiting", str(given.connections), "--max-connections", str(needed)]
    if given.fronts != "1":
        flags += ["--fronts", given.fronts]
    with Served(*flags) as server:
        rounds, failed = soaked(server, given)
    for each in failed:
        print(f"failed: {each}")
    if given.json:
        given.json.write_text(json.dumps({"rounds": rounds, "failed": failed}, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
