"""KV tiers beside no tiers, in turn, on the same traffic.

    python -m bench.engine.tiers [bench/configs/llama3.1-8b] [--rows check,agents,prompt,fits,disk,restart]
        [--size full] [--together 8,12] [--host 32GiB] [--disk DIR:SIZE] [--no-store] [--policy write-through]
        [--seconds S] [--json FILE]

Two engines with dummy weights and a device cache of 12 GiB (--cache-tokens), one of which has tiers; each is started
when the first row needs it, and kept:

    check    first of all: a reply is the same, id by id, where its pages are on the device and where they come up
    agents   conversations of four times the device cache; whose turn is next is drawn. Each turn brings a
             few new tokens and gets a short reply. What is timed begins once each has been there, and the disk has
             what it is to have. Output: turns a second, and the time to the first token; for each number of agents
             of --together, as many as the device has room for being twelve. Each begins with new conversations
    prompt   one prompt alone: computed, and from the host, of an engine without a disk, which would be written to
             meanwhile; beside that, what the bus takes for as many bytes. The copy's time is that of all parts but
             one, as a part is told of before its end, at the end of the one before
    fits     conversations that the device has room for: the engines in turn, five times
    disk     one prompt alone from the disk (--kv-fetch always), host and page cache having forgotten it; beside that,
             what the disk takes
    restart  seconds from ready to the first reply from the disk, of an engine that was started again, for a prompt of
             the length that conversations begin with; after `disk`

A row's lines are printed, and written to the file, as soon as it is done, and no row begins after `--seconds`. A row
that could not measure what it is about says so, and has no line. `--disk` is a folder, in which one of its own is made
and removed at the end. What file system that is in is said, and nothing begins where that has no room.

`--size quick` has half the cache and a quarter of the turns, so that each row alone takes about a minute on an H200,
starts and all. `--size tiny` is the same on a CPU and the default model, to see that it runs: no figure of it says
anything.
"""

import argparse
import json
import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from msgspec import Struct, to_builtins

from bench.lib.copying import drop_page_cache, file_system, from_disk_rate, from_host_rate
from bench.lib.figures import shown
from bench.lib.returning import Idle
from engine import AsyncEngine, SamplingParams
from engine.cache.tickets import TierOptions
from engine.errors import counted
from engine.messages.control import Stats, TierStats
from engine.options.sizes import read_size, show_size
from engine.sched.moves import FETCH_SECONDS, FETCH_SECONDS_A_BYTE

GIB = 1 << 30


class Scale(Struct):
    """Tokens of the device's cache and of what is asked, and the host's memory."""

    cache: int = 98_304  # 12 GiB of Llama-3.1-8B
    host: str = "32GiB"
    small_host: str = "3GiB"  # of the row `disk`
    prompt_host: str = "18GiB"  # of the row `prompt`: the device's cache and two prompts
    disk: str = "51GiB"  # all conversations at their end: pages of the host are there, too
    conversations: int = 48
    first: int = 7_680
    new: int = 128
    reply: int = 32
    turns: int = 144
    together: tuple[int, ...] = (8, 12)  # agents that wait for a reply at a time
    prompt: int = 16_384
    fitting: int = 6  # conversations
    fitting_turns: int = 48
    patience: float = 8.0  # seconds to wait for a disk that takes nothing: what has left the host never comes

    @property
    def fitted(self) -> int:
        """Tokens of the row `fits` at its end."""
        return self.fitting * self.first + (self.fitting + FITS * self.fitting_turns) * (self.new + self.reply)


FITS = 5  # turns of both engines
SIZES = {
    "full": Scale(),
    "quick": Scale(
        49_152,
        "24GiB",
        "2GiB",
        "11GiB",
        "40GiB",
        24,
        turns=36,
        together=(4, 6),
        fitting=4,
        fitting_turns=14,
        patience=4.0,
    ),
    "tiny": Scale(1_024, "128MiB", "40MiB", "128MiB", "1GiB", 8, 320, 16, 4, 6, (2,), 512, 1, 2, patience=4.0),
}


