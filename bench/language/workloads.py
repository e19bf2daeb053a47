"""`engine.lang` beside the same calls by the openai client: multi-turn, tree of thought, JSON, few-shot select, agents.

    python -m bench.language.workloads smollm2-135m --size small               # on a laptop
    python -m bench.language.workloads bench/configs/qwen3-0.6b --size full    # on a GPU, dummy weights
    python -m bench.language.workloads --url http://127.0.0.1:8000 [--bare http://127.0.0.1:8001] --size small
    ... [--tasks multi-turn,json] [--turns 3] [--seconds 480] [--reuse-only] [--json FILE]

Three ways, in turn, on the same arguments, with as many programs at once: `engine.lang` (run_batch); `reuse`, the
openai client on the same server; and `no reuse`, the openai client on a server with --no-prefix-cache (with --url and
without --bare: on the same server, with a cache_salt of its own for each request). The cache is emptied before each.
The first turn of all tasks warms up, and tells how long the others will take: with --seconds there are no more turns
than fit. A row is printed, and written to --json, when it is known. Beside wall time it has CPU time, of this process
and of the server's, and steps of the device, which a machine's other work changes less. `equal` is the share of
programs all of whose texts are the same in the three ways: on a GPU the kernels' rounding depends on who runs beside
whom, and dummy weights choose among almost equal tokens, so there replies part now and then, and are as long as before.
The fake model `echo` needs --option kv_tokens=400000: a share of the memory would have so many of its small pages that
emptying them takes half a minute. Linux alone.
"""

import argparse
import asyncio
import math
import re
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

from bench.http.speed import OFFLINE_FRACTION, SERVER_FRACTION, cpu_of, prepared, serving, until_ended
from bench.language.tasks import EXACT, SIZES, TASKS, Naive, Task, resized
from bench.lib.figures import shown
from engine.client.bench.traffic import WORDS
from engine.lang import Server

GOALS = "goals: no reuse, best >= 6.4 and mean >= 3; reuse, mean >= 1.5 and none below 1.0"
Outputs = list[list[str]]
Counts = tuple[int, int, int]  # calls, tokens of their prompts, and how many of these were cached


class Timed(Struct, frozen=True):
    """One way through one task: seconds, those of CPU time of this process and of the server, steps of the device, and
    all texts. `prompt` tokens were asked for, of which `cached` were in the cache."""

    seconds: float
    cpu: float
    server: float
    steps: int
    outputs: Outputs
    calls: int = 0
    prompt: int = 0
    cached: int = 0


class Way(Struct):
    """One way through one task, a value a turn."""

    seconds: list[float] = []
    cpu: list[float] = []
    server: list[float] = []
    steps: list[int] = []
    cached: list[float] = []  # share of the prompts' tokens

    def add(self, timed: Timed) -> None:
        self.seconds.append(timed.seconds)
        self.cpu.append(timed.cpu)
        self.server.append(timed.server)
        self.steps.append(timed.steps)
        self.cached.append(timed.cached / max(timed.prompt, 1))


class Row(Struct):
    """One task. Ratios are the naive way's seconds over ours."""

    task: str
    calls: int = 0
    ours: Way = msgspec.field(default_factory=Way)
    reuse: Way = msgspec.field(default_factory=Way)
    bare: Way = msgspec.field(default_factory=Way)
    equal: list[float] = []

    def over(self, other: Way) -> list[float]:
        return [theirs / ours for theirs, ours in zip(other.seconds, self.ours.seconds, strict=True)]

    def lines(self) -> str:
        """A line for each way, of the medians of its turns."""
        told = []
        for name, way in (("ours", self.ours), ("reuse", self.reuse), ("no reuse", self.bare)):
            if not way.seconds:
                continue
            seconds, cpu, server, steps, cached = (
                statistics.median(values) for values in (way.seconds, way.cpu, way.server, way.steps, way.cached)
            )
            ours = name == "ours"
            told.append(
                f"{self.task if ours else '':16}{name:9}{self.calls:6}{seconds:9.2f}"
                f"{'' if ours else shown(self.over(way), 2):>22}{cpu:9.2f}{server:9.1f}{steps:7.0f}{cached:8.0%}"
                f"{format(min(self.equal), '.0%') if ours else '':>7}"
            )
        return "\n".join(told)


