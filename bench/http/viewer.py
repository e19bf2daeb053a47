"""What one viewer of the live view costs an engine, in CPU time, beside no viewer, in turn.

    python -m bench.http.viewer [--rows 256] [--tokens 400] [--turns 20] [--json FILE]

The engine is whole but for its device: a fake one, which takes no time. HTTP, front and scheduler are one process. Its
CPU time is all that an engine spends on the host, and all of it is measured, in nanoseconds, by /proc/PID/schedstat.
The load comes from this process: `--rows` streams at once. A turn is one load without a viewer and one with a viewer at
/live/events, the order changing from turn to turn. The figure is the ratio of CPU time for each token, the median over
turns, and its quartiles.

A machine that does other things too cannot tell half a percent so. Therefore the engine also accounts for what it does
for viewers alone, in CPU time of its thread: snapshots, their events, and notes of steps. The account over the seconds
of the load is the part of a core that a viewer takes, and so the part of its throughput that an engine loses which its
host limits. Nothing is to be accounted for where nobody looks. Linux alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import anyio

from bench.http.cpu import request, streamed
from engine.actors.looking import WATCHED_SECONDS
from engine.actors.scheduler import SchedulerActor
from engine.client.bench.process import free_port
from engine.config import Config, resolve
from engine.http.app import serve
from engine.http.page import live
from engine.messages import FromFront, ToFront
from engine.messages.control import WorkerReady
from engine.plugin.registry import Plugins
from engine.runtime.actor import Actor
from engine.runtime.channel import Outbox, channel, open_channel
from engine.runtime.launch import open_front
from engine.sched.policies import make_policy
from engine.testing.fake import FakeExecutor

PAGES, PAGE_SIZE = 32768, 16
PROMPT = "You are a careful assistant. Answer in one sentence. "
CALLS = 20_000  # of nothing, which are measured


class Spent(NamedTuple):
    """CPU seconds of the engine for each token, and the part of a core that it spent on viewers by its own account."""

    seconds: float
    looking: float
    events: int


# ── the engine, in a process of its own ──────────────────────────────────────────────────────


def core(config: Config, front: Outbox[ToFront]) -> tuple[list[Actor], Outbox[FromFront]]:
    """A scheduler and a fake device."""
    to_scheduler, scheduler_inbox = open_channel()
    to_executor, executor_inbox = channel(4)
    rows = config.schedule.max_running or 256
    ready = WorkerReady(PAGES, PAGE_SIZE, rows, 8192, 4096, 257, 4, "fake", "none", {})
    policy = make_policy(Plugins.load(()), config.schedule.policy)
    scheduler = SchedulerActor(config, policy, scheduler_inbox, executor=to_executor, makers={}, front=front)
    account(scheduler)
    return [scheduler, FakeExecutor(ready, executor_inbox, to_scheduler)], to_scheduler


spent = [0.0]


def timed(function: Any, less: float = 0.0) -> Any:
    """`function`, whose time is spent for viewers, `less` what it takes to measure a call."""

    def call(*given: Any, **named: Any) -> Any:
        time.thread_time()  # where it has not run for a while, the clock itself takes microseconds
        began = time.thread_time()
        try:
            return function(*given, **named)
        finally:
            spent[0] += time.thread_time() - began - less

    return call


def account(scheduler: SchedulerActor) -> None:
    """Measure what is done for viewers alone."""
    nothing = timed(lambda: None)
    for _ in range(CALLS):
        nothing()
    less, spent[0] = spent[0] / CALLS, 0.0
    print(f"a measured call that does nothing takes {1e6 * less:.2f} us, which are not counted")
    scheduler._said = timed(scheduler._said, less)  # type: ignore[method-assign]
    for name in ("planned", "done"):
        setattr(scheduler.looking, name, timed(getattr(scheduler.looking, name), less))
    live.LiveEvents.event = timed(live.LiveEvents.event, less)  # type: ignore[method-assign]


async def engine(port: int, rows: int) -> None:
    config = resolve({"model": "echo", "page_size": PAGE_SIZE, "max_running": rows, "port": port})
    async with open_front(config, core) as front, anyio.create_task_group() as group:
        await front.ready()
        group.start_soon(tell, port + 1)
        await serve(front, config.server, started=lambda url: None)


async def tell(port: int) -> None:
    """Answer each connection with what was spent."""

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.send(json.dumps(spent[0]).encode())

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
    await listener.serve(answer)


# ── the load ─────────────────────────────────────────────────────────────────────────────────


def cpu(pid: int) -> float:
    """Seconds that all threads of a process have run."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def told(port: int) -> float:
    async with await anyio.connect_tcp("127.0.0.1", port + 1) as stream:
        return float(json.loads(await stream.receive()))


