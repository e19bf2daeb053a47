"""What faults do to those who are not at fault: a server under kills, dropped streams, slow clients and mixed traffic.

    python -m bench.http.faults [--rows kills,drops,slow,readers,mixed] [--minutes 2] [--full] [--url URL] [--flags "…"]

Each row runs against a server of the default model that this script starts, with a probe beside it: one stream after
another, whose inter-token times are taken, and /health every 50 ms. A row prints a line or two; a check that does not
hold is named, and the exit code is then 1. `--full` takes the counts of a release (27 minutes on two cores), the
default about 6 minutes. With `--url` the server is one that runs already: no kills, and no figures of its processes.

kills    SIGKILLs of the worker under 32 streams: replies that end are those of an undisturbed server, others say why
drops    streams whose client goes away after a random number of events
slow     heads and bodies that come a byte at a time
readers  64 clients that read a byte a second
mixed    ever new schemas, tools, n, logprobs, aborts, refused and broken bodies, for `--minutes`
"""

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import aiohttp
import anyio
import anyio.abc
import anyio.to_thread

from bench.http import fault_traffic
from bench.lib.served import Served

STREAMS = 32
THREADS_KEPT = 16  # of a server's pools, which may grow to their size
DESCRIPTORS_KEPT = 8  # listening for what the first request of a kind started: a compiler, pipes
GROWTH_MIB = 24  # of the front between the middle of a row and its end
HEALTH_SECONDS = 0.05


class Sizes:
    """How much of each fault."""

    def __init__(self, full: bool, minutes: float | None) -> None:
        self.kills, self.rest = (100, 8.0) if full else (5, 8.0)
        self.drops = 2000 if full else 200
        self.slow, self.slow_seconds = (600, 20.0) if full else (100, 10.0)
        self.readers, self.reader_seconds = 64, 120.0 if full else 15.0
        self.minutes = minutes or (10.0 if full else 2.0)