HEAD = (
    f"{'task':16}{'way':9}{'calls':>6}{'seconds':>9}{'over ours':>22}{'client s':>9}{'server s':>9}{'steps':>7}"
    f"{'cached':>8}{'equal':>7}"
)


class Place(Struct, frozen=True):
    """A server; `pid` is 0 for one that ran already, of whose CPU time nothing is known."""

    url: str
    pid: int = 0


class Servers(Struct, frozen=True):
    """Where programs run, and where nothing is cached: the same if salts do that, and None with --reuse-only."""

    ours: Place
    bare: Place | None
    model: str

    @property
    def salted(self) -> bool:
        return self.ours == self.bare


async def flush(url: str) -> None:
    """Empty the cache of the server."""
    async with aiohttp.ClientSession() as http, http.post(f"{url}/flush_cache") as answer:
        answer.raise_for_status()


async def steps_of(url: str) -> int:
    """How many steps its device has made; 0 of a server that does not say so."""
    async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as answer:
        found = re.search(r"^engine_steps_total ([0-9.e+]+)$", await answer.text(), re.MULTILINE)
    return 0 if found is None else int(float(found[1]))


async def timed(place: Place, run: Callable[[], Awaitable[tuple[Outputs, Counts]]]) -> Timed:
    """What `run` takes at a server whose cache is empty."""
    await flush(place.url)
    steps, server = await steps_of(place.url), sum(cpu_of(place.pid).values())
    began, spent = time.perf_counter(), time.process_time()
    outputs, counts = await run()
    seconds, cpu = time.perf_counter() - began, time.process_time() - spent
    server = sum(cpu_of(place.pid).values()) - server
    return Timed(seconds, cpu, server, await steps_of(place.url) - steps, outputs, *counts)


async def by_language(task: Task, place: Place, server: Server, concurrency: int) -> Timed:
    """All programs of `task` by run_batch."""

    async def run() -> tuple[Outputs, Counts]:
        states = await task.program.run_batch_async(task.arguments, backend=server, concurrency=concurrency, **EXACT)
        usages = [s.usage for s in states]
        calls, prompt, cached = (
            sum(getattr(usage, name) for usage in usages) for name in ("calls", "prompt_tokens", "cached_tokens")
        )
        return [await task.made(s) for s in states], (calls, prompt, cached)

    return await timed(place, run)


async def by_client(task: Task, place: Place, model: str, concurrency: int, *, salted: bool) -> Timed:
    """All programs of `task` by the openai client, in the order of the arguments."""
    client = AsyncOpenAI(base_url=f"{place.url}/v1", api_key="none", max_retries=0, timeout=600.0)
    calls = Naive(client, model, salted=salted)
    turn, made = iter(range(len(task.arguments))), [[""]] * len(task.arguments)

    async def work() -> None:
        for index in turn:
            made[index] = await task.naive(calls, task.arguments[index])

    async def run() -> tuple[Outputs, Counts]:
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return made, (calls.calls, calls.prompt, calls.cached)

    async with client:
        return await timed(place, run)


async def turn(row: Row, task: Task, servers: Servers, server: Server, concurrency: int, number: int) -> None:
    """The ways, each turn another of them first; turn 0 is not counted."""
    found: dict[str, Timed] = {}
    ways: dict[str, Callable[[], Awaitable[Timed]]] = {
        "ours": lambda: by_language(task, servers.ours, server, concurrency),
        "reuse": lambda: by_client(task, servers.ours, servers.model, concurrency, salted=False),
    }
    if (bare := servers.bare) is not None:
        ways["bare"] = lambda: by_client(task, bare, servers.model, concurrency, salted=servers.salted)
    names = list(ways)
    first = number % len(names)
    for name in names[first:] + names[:first]:
        found[name] = await ways[name]()
    if not number:
        return
    row.calls = found["reuse"].calls
    for name, way in found.items():
        getattr(row, name).add(way)
    same = [len({*map(tuple, each)}) == 1 for each in zip(*(way.outputs for way in found.values()), strict=True)]
    row.equal.append(sum(same) / len(same))