class Turns(Struct):
    """What some turns took: seconds in all, and each one's to its first token; tokens that came from a cache."""

    seconds: float
    first: list[float]
    cached: int
    prompt: int

    @property
    def rate(self) -> float:
        return len(self.first) / self.seconds


class Figure(Struct):
    """A line of the table: what is held to `bound`, which `ours` is to reach or to stay under."""

    row: str
    what: str
    ours: float
    unit: str = ""
    bound: str = ""
    detail: str = ""


class Conversations:
    """`count` of them on one engine, each with its own history, which real replies go into."""

    def __init__(self, engine: AsyncEngine, scale: Scale, count: int, vocabulary: int, seed: int = 0) -> None:
        self.engine, self.scale, self.random = engine, scale, random.Random(seed)
        self.vocabulary = vocabulary
        self.histories = [self.text(scale.first) for _ in range(count)]

    def text(self, tokens: int) -> list[int]:
        return [self.random.randrange(256, self.vocabulary) for _ in range(tokens)]

    async def begin(self, after: Callable[[], Awaitable[None]] | None = None) -> Turns:
        """The first turn of each."""
        return await self._run(list(range(len(self.histories))), after)

    async def go_on(self, turns: int, together: int = 0) -> Turns:
        """So many more turns, of conversations drawn at random among those that nobody waits for."""
        return await self._run([-1] * turns, together=together)

    async def _run(
        self, whose: list[int], after: Callable[[], Awaitable[None]] | None = None, together: int = 0
    ) -> Turns:
        done = Turns(0.0, [], 0, 0)
        idle, began = Idle(len(self.histories), self.random), time.perf_counter()

        async def client() -> None:
            while whose:
                number = idle.take(whose.pop(0))
                await self._turn(number, done)
                idle.add(number)
                if after is not None:
                    await after()

        async with anyio.create_task_group() as group:
            for _ in range(min(together or self.scale.together[0], len(self.histories))):
                group.start_soon(client)
        done.seconds = time.perf_counter() - began
        return done

    async def _turn(self, number: int, done: Turns) -> None:
        history = self.histories[number] = self.histories[number] + self.text(self.scale.new)
        first, cached, ids = await asked(self.engine, history, self.scale.reply)
        done.first.append(first)
        done.cached += cached
        done.prompt += len(history)
        self.histories[number] = history + ids


