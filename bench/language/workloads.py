"""`engine.lang` beside the same calls by the openai client: multi-turn, tree of thought, JSON, few-shot select, agents.

    python -m bench.language.workloads smollm2-135m --size small               # on a laptop
    python -m bench.language.workloads bench/configs/qwen3-0.6b --size full    # on a GPU, dummy weights
    python -m bench.language.workloads --url http://127.0.0.1:8000 [--bare http://127.0.0.1:8001] --size small

Three ways, in turn, on the same arguments, with as many programs at once: `engine.lang` (run_batch); `reuse`, the
openai client on the same server; and `no reuse`, the openai client on a server with --no-prefix-cache (with --url and
without --bare: on the same server, with a cache_salt of its own for each request). The cache is emptied before each.
The first turn warms up. `equal` is the share of programs all of whose texts are the same in the three ways: on a GPU
the kernels' rounding depends on who runs beside whom, and dummy weights choose among almost equal tokens, so there
replies part now and then, and are as long as before. Linux alone.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec
from msgspec import Struct
from openai import AsyncOpenAI

from bench.http.speed import OFFLINE_FRACTION, SERVER_FRACTION, prepared, serving, until_ended
from bench.language.tasks import EXACT, SIZES, TASKS, Naive, Task, resized
from bench.lib.figures import shown
from engine.client.bench.traffic import WORDS
from engine.lang import Server

GOALS = "goals: no reuse, best >= 6.4 and mean >= 3; reuse, mean >= 1.5 and none below 1.0"
Outputs = list[list[str]]


class Timed(Struct, frozen=True):
    """One way through one task: seconds, those of this process's CPU time, and all texts."""

    seconds: float
    cpu: float
    outputs: Outputs
    calls: int
    prompt: int = 0
    cached: int = 0


class Row(Struct):
    """One task, a value a turn. Ratios are the naive way's seconds over ours."""

    task: str
    calls: int = 0
    ours: list[float] = []
    reuse: list[float] = []
    bare: list[float] = []
    ours_cpu: list[float] = []
    reuse_cpu: list[float] = []
    equal: list[float] = []
    cached: list[float] = []  # share of our prompts' tokens

    def over(self, other: Sequence[float]) -> list[float]:
        return [theirs / ours for theirs, ours in zip(other, self.ours, strict=True)]

    def line(self) -> str:
        middle = statistics.median
        return (
            f"{self.task:16}{self.calls:6}{middle(self.ours):9.2f}{middle(self.reuse):9.2f}{middle(self.bare):9.2f}"
            f"  {shown(self.over(self.reuse), 2):>20}  {shown(self.over(self.bare), 2):>22}"
            f"{middle(self.ours_cpu):8.2f}{middle(self.reuse_cpu):8.2f}{middle(self.cached):8.0%}{min(self.equal):7.0%}"
        )


HEAD = (
    f"{'task':16}{'calls':>6}{'ours s':>9}{'reuse s':>9}{'bare s':>9}  {'over reuse':>20}  {'over no reuse':>22}"
    f"{'cpu s':>8}{'naive':>8}{'cached':>8}{'equal':>7}"
)


class Servers(Struct, frozen=True):
    """Where programs run, and where nothing is cached; the same if salts do that."""

    url: str
    bare: str
    model: str

    @property
    def salted(self) -> bool:
        return self.url == self.bare


async def flush(url: str) -> None:
    """Empty the cache of the server."""
    async with aiohttp.ClientSession() as http, http.post(f"{url}/flush_cache") as answer:
        answer.raise_for_status()


async def timed(url: str, run: Callable[[], Awaitable[tuple[Outputs, Any]]]) -> tuple[float, float, Outputs, Any]:
    await flush(url)
    began, spent = time.perf_counter(), time.process_time()
    outputs, told = await run()
    return time.perf_counter() - began, time.process_time() - spent, outputs, told


async def by_language(task: Task, server: Server, concurrency: int) -> Timed:
    """All programs of `task` by run_batch."""

    async def run() -> tuple[Outputs, Any]:
        states = await task.program.run_batch_async(task.arguments, backend=server, concurrency=concurrency, **EXACT)
        return [await task.made(s) for s in states], [s.usage for s in states]

    seconds, cpu, outputs, usages = await timed(server.url, run)
    totals = (sum(getattr(usage, name) for usage in usages) for name in ("calls", "prompt_tokens", "cached_tokens"))
    return Timed(seconds, cpu, outputs, *totals)