class Bench:
    """All rows, as many turns of them as fit into what --seconds leaves since `began`."""

    def __init__(self, given: Any, servers: Servers, words: Sequence[str], began: float) -> None:
        self.given, self.servers, self.words, self.began = given, servers, words, began
        wanted = given.tasks.split(",") if given.tasks else [kind.name for kind in TASKS]
        if unknown := set(wanted) - {kind.name for kind in TASKS}:
            raise SystemExit(f"--tasks names {min(unknown)!r}; there are {', '.join(kind.name for kind in TASKS)}")
        self.kinds = [kind for kind in TASKS if kind.name in wanted]
        self.rows: list[Row] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.given.seconds - (time.perf_counter() - self.began)

    async def measure(self) -> None:
        """Warms up, says how long all will take, and prints each row when it is known."""
        async with Server(self.servers.ours.url, model=self.servers.model) as server:
            took = {}
            for kind in self.kinds:
                began = time.perf_counter()
                await self._turn(Row(kind.name), kind, server, 0)
                took[kind.name] = time.perf_counter() - began
                print(f"warmed up: {kind.name}, {took[kind.name]:.0f} s", flush=True)
            whole = sum(took.values())
            turns = int(max(1, min(self.given.turns, self.left / max(whole, 1e-3))))
            print(
                f"turns of each: {turns}, about {turns * whole:.0f} s of the {self.left:.0f} s left\n{HEAD}", flush=True
            )
            for kind in self.kinds:
                if took[kind.name] > self.left:
                    print(
                        f"{kind.name:16}left out: a turn takes {took[kind.name]:.0f} s, and {self.left:.0f} s are left"
                    )
                    continue
                row = Row(kind.name)
                for number in range(1, turns + 1):
                    if number == 1 or took[kind.name] < self.left:
                        await self._turn(row, kind, server, number)
                self.rows.append(row)
                print(row.lines(), flush=True)
                if self.given.json:
                    self.given.json.write_bytes(msgspec.json.format(msgspec.json.encode(self.rows)))
        self._summary()

    async def _turn(self, row: Row, kind: type[Task], server: Server, number: int) -> None:
        given = self.given
        task = kind(resized(SIZES[given.size][kind.name], given.programs), self.words, given.seed + number)
        await turn(row, task, self.servers, server, given.concurrency, number)

    def _summary(self) -> None:
        for name, values in (("reuse", "reuse"), ("no reuse", "bare")):
            ways = [(row, getattr(row, values)) for row in self.rows]
            ratios = [statistics.median(row.over(way)) for row, way in ways if way.seconds]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                print(f"over {name}: geometric mean {mean:.2f}, best {max(ratios):.2f}, worst {min(ratios):.2f}")
        print(f"{GOALS}; {time.perf_counter() - self.began:.0f} s in all")


@asynccontextmanager
async def started(given: Any) -> AsyncIterator[tuple[Servers, Sequence[str]]]:
    """The two servers, and the words of their prompts."""
    if given.url:
        async with Server(given.url) as server:
            model = server.model_name
        bare = None if given.reuse_only else Place(given.bare or given.url)
        yield Servers(Place(given.url), bare, model), [f" {word}" for word in WORDS]
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
            bare = None
            if not given.reuse_only:
                other = await stack.enter_async_context(serving("bare", both[1] | {"no_prefix_cache": ""}))
                bare = Place(other.url, other.pid)
            yield Servers(Place(ours.url, ours.pid), bare, ours.model), words


async def run(given: Any) -> None:
    began = time.perf_counter()
    async with started(given) as (servers, words):
        print(f"servers ready after {time.perf_counter() - began:.0f} s", flush=True)
        await Bench(given, servers, words, began).measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--programs", type=float, default=1.0, help="so many times the programs of the size")
    parser.add_argument("--concurrency", type=int, default=128, help="programs at once")
    parser.add_argument("--tasks", default="", help="names, with commas; default: all")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all: fewer turns where more would not fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a server that runs")
    parser.add_argument("--bare", help="another that runs without a prefix cache")
    parser.add_argument("--reuse-only", action="store_true", help="leave out the way without reuse, and its server")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the engine")
    parser.add_argument("--json", type=Path, help="write the figures of all turns there too")
    given = parser.parse_args()
    anyio.run(until_ended, run, given, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