async def asked(engine: AsyncEngine, ids: list[int], count: int) -> tuple[float, int, list[int]]:
    """Seconds to the first token of a greedy reply, prompt tokens that a cache held, and the reply."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    began, first, cached, reply = time.perf_counter(), 0.0, 0, []
    async for chunk in engine.stream(ids, params):
        if chunk.ids and not first:
            first, cached = time.perf_counter() - began, chunk.cached_tokens
        reply += chunk.ids
    return first, cached, reply


class Void(Exception):
    """A row could not measure what it is about."""


class Bench:
    """The engines, started when a row needs them, and the figures so far."""

    def __init__(self, given: argparse.Namespace, folder: Path, stack: AsyncExitStack) -> None:
        self.given, self.folder, self.stack = given, folder, stack
        self.scale: Scale = SIZES[given.size]
        self.scale.host = given.host or self.scale.host
        self.scale.cache = given.cache_tokens or self.scale.cache
        if given.together:
            self.scale.together = tuple(map(int, given.together.split(",")))
        self.figures: list[Figure] = []
        self.vocabulary = self.page = 0  # of the model: tokens, and bytes a token
        self.page_size = 0
        self._engines: dict[str, AsyncEngine] = {}
        self._bus = 0.0

    def say(self, *arguments: Any, **options: Any) -> None:
        figure = Figure(*arguments, **options)
        self.figures.append(figure)
        print(line(figure), flush=True)
        if self.given.json:
            self.given.json.write_text(json.dumps(to_builtins(self.figures), indent=1))

    async def engine(self, name: str) -> AsyncEngine:
        """ "none" has no tiers, and "host" no disk."""
        if name == "host" and self.store is None:
            name = "tiers"
        if name not in self._engines:
            host = self.scale.prompt_host if name == "host" else self.scale.host
            options = {} if name == "none" else {"kv_host": host, "kv_policy": self.given.policy}
            if name == "tiers" and self.store is not None:
                options["kv_disk"] = self.store
            self._engines[name] = await self.stack.enter_async_context(self.started(**options))
        return self._engines[name]

    @property
    def store(self) -> str | None:
        """What --kv-disk says."""
        return None if self.given.no_store else f"{self.folder}/kv:{self.scale.disk}"

    @asynccontextmanager
    async def started(self, **options: Any) -> AsyncIterator[AsyncEngine]:
        began = time.perf_counter()
        if self.given.size == "tiny":  # threads of two engines that wait for each other on few cores are all that shows
            options = {"threads": 1, **options}
        else:
            options = {"model": str(self.given.model), "load": "dummy", "max_model_len": 32_768, **options}
        async with AsyncEngine(kv_tokens=self.scale.cache, spare_worker=False, **options) as engine:
            info = await engine.front.ready()
            self.vocabulary = info.vocab_size - 512
            self.page, self.page_size = info.kv_bytes_per_token, info.page_size
            print(
                f"an engine with {options or 'no tiers'} is ready after {time.perf_counter() - began:.1f} s", flush=True
            )
            yield engine

    async def caught_up(self, engine: AsyncEngine) -> None:
        """Until the disk has all that came down, or has taken nothing for long: conversations come over hours, not at
        once."""
        if self.store is None or engine is self._engines.get("host"):
            return
        least, since = math.inf, time.perf_counter()
        while (stats := await stats_of(engine)).to_keep:
            if stats.to_keep < least:
                least, since = stats.to_keep, time.perf_counter()
            elif time.perf_counter() - since > self.scale.patience:
                print(f"the disk lacks {counted(stats.to_keep, 'page')}, and takes none: {stats.stores}", flush=True)
                return

    async def crowd_out(self, engine: AsyncEngine, tokens: int, seed: int) -> None:
        """Texts that nobody asks for again, so many tokens of them, push out what was there."""
        texts = random.Random(seed)
        for _ in range(-(-tokens // self.scale.prompt)):
            await asked(engine, [texts.randrange(256, self.vocabulary) for _ in range(self.scale.prompt)], 1)

    # ── rows ─────────────────────────────────────────────────────────────────────────────────

    async def check(self) -> None:
        engine = await self.engine("tiers")
        await engine.front.flush()
        texts = random.Random(1)
        prompts = [[texts.randrange(256, self.vocabulary) for _ in range(self.scale.first)] for _ in range(4)]
        for ids in prompts:
            await asked(engine, ids, 16)
        known = [await asked(engine, ids, 16) for ids in prompts[-1:]]  # from the device
        for ids in prompts[:-1]:
            await asked(engine, ids, 16)
            known.insert(-1, await asked(engine, ids, 16))
        await self.crowd_out(engine, 2 * self.scale.cache, 2)
        before = await stats_of(engine)
        compared = 0
        for (_, cached, reply), ids in zip([known[-1], *known[:-1]], [prompts[-1], *prompts[:-1]], strict=True):
            _, again, same = await asked(engine, ids, 16)
            if again != cached:  # more is computed, in a step of another shape: ids need not be the same
                print(f"check: {again} tokens came up where the device had {cached}; not compared", flush=True)
            elif same != reply:
                raise SystemExit(f"a reply differs: {reply} with {cached} tokens of the device, {same} from below it")
            else:
                compared += 1
        after = await stats_of(engine)
        up, low = after.from_host - before.from_host, after.from_store - before.from_store
        if not compared or not up + low:
            raise Void("nothing came up that was compared")
        detail = f"of {compared}; {up} pages came up from the host, {low} from the disk"
        self.say("check", "replies that differ", 0.0, bound="0", detail=detail)

    async def agents(self) -> None:
        scale = self.scale
        found: dict[tuple[str, int], Turns] = {}
        for name in ("none", "tiers"):
            engine = await self.engine(name)
            for together in scale.together:
                await engine.front.flush()
                talk = Conversations(engine, scale, scale.conversations, self.vocabulary)
                first = await talk.begin(lambda engine=engine: self.caught_up(engine))  # type: ignore[misc]
                print(f"agents, {name}: first turns {first.seconds:.1f} s", flush=True)
                before = await stats_of(engine)
                turns = found[name, together] = await talk.go_on(scale.turns, together)
                after = await stats_of(engine)
                told = {each: getattr(after, each) - getattr(before, each) for each in SHOWN}
                told |= {each: count - before.stores.get(each, 0) for each, count in after.stores.items() if count}
                print(
                    f"agents, {name}, {together} at a time: {turns.rate:.2f} turns/s, first token "
                    f"{1e3 * statistics.median(turns.first):.0f} ms, {turns.cached / turns.prompt:.0%} cached; {told}",
                    flush=True,
                )
        for together in scale.together:
            none, tiers = found["none", together], found["tiers", together]
            detail = f"{tiers.rate:.2f} to {none.rate:.2f} turns/s"
            ratio = tiers.rate / none.rate
            self.say("agents", f"throughput with tiers to none, {together} agents", ratio, "x", ">= 4", detail)
            ours, theirs = statistics.median(tiers.first), statistics.median(none.first)
            detail = f"{1e3 * ours:.0f} to {1e3 * theirs:.0f} ms"
            what = f"median time to the first token, {together} agents"
            self.say("agents", what, ours / theirs, "x", "<= 0.2", detail)

    async def fits(self) -> None:
        scale, rates, shares = self.scale, [], []
        if scale.fitted > scale.cache:
            raise Void(f"{scale.fitted} tokens do not fit the device's {scale.cache}; raise --cache-tokens")
        talks = {}
        for name in ("none", "tiers"):
            engine = await self.engine(name)
            await engine.front.flush()
            talks[name] = Conversations(engine, scale, scale.fitting, self.vocabulary)
            await talks[name].begin()
            await self.caught_up(engine)
        for turn in range(FITS):
            order = ("none", "tiers") if turn % 2 else ("tiers", "none")
            found = {name: await talks[name].go_on(scale.fitting_turns) for name in order}
            rates.append(found["tiers"].rate / found["none"].rate)
            shares += [each.cached / each.prompt for each in found.values()]
        detail = f"{shown(rates, 3)}, in turn; at least {min(shares):.0%} of each prompt were cached"
        self.say("fits", "throughput with tiers to none", statistics.median(rates), "x", ">= 0.99", detail)

    async def prompt(self) -> None:
        computed, risen, copied = [], [], []
        none, tiers = await self.engine("none"), await self.engine("host")
        size = self.scale.prompt * self.page
        texts = random.Random(3)
        for turn in range(4):
            ids = [texts.randrange(256, self.vocabulary) for _ in range(self.scale.prompt)]
            for engine in (none, tiers):
                await engine.front.flush()
            computed.append((await asked(none, ids, 1))[0])
            await asked(tiers, ids, 1)
            await self.crowd_out(tiers, self.scale.cache + self.scale.prompt, 10 + turn)
            before = await stats_of(tiers)
            first, cached, _ = await asked(tiers, ids, 1)
            after = await stats_of(tiers)
            if cached < self.scale.prompt - 64:
                print(f"prompt: only {cached} tokens came up", flush=True)
            elif turn:  # the first time, memory is used that was not before
                risen.append(first)
                copied.append((after.seconds_up - before.seconds_up) * size / (cached * self.page - self.part))
        if not risen:
            raise Void("the prompt did not come from the host")
        ours, theirs = statistics.median(risen), statistics.median(computed[1:])
        detail = f"{1e3 * ours:.1f} to {1e3 * theirs:.1f} ms"
        self.say("prompt", "first token from the host to computed", ours / theirs, "x", "<= 0.13", detail)
        floor, copy = size / self.bus(), statistics.median(copied)
        detail = f"{1e3 * copy:.1f} to {1e3 * floor:.1f} ms, {self.bus() / 1e9:.1f} GB/s"
        self.say("prompt", "copy from the host to the bus alone", copy / floor, "x", "<= 1.25", detail)

    @property
    def part(self) -> int:
        """Bytes that come up at once where the device evicts."""
        options = TierOptions(0)
        return options.part(self.scale.cache // self.page_size // options.cold) * self.page_size * self.page

    def bus(self) -> float:
        """Bytes a second, measured once."""
        self._bus = self._bus or from_host_rate(min(2 * GIB, self.scale.prompt * self.page))
        return self._bus

    async def disk(self) -> None:
        """The two rows of a disk: an engine with little host memory fills it, and another one finds it."""
        if self.store is None:
            raise Void("there is no store")
        scale, texts = self.scale, random.Random(4)
        options = {"kv_host": scale.small_host, "kv_disk": f"{self.folder}/alone:{scale.disk}"}
        async with self.started(
            kv_fetch="always", **options
        ) as engine:  # it computes a prompt sooner than some disks read
            ids = [[texts.randrange(256, self.vocabulary) for _ in range(scale.prompt)] for _ in range(3)]
            for each in ids:
                await asked(engine, each, 1)
                await self.caught_up(engine)
            host = read_size(scale.small_host, "small host") // self.page
            await self.crowd_out(engine, max(host, scale.cache) + scale.prompt, 5)
            await self.caught_up(engine)
            rate = await self.from_disk(engine, ids)
        drop_page_cache()
        began = time.perf_counter()
        async with self.started(**options) as engine:
            ready = time.perf_counter()
            first, cached, _ = await asked(engine, ids[0][: scale.first], 1)
            if cached < 0.8 * scale.first:
                raise Void(f"after the restart {cached} of {scale.first} tokens came from the disk, in {first:.2f} s")
            detail = f"{cached} tokens, which the disk alone takes {cached * self.page / rate:.2f} s for"
            detail += f"; the engine itself took {ready - began:.1f} s"
            self.say("restart", "from ready to the first reply from the disk", first, "s", "<= 1", detail)

    async def from_disk(self, engine: AsyncEngine, prompts: list[list[int]]) -> float:
        """The row `disk`; what the disk alone gives, in bytes a second."""
        size, ratios, seconds = self.scale.prompt * self.page, [], []
        rate, how = from_disk_rate(self.folder, min(4 * GIB, 2 * size))
        for ids in prompts:
            dropped = drop_page_cache()
            before = await stats_of(engine)
            first, cached, _ = await asked(engine, ids, 1)
            after = await stats_of(engine)
            fetched = (after.fetched - before.fetched) * after.store_bytes // max(after.store_pages, 1)
            print(f"from the disk: {cached} tokens in {1e3 * first:.0f} ms, {fetched >> 20} MiB fetched", flush=True)
            if fetched and cached >= 0.8 * self.scale.prompt:
                ratios.append(first / (cached * self.page / rate))
                seconds.append(first)
        if not ratios:
            least = size / (FETCH_SECONDS + self.scale.prompt * 4 * FETCH_SECONDS_A_BYTE) / 1e9
            print(f"disk: void: the disk gives {rate / 1e9:.2f} GB/s, {how}; requests wait for {least:.2f} at least")
            return rate
        how = how if dropped else f"{how}; the page cache could not be dropped"
        ours, floor = statistics.median(seconds), size / rate
        detail = f"{1e3 * ours:.0f} to {1e3 * floor:.0f} ms, {rate / 1e9:.2f} GB/s, {how}"
        self.say(
            "disk", "first token from the disk to the disk alone", statistics.median(ratios), "x", "<= 1.5", detail
        )
        return rate


SHOWN = ("down", "kept", "fetched", "computed", "from_host", "from_store", "refused", "failed")


async def stats_of(engine: AsyncEngine) -> TierStats:
    """The figures by now: the next heartbeat has them."""
    came = anyio.Event()

    def tell(stats: Stats) -> None:
        came.set()

    engine.front.on_stats.append(tell)
    await came.wait()
    engine.front.on_stats.remove(tell)  # that of nobody else who waits
    return engine.front.stats.tiers or TierStats(0, 0)


def line(figure: Figure) -> str:
    return f"{figure.row:8s} {figure.what:46s} {figure.ours:8.3f} {figure.unit:2s} {figure.bound:8s} {figure.detail}"


ROWS = ("check", "agents", "prompt", "fits", "disk")


async def run(given: argparse.Namespace) -> list[Figure]:
    began = time.perf_counter()
    names = [name for name in given.rows.split(",") if name != "restart"]
    if "restart" in given.rows and "disk" not in names:
        names.append("disk")
    if unknown := set(names) - set(ROWS):
        raise SystemExit(f"no row is called {', '.join(unknown)}; there are {', '.join(ROWS)}, restart")
    place, _, size = (given.disk or "").rpartition(":")
    if given.disk and not place:
        raise SystemExit(f"--disk is {given.disk!r}, but takes a folder and a size, such as /mnt:51GiB")
    with tempfile.TemporaryDirectory(prefix="kv-bench-", dir=place or None) as folder:
        async with AsyncExitStack() as stack:
            bench = Bench(given, Path(folder), stack)
            bench.scale.disk = size or bench.scale.disk
            check_room(bench, names)
            for name in names:
                if (passed := time.perf_counter() - began) > given.seconds:
                    print(f"  row {name}: left out, as {passed:.0f} s have passed", flush=True)
                    continue
                try:
                    await getattr(bench, name)()
                except Void as error:
                    print(f"  row {name}: void: {error}", flush=True)
                print(f"  row {name}: {time.perf_counter() - began - passed:.1f} s", flush=True)
    return bench.figures


def check_room(bench: Bench, names: list[str]) -> None:
    """Say which file system the disk's rows use; raises SystemExit where it has no room for them."""
    if bench.store is None:
        return
    wanted = 0
    if set(names) - {"disk", "prompt"}:
        wanted = read_size(bench.scale.disk, "--disk")
    if "disk" in names:
        wanted += min(read_size(bench.scale.disk, "--disk"), 28 * GIB)  # what it writes, and the floor's file
    free = shutil.disk_usage(bench.folder).free
    print(f"the disk is {file_system(bench.folder)}, with {show_size(free)} free", flush=True)
    if free < wanted:
        raise SystemExit(
            f"{bench.folder} has {show_size(free)} free, and these rows take up to {show_size(wanted)}; "
            "name another folder, or less, by --disk DIR:SIZE"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("bench/configs/llama3.1-8b"))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no row begins")
    parser.add_argument("--host", help="memory of the host tier")
    parser.add_argument("--together", help="agents that wait for a reply at a time, such as 8,12")
    parser.add_argument("--cache-tokens", type=int, help="of the device")
    parser.add_argument("--disk", help="DIR:SIZE of the disk tier; default: the system's temporary folder")
    parser.add_argument("--no-store", action="store_true", help="the host tier alone")
    parser.add_argument("--policy", default="write-through")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args()
    figures = anyio.run(run, given, backend_options={"use_uvloop": True})
    print("\nrow      what                                               ours      bound")
    print("\n".join(map(line, figures)))


if __name__ == "__main__":
    main()