async def by_client(task: Task, url: str, model: str, concurrency: int, *, salted: bool) -> Timed:
    """All programs of `task` by the openai client, in the order of the arguments."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600.0)
    calls = Naive(client, model, salted=salted)
    turn, made = iter(range(len(task.arguments))), [[""]] * len(task.arguments)

    async def work() -> None:
        for index in turn:
            made[index] = await task.naive(calls, task.arguments[index])

    async def run() -> tuple[Outputs, Any]:
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return made, None

    async with client:
        seconds, cpu, outputs, _ = await timed(url, run)
    return Timed(seconds, cpu, outputs, calls.calls)


async def turn(row: Row, task: Task, servers: Servers, server: Server, concurrency: int, number: int) -> None:
    """The three ways, each turn another of them first; turn 0 is not counted."""
    found: dict[str, Timed] = {}
    ways: dict[str, Callable[[], Awaitable[Timed]]] = {
        "ours": lambda: by_language(task, server, concurrency),
        "reuse": lambda: by_client(task, servers.url, servers.model, concurrency, salted=False),
        "bare": lambda: by_client(task, servers.bare, servers.model, concurrency, salted=servers.salted),
    }
    names = list(ways)
    for name in names[number % 3 :] + names[: number % 3]:
        found[name] = await ways[name]()
    if not number:
        return
    ours = found["ours"]
    for name, way in found.items():
        getattr(row, name).append(way.seconds)
    row.calls = found["reuse"].calls
    row.ours_cpu.append(ours.cpu)
    row.reuse_cpu.append(found["reuse"].cpu)
    row.cached.append(ours.cached / max(ours.prompt, 1))
    same = [len({*map(tuple, each)}) == 1 for each in zip(*(way.outputs for way in found.values()), strict=True)]
    row.equal.append(sum(same) / len(same))


async def measure(given: Any, servers: Servers, words: Sequence[str]) -> list[Row]:
    rows = []
    print(HEAD, flush=True)
    async with Server(servers.url, model=servers.model) as server:
        for kind in TASKS:
            if given.tasks and kind.name not in given.tasks.split(","):
                continue
            row = Row(kind.name)
            for number in range(given.turns + 1):
                task = kind(resized(SIZES[given.size][kind.name], given.programs), words, given.seed + number)
                await turn(row, task, servers, server, given.concurrency, number)
            print(row.line(), flush=True)
            rows.append(row)
    for name, values in (("reuse", "reuse"), ("no reuse", "bare")):
        ratios = [statistics.median(row.over(getattr(row, values))) for row in rows]
        mean = statistics.geometric_mean(ratios)
        print(f"over {name}: geometric mean {mean:.2f}, best {max(ratios):.2f}, worst {min(ratios):.2f}")
    print(GOALS)
    return rows


@asynccontextmanager
async def started(given: Any) -> AsyncIterator[tuple[Servers, Sequence[str]]]:
    """The two servers, and the words of their prompts."""
    if given.url:
        async with Server(given.url) as server:
            model = server.model_name
        yield Servers(given.url, given.bare or given.url, model), [f" {word}" for word in WORDS]
        return
    with prepared(given.model, 256) as (options, words):
        if given.size == "small":
            options["max_running"] = "64"
        options |= dict(option.split("=", 1) for option in given.option)
        both = [dict(options), dict(options)]
        if not {"kv_tokens", "memory_fraction"} & set(options):
            both[0]["memory_fraction"], both[1]["memory_fraction"] = OFFLINE_FRACTION, SERVER_FRACTION
        async with AsyncExitStack() as stack:
            ours = await stack.enter_async_context(serving("ours", both[0]))
            bare = await stack.enter_async_context(serving("bare", both[1] | {"no_prefix_cache": ""}))
            yield Servers(ours.url, bare.url, ours.model), words


async def run(given: Any) -> list[Row]:
    async with started(given) as (servers, words):
        return await measure(given, servers, words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--programs", type=float, default=1.0, help="so many times the programs of the size")
    parser.add_argument("--concurrency", type=int, default=128, help="programs at once")
    parser.add_argument("--tasks", default="", help="names, with commas; default: all")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a server that runs")
    parser.add_argument("--bare", help="another that runs without a prefix cache")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the engine")
    parser.add_argument("--json", type=Path, help="write the figures of all turns there too")
    given = parser.parse_args()
    rows = anyio.run(until_ended, run, given, backend_options={"use_uvloop": True})
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))


if __name__ == "__main__":
    main()