class Probe:
    """A stream beside everything, and /health: milliseconds between tokens, and until an answer."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.gaps: list[float] = []
        self.health: list[float] = []
        self.failed = 0  # replies that did not end well

    async def run(self) -> None:
        async with aiohttp.ClientSession(self._url) as session, anyio.create_task_group() as group:
            group.start_soon(self._stream, session)
            group.start_soon(self._health, session)

    async def _stream(self, session: aiohttp.ClientSession) -> None:
        while True:
            reply = await fault_traffic.stream(session, "Once upon a time", 64, gaps=self.gaps)
            if reply.error:
                self.failed += 1
                await anyio.sleep(0.1)

    async def _health(self, session: aiohttp.ClientSession) -> None:
        while True:
            began = time.perf_counter()
            async with session.get("/health") as answer:
                await answer.read()
            self.health.append(1e3 * (time.perf_counter() - began))
            await anyio.sleep(HEALTH_SECONDS)

    def line(self) -> str:
        return f"probe ms between tokens {spread(self.gaps)}; /health ms {spread(self.health)}"


class Bench:
    """The server, its checks, and what has failed."""

    def __init__(self, url: str, served: Any, seed: int) -> None:
        self.url = url
        self.served = served
        self.random = random.Random(seed)
        self.failures: list[str] = []

    def check(self, row: str, name: str, holds: bool, said: object = "") -> None:
        if not holds:
            self.failures.append(f"{row}: {name}: {said}")
            print(f"  FAILED {name}: {said}", flush=True)

    async def figures(self) -> dict[str, int]:
        """Once nothing runs any more, the figures of the server."""
        if self.served is None:
            return {}
        found: dict[str, int] = {}
        for _ in range(100):
            found = await anyio.to_thread.run_sync(self.served.figures)
            if not found["running"] and not found["pages held"]:
                break
            await anyio.sleep(0.2)
        return found

    async def row(self, name: str, run: Callable[["Bench"], Awaitable[str]], *, lossless: bool = True) -> None:
        """One row with the probe beside it, and what it leaves. `lossless`: no reply of the probe may be cut."""
        before, began = await self.figures(), time.monotonic()
        probe = Probe(self.url)
        async with anyio.create_task_group() as group:
            group.start_soon(probe.run)
            said = await run(self)
            group.cancel_scope.cancel()
        print(f"{name:8s} {said}  [{time.monotonic() - began:.0f} s]\n         {probe.line()}", flush=True)
        if lossless:
            self.check(name, "the probe's replies end well", not probe.failed, f"{probe.failed} did not")
        after = await self.figures()
        if after:
            print("         " + ", ".join(f"{key} {before.get(key, 0)} → {value}" for key, value in after.items()))
            self.check(name, "no page is held and nothing runs", not after["pages held"] + after["running"], after)
            for key, kept in (("descriptors", DESCRIPTORS_KEPT), ("threads", THREADS_KEPT)):
                self.check(name, f"{key} are flat", after[key] <= before[key] + kept, f"{before[key]} → {after[key]}")


def spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "none"
    marks = statistics.quantiles(values, n=100, method="inclusive")
    return f"p50 {marks[49]:.1f}, p99 {marks[98]:.1f}, max {max(values):.0f}"


# ── rows ─────────────────────────────────────────────────────────────────────────────────────


def kills(sizes: Sizes) -> Callable[[Bench], Awaitable[str]]:
    async def run(bench: Bench) -> str:
        async with aiohttp.ClientSession(bench.url, connector=aiohttp.TCPConnector(limit=0)) as session:
            expected = await fault_traffic.references(session, STREAMS)
            ends, seconds, taken = Counter[str](), list[float](), 0
            over = False

            async def client() -> None:
                while not over:
                    prompt = bench.random.choice(list(expected))
                    reply = await fault_traffic.stream(session, prompt, expected[prompt][1])
                    ends[end := judged(reply, expected[prompt][0])] += 1
                    if end == "refused":
                        await anyio.sleep(0.2)

            async with anyio.create_task_group() as group:
                for _ in range(STREAMS):
                    group.start_soon(client)
                for _ in range(sizes.kills):
                    whole = ends["right"]
                    with anyio.move_on_after(60):
                        while ends["right"] == whole:
                            await anyio.sleep(0.02)
                    await anyio.sleep(bench.random.uniform(0.0, sizes.rest))
                    spares = bench.served.spares()
                    seconds.append(await anyio.to_thread.run_sync(bench.served.kill_worker))
                    taken += bench.served.workers[-1] in spares
                over = True
        for end in ends.keys() - {"right", "cut", "refused"}:
            bench.check("kills", "replies end as promised", False, f"{ends[end]} ended: {end}")
        seconds.sort()
        return (
            f"{len(seconds)} kills under {STREAMS} streams ({len(expected)} prompts): {dict(ends)}; death to ready "
            f"median {statistics.median(seconds):.1f} s, p90 {seconds[int(0.9 * (len(seconds) - 1))]:.1f}, "
            f"max {seconds[-1]:.1f}; a spare was there {taken} times"
        )

    return run


def judged(reply: Any, expected: str) -> str:
    """right, cut (with the promised error), refused (before it began), or what is wrong."""
    if not reply.error:
        return "right" if reply.text == expected else f"another text: {reply.text[:60]!r}"
    if reply.code not in ("worker_lost", "engine_unavailable", "starting"):
        return f"an error that was not promised: {reply.error[:120]}"
    if reply.status != 200:
        return "refused" if reply.status == 503 else f"status {reply.status}"
    return "cut" if expected.startswith(reply.text) else f"another text before the cut: {reply.text[:60]!r}"


def drops(sizes: Sizes) -> Callable[[Bench], Awaitable[str]]:
    async def run(bench: Bench) -> str:
        left, done = sizes.drops, Counter[str]()

        async def client() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                # A session of its own: closing it cuts the connection.
                async with aiohttp.ClientSession(bench.url) as session:
                    events = bench.random.randrange(40)
                    reply = await fault_traffic.stream(session, f"Tale {left}", 64, leave_after=events)
                    done["failed" if reply.error else "dropped"] += 1

        async with anyio.create_task_group() as group:
            for _ in range(STREAMS):
                group.start_soon(client)
        bench.check("drops", "each stream began", not done["failed"], dict(done))
        return f"{done['dropped']} streams dropped after 0 to 39 events, {STREAMS} at a time"

    return run


def slow(sizes: Sizes) -> Callable[[Bench], Awaitable[str]]:
    async def run(bench: Bench) -> str:
        ends = Counter[str]()

        async def client(number: int) -> None:
            whole = fault_traffic.HEAD + b"Content-Length: 4000\r\n\r\n" if number % 2 else b""
            rest = b'{"prompt": "' + b"a" * 4000 if number % 2 else fault_traffic.HEAD
            ends[await fault_traffic.dribble(bench.url, whole, rest, sizes.slow_seconds)] += 1

        async with anyio.create_task_group() as group:
            for number in range(sizes.slow):
                group.start_soon(client, number)
                await anyio.sleep(0.005)
        if bench.served is not None:  # whose --read-timeout is ours
            bench.check("slow", "each is answered 408", ends.keys() == {"status 408"}, dict(ends))
        return (
            f"{sizes.slow} slow heads and bodies, a byte in half a second for {sizes.slow_seconds:.0f} s: {dict(ends)}"
        )

    return run


def readers(sizes: Sizes) -> Callable[[Bench], Awaitable[str]]:
    async def run(bench: Bench) -> str:
        read = list[int]()

        async def client(number: int) -> None:
            read.append(await fault_traffic.trickle(bench.url, f"Story {number}", sizes.reader_seconds))

        async with anyio.create_task_group() as group:
            for number in range(sizes.readers):
                group.start_soon(client, number)
        bench.check("readers", "each reads something", min(read) > 0, f"{read.count(0)} read nothing")
        return f"{sizes.readers} readers of a byte a second for {sizes.reader_seconds:.0f} s: {sum(read)} bytes"

    return run


def mixed(sizes: Sizes) -> Callable[[Bench], Awaitable[str]]:
    async def run(bench: Bench) -> str:
        ends, wrong, samples = Counter[str](), Counter[str](), list[dict[str, int]]()
        until = time.monotonic() + 60 * sizes.minutes

        async def client(number: int) -> None:
            rng = random.Random(number)
            async with aiohttp.ClientSession(bench.url) as session:
                while time.monotonic() < until:
                    kind, status, good = await fault_traffic.one_of_many(session, rng)
                    ends[kind] += 1
                    if not good:
                        wrong[f"{kind}: {status}"] += 1

        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(client, number)
            while bench.served is not None and time.monotonic() < until:
                await anyio.sleep(min(10.0, 6 * sizes.minutes))
                samples.append(await anyio.to_thread.run_sync(bench.served.figures))
        bench.check("mixed", "each answer is the one of its kind", not wrong, dict(wrong))
        if samples:
            middle, last = samples[len(samples) // 2], samples[-1]
            growth = last["front MiB"] - middle["front MiB"]
            bench.check("mixed", f"the front grows by at most {GROWTH_MIB} MiB", growth <= GROWTH_MIB, f"{growth} MiB")
        seen = [sample["front MiB"] for sample in samples]
        seen = seen[:: max(1, len(seen) // 8)]
        return f"{sum(ends.values())} requests of {len(ends)} kinds; front MiB in the course of it {seen}"

    return run


ROWS = {"kills": kills, "drops": drops, "slow": slow, "readers": readers, "mixed": mixed}


# ── running ──────────────────────────────────────────────────────────────────────────────────


async def run_rows(bench: Bench, rows: Sequence[str], sizes: Sizes) -> None:
    for name in rows:
        if name == "kills" and bench.served is None:
            print("kills    needs a server of its own: leave out --url")
            continue
        await bench.row(name, ROWS[name](sizes), lossless=name != "kills")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--minutes", type=float, help="of the row mixed; default: 2, with --full 10")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--flags", default="", help="for the server that is started")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = options.rows.split(",")
    if unknown := set(rows) - ROWS.keys():
        parser.error(f"--rows: {', '.join(sorted(unknown))}; there is {', '.join(ROWS)}")
    flags = shlex.split(options.flags)
    if "slow" in rows:
        flags = ["--read-timeout", "5", *flags]
    sizes = Sizes(options.full, options.minutes)
    with ExitStack() as stack:
        served = None if options.url else stack.enter_context(Served(*flags))
        bench = Bench(served.url if served else options.url, served, options.seed)
        with suppress(KeyboardInterrupt):
            anyio.run(run_rows, bench, rows, sizes)
    print(json.dumps({"failed": bench.failures}) if bench.failures else "all checks hold")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