@asynccontextmanager
async def viewer(port: int) -> AsyncIterator[list[int]]:
    """Somebody who looks; the sizes of the events."""
    sizes: list[int] = []

    async def look() -> None:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/live/events") as answer:
            async for line in answer.content:
                if line.startswith(b"data"):
                    sizes.append(len(line))

    async with anyio.create_task_group() as group:
        group.start_soon(look)
        yield sizes
        group.cancel_scope.cancel()


async def measure(pid: int, port: int, rows: int, tokens: int, *, watched: bool, sizes: list[int]) -> Spent:
    """One load. One without a viewer waits until the last one is forgotten."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "stream": True, "temperature": 0, "ignore_eos": True}
    done: list[int] = []

    async def one(number: int) -> None:
        message = {"messages": [{"role": "user", "content": f"{PROMPT}{number}"}], "max_tokens": tokens}
        done.append(await streamed(port, request("/v1/chat/completions", body | message)))

    async def load() -> None:
        async with anyio.create_task_group() as group:
            for number in range(rows):
                group.start_soon(one, number)

    if not watched:
        await anyio.sleep(WATCHED_SECONDS)
        await until_ready(port)  # its steps are the last that are noted
    before, looked, began = cpu(pid), await told(port), time.perf_counter()
    seen: list[int] = []
    if watched:
        async with viewer(port) as seen:
            await load()
        sizes += seen
    else:
        await load()
    seconds, wall = cpu(pid) - before, time.perf_counter() - began
    return Spent(seconds / (rows * tokens), (await told(port) - looked) / wall, len(seen))


async def compare(pid: int, port: int, options: argparse.Namespace) -> tuple[list[tuple[Spent, Spent]], list[int]]:
    """Pairs of without and with a viewer."""
    pairs, sizes = [], list[int]()
    for turn in range(options.turns + 1):
        order = (False, True) if turn % 2 else (True, False)
        found = {
            watched: await measure(pid, port, options.rows, options.tokens, watched=watched, sizes=sizes)
            for watched in order
        }
        if turn:  # the first warms up
            pairs.append((found[False], found[True]))
    return pairs, sizes


async def until_ready(port: int) -> None:
    with anyio.fail_after(60):
        while True:
            try:
                await streamed(port, request("/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 2}))
                return
            except (OSError, AssertionError, anyio.EndOfStream):
                await anyio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.port:
        anyio.run(engine, options.port, options.rows, backend_options={"use_uvloop": True})
        return
    port = free_port()
    command = [sys.executable, "-m", "bench.http.viewer", "--port", str(port), "--rows", str(options.rows)]
    with ExitStack() as stack:
        process = subprocess.Popen(command)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        anyio.run(until_ready, port)
        pairs, sizes = anyio.run(compare, process.pid, port, options)
    ratios = [watched.seconds / alone.seconds for alone, watched in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{options.rows} rows, {options.turns} turns; {1e6 * pairs[0][0].seconds:.2f} us of CPU time a token alone")
    print(f"with a viewer / without: {middle:.4f} ({low:.4f} - {high:.4f})")
    print(f"{sum(watched.events for _, watched in pairs)} events of {statistics.median(sizes):.0f} bytes")
    accounts = [watched.looking for _, watched in pairs]
    least, most = 100 * statistics.median(accounts), 100 * max(accounts)
    print(f"by the engine's account {least:.3f}% of a core, at most {most:.3f}%")
    print(f"and while nobody looks {100 * max(alone.looking for alone, _ in pairs):.4f}%")
    if options.json:
        options.json.write_text(json.dumps({"ratios": ratios, "accounts": accounts}, indent=2))


if __name__ == "__main__":
    main()
