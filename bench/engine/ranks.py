"""DeepSeek on two GPUs with experts and attention divided, beside one GPU and beside `--tp 2`: what the issue asks for.

    python -m bench.engine.ranks bench/configs/dsv2-lite
        [--rows kv,throughput,long,exchange,head,rebalance,counting] [--option NAME=VALUE ...] [--small] [--json FILE]

    kv          tokens of cache that each engine finds room for, one engine after the other
    throughput  output tok/s of 512 requests of 1,024 in and 256 out, as many copies of attention and groups of experts
                as ranks, against one rank, each with as many rows as is usual; engines are asked in turn
    long        the same of 64 requests of 8,192 and 256, against --tp alone, where both have the same little memory for
                keys and values on each rank, which is the limit
    exchange    a mixture by each way in which tokens reach experts, by how many a rank has; then throughput by
                all-to-all against gathering, engines in turn
    head        the head whole on each copy of attention, as it is, and divided over the copies (rank_layers.py)
    rebalance   a model whose busy experts all lie on one rank (skewed.py): prompts and decode steps before and after
                experts move, the longest pause of a stream while they do and while they do not, and what moving takes
                beside the time of its bytes on the link
    counting    what it takes to count choices, beside a decode step: routing with and without counts, of all layers

Weights are dummies, prompts are ids, ends of replies are ignored, the cache is forgotten before each turn. A floor is
what no version can beat: that of one rank (bench/engine/gpu.py) over the ranks. Each row takes less than nine minutes
on two H200s, by its floor, so rows may be run one by one. `--small` is for a tiny model on CPUs, where times say
nothing. Left out: replies, which tests compare (dummy weights of an expert's copies differ).
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import numpy as np
import torch
from msgspec import Struct, to_builtins
from msgspec.structs import replace

from bench.engine import rank_layers, skewed
from bench.engine.gpu import Bench, Shape
from bench.lib import workloads
from bench.lib.floors import BANDWIDTH, LINK
from engine import AsyncEngine, SamplingParams
from engine.kernels import choose
from engine.kernels.experts.reference import Routing
from engine.messages.questions import ExpertMap, LookAtExperts, RebalanceExperts
from engine.parallel.peers import graph_time
from engine.parallel.placement import imbalance


class Sizes(Struct, frozen=True):
    """Of the work: requests, tokens in and out."""

    throughput: tuple[int, int, int] = (512, 1024, 256)
    long: tuple[int, int, int] = (64, 8192, 256)
    prompts: tuple[int, int, int] = (128, 1024, 1)
    streams: tuple[int, int, int] = (64, 128, 512)
    turns: int = 3  # the first one meets what is new
    kv_tokens: int | None = 400_000  # on each rank, where they are no limit and two engines lie beside each other
    few_kv_tokens: int | None = 150_000  # on each rank, in `long`: 17 requests' on one that caches all of them
    redundant: int = 8
    rank_tokens: tuple[int, ...] = (1, 16, 64, 256, 1024, 4096)  # of a step of a mixture
    head_rows: tuple[int, ...] = (1, 16, 64, 256)
    steps: tuple[int, int, int] = (64, 128, 128)  # that counting is compared with: rows, tokens in, how many steps


SMALL = Sizes(
    throughput=(6, 12, 4),
    long=(6, 40, 6),
    prompts=(4, 16, 1),
    streams=(4, 8, 24),
    turns=2,
    kv_tokens=None,
    few_kv_tokens=None,
    redundant=4,
    rank_tokens=(1, 8),
    head_rows=(1, 8),
    steps=(4, 8, 8),
)


class Figure(Struct, frozen=True):
    """A line: what was measured, beside its floor or bound and what is wanted of it, where there is one."""

    row: str
    name: str
    value: float
    unit: str
    floor: float | None = None
    wanted: str = ""

    def __str__(self) -> str:
        floor = "" if self.floor is None else f"{self.floor:.5g}"
        return f"{self.row:12} {self.name:44} {self.value:>12.5g} {self.unit:8} {floor:>12} {self.wanted}"


HEAD = f"{'row':12} {'figure':44} {'':>12} {'':8} {'floor':>12} wanted"


class Setting(Struct, frozen=True):
    """A model, the options of every engine, and how much work."""

    model: Path
    options: dict[str, Any]
    sizes: Sizes
    ranks: int = 2
    engines: "Engines | None" = None  # that are kept for other rows

    @property
    def divided(self) -> dict[str, Any]:
        return {"dp_attention": self.ranks, "ep": self.ranks}

    @property
    def cuda(self) -> bool:
        return self.options.get("device") != "cpu"

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.model / "config.json").read_text())
        return config

    def shape(self) -> Shape:
        known = {field: self.config[field] for field in Shape.__struct_fields__ if field in self.config}
        return Shape(**known, fp8="fp8" in self.options.get("plugins", ""))

    @asynccontextmanager
    async def engine(self, **parts: Any) -> AsyncIterator[Bench]:
        given = {"model": str(self.model), "load": "dummy", **self.options, **parts}
        given = {name: value for name, value in given.items() if value is not None}
        if self.engines is not None:
            engine = await self.engines.like(given)
            yield Bench(engine, self.shape(), {}, self.config["vocab_size"])
            return
        async with AsyncEngine(**given) as engine:
            await engine.front.ready()
            yield Bench(engine, self.shape(), {}, self.config["vocab_size"])


class Engines:
    """Those that run, by their options: on a CPU most of a small row is their start."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._running: dict[str, AsyncEngine] = {}

    async def like(self, options: dict[str, Any]) -> AsyncEngine:
        key = json.dumps(options, sort_keys=True)
        if key not in self._running:
            self._running[key] = await self._stack.enter_async_context(AsyncEngine(**options))
        return self._running[key]


def work(sizes: tuple[int, int, int], vocab: int, turn: int) -> workloads.Work:
    return workloads.same(random.Random(1000 + turn), *sizes, vocab)


# ── engines side by side ─────────────────────────────────────────────────────────────────────


async def kv(setting: Setting) -> list[Figure]:
    found = {}
    for name, parts in (("one rank", {}), ("tp", {"tp": setting.ranks}), ("dp-attention and ep", setting.divided)):
        async with setting.engine(**parts) as bench:
            info = await bench.engine.front.ready()
            found[name] = info.pages * info.copies * info.page_size
    divided = found["dp-attention and ep"]
    rows = [Figure("kv", f"tokens, {name}", float(tokens), "") for name, tokens in found.items()]
    rows.append(Figure("kv", "times those of one rank", divided / found["one rank"], "x", wanted=">= 1.9"))
    return [*rows, Figure("kv", "times those of tp alone", divided / found["tp"], "x")]


async def compared(
    row: str,
    setting: Setting,
    other: dict[str, Any],
    sizes: tuple[int, int, int],
    kv_tokens: int | None,
    wanted: str = "",
    ours: dict[str, Any] | None = None,
) -> list[Figure]:
    """Output tokens a second of engines with `other` options and with `ours`, by default all divided, in turn, and the
    ratio."""
    rates: list[list[float]] = []
    async with AsyncExitStack() as stack:
        kinds = (other, ours or setting.divided)
        benches = [await stack.enter_async_context(setting.engine(kv_tokens=kv_tokens, **each)) for each in kinds]
        for turn in range(setting.sizes.turns):
            asked = work(sizes, benches[0].vocab, turn)
            rates.append([workloads.tokens_out(asked) / await bench.seconds(asked) for bench in benches])
        floor = workloads.tokens_out(asked) / benches[0].shape.floor(asked)
    rates = rates[1:]
    speeds = [statistics.median(each) for each in zip(*rates, strict=True)]
    ratio = statistics.median(mine / their for their, mine in rates)
    lines = [
        Figure(row, named(each), speed, "tok/s", floor * each.get("tp", each.get("ep", 1)))
        for each, speed in zip(kinds, speeds, strict=True)
    ]
    return [*lines, Figure(row, "ratio", ratio, "x", wanted=wanted)]


def named(options: dict[str, Any]) -> str:
    """An engine, in a line."""
    if "ep" in options:
        return ", ".join(["dp-attention and ep", *filter(None, [options.get("ep_exchange")])])
    return f"tp {options['tp']}" if options else "one rank"


async def throughput(setting: Setting) -> list[Figure]:
    sizes = setting.sizes
    return await compared("throughput", setting, {}, sizes.throughput, sizes.kv_tokens, ">= 1.7")


async def long(setting: Setting) -> list[Figure]:
    sizes = setting.sizes
    return await compared("long", setting, {"tp": setting.ranks}, sizes.long, sizes.few_kv_tokens, ">= 1.25")


# ── layers by themselves ─────────────────────────────────────────────────────────────────────


async def exchange(setting: Setting) -> list[Figure]:
    sizes, rows = setting.sizes, []
    plugins = setting.options.get("plugins", "")
    times = rank_layers.on_ranks(
        setting.ranks, setting.cuda, rank_layers.mixture_times, setting.config, plugins, list(sizes.rank_tokens)
    )
    names = ("gather", "gather, shared expert whole", "places", "counts")
    for tokens, line in zip(sizes.rank_tokens, times, strict=True):
        rows += [Figure("exchange", f"{name}, {tokens} tokens", us, "us") for name, us in zip(names, line, strict=True)]
    kinds = [{**setting.divided, "ep_exchange": each} for each in ("gather", "all-to-all")]
    return rows + await compared("exchange", setting, kinds[0], sizes.throughput, sizes.kv_tokens, ours=kinds[1])


async def head(setting: Setting) -> list[Figure]:
    rows, shape = list(setting.sizes.head_rows), setting.shape()
    sizes = shape.hidden_size, setting.config["vocab_size"]
    times = rank_layers.on_ranks(setting.ranks, setting.cuda, rank_layers.head_times, *sizes, rows)
    floor = 1e6 * 2 * sizes[0] * sizes[1] / BANDWIDTH
    floors = floor, *[floor / setting.ranks] * 2
    return [
        Figure("head", f"{name}, {count} rows", us, "us", least)
        for count, line in zip(rows, times, strict=True)
        for name, us, least in zip(rank_layers.HEADS, line, floors, strict=True)
    ]


# ── experts that move ────────────────────────────────────────────────────────────────────────


class Streams(Struct, frozen=True):
    """Of replies that ran together: ms of the longest wait for a token after the first, and of all of them."""

    pause: float
    total: float


async def streamed(
    bench: Bench, sizes: tuple[int, int, int], turn: int, amid: Callable[[], Awaitable[object]]
) -> Streams:
    """Replies as streams; `amid` is called once each has its first token."""
    await bench.engine.front.flush()
    waits: list[float] = []
    begun, all_begun = 0, anyio.Event()
    asked = work(sizes, bench.vocab, turn)

    async def stream(ids: list[int], count: int) -> None:
        nonlocal begun
        params = SamplingParams(temperature=0.6, max_tokens=count, ignore_eos=True, detokenize=False)
        before = None
        async for _ in bench.engine.stream(ids, params):
            now = time.perf_counter()
            if before is None:
                begun += 1
                if begun == len(asked):
                    all_begun.set()
            elif all_begun.is_set():  # before, prompts of others make steps long
                waits.append(now - before)
            before = now

    async def once() -> None:
        await all_begun.wait()
        await amid()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(once)
        for ids, count in asked:
            tasks.start_soon(stream, ids, count)
        await all_begun.wait()
        began = time.perf_counter()
    return Streams(1e3 * max(waits), 1e3 * (time.perf_counter() - began))


async def nothing() -> None:
    """Experts stay."""


async def rebalance(setting: Setting) -> list[Figure]:
    sizes, first, decoded = setting.sizes, [], []
    parts = {"kv_tokens": sizes.kv_tokens, "redundant_experts": sizes.redundant, "rebalance_threshold": 1e9}
    with TemporaryDirectory() as folder:
        async with skewed_model(setting, folder).engine(**parts, **setting.divided) as bench:
            ask = bench.engine.front.ask
            first.append(await prefill(bench, sizes))
            for turn in range(2):
                decoded.append(await streamed(bench, sizes.streams, turn, nothing))
            before = await ask(LookAtExperts())
            moving = await streamed(bench, sizes.streams, 2, partial(ask, RebalanceExperts()))
            while (after := await ask(LookAtExperts())).waiting:  # they move with steps
                await prefill(bench, sizes, turns=1)
            first.append(await prefill(bench, sizes))
            decoded.append(await streamed(bench, sizes.streams, 3, nothing))
    layers, numbers = moved(before, after)
    assert layers, "no layer has been rearranged"
    took, stay = moving.total - decoded[1].total, decoded[1]
    floor = 1e3 * numbers * expert_bytes(setting) / setting.ranks / LINK  # both ways at once
    return [
        Figure("rebalance", "max over mean load of a rank, before", unevenness(before), ""),
        Figure("rebalance", "max over mean load of a rank, after", unevenness(after), "", 1.0),
        Figure("rebalance", "prompts, before", first[0], "s"),
        Figure("rebalance", "prompts, after", first[1], "s"),
        Figure("rebalance", "prompts, gain", first[0] / first[1], "x", wanted=">= 1.3"),
        Figure("rebalance", "decode, gain", stay.total / decoded[2].total, "x"),
        Figure("rebalance", "longest pause of a stream, experts stay", stay.pause, "ms"),
        Figure("rebalance", "longest pause of a stream, they move", moving.pause, "ms", wanted="<= 50 more"),
        Figure("rebalance", f"{numbers} experts of {layers} layers move: streams longer by", took, "ms", floor),
        Figure("rebalance", "as a share of the streams' time", took / moving.total, "", floor / moving.total),
    ]


def skewed_model(setting: Setting, folder: str) -> Setting:
    """`setting` with busy experts on one rank; `folder` is for its config.json."""
    config = {**setting.config, "architectures": [skewed.ARCHITECTURE]}
    (Path(folder) / "config.json").write_text(json.dumps(config))
    plugins = [setting.options.get("plugins", ""), str(Path(skewed.__file__).resolve())]
    options = {**setting.options, "plugins": ",".join(filter(None, plugins))}
    return replace(setting, model=Path(folder), options=options)


async def prefill(bench: Bench, sizes: Sizes, turns: int = 3) -> float:
    return statistics.median(
        [await bench.seconds(work(sizes.prompts, bench.vocab, 50 + turn)) for turn in range(turns)]
    )


def unevenness(found: ExpertMap) -> float:
    """Of the layers' loads as experts lie, in the mean."""
    loads = np.frombuffer(found.loads, "<f8").reshape(len(found.layers), -1)
    return statistics.mean(imbalance(line) for line in loads if line.any())  # a layer of drafts may not run


def moved(before: ExpertMap, after: ExpertMap) -> tuple[int, int]:
    """How many layers, and how many experts of them, lie elsewhere."""
    one, other = (np.frombuffer(each.placement, "<i4").reshape(len(each.layers), -1) for each in (before, after))
    changed = (one != other).sum(axis=1)
    return int((changed > 0).sum()), int(changed.sum())


def expert_bytes(setting: Setting) -> float:
    """Of one expert of one layer."""
    shape = setting.shape()
    return 3 * shape.hidden_size * shape.moe_intermediate_size * (1 if shape.fp8 else 2)


# ── counting ─────────────────────────────────────────────────────────────────────────────────


async def counting(setting: Setting) -> list[Figure]:
    """On this process's device: how long routers take with counts and without, of all layers, beside a decode step."""
    (rows, tokens, count), shape = setting.sizes.steps, setting.shape()
    async with setting.engine(kv_tokens=setting.sizes.kv_tokens) as bench:
        times = []
        for turn in range(setting.sizes.turns):
            first = await bench.seconds(work((rows, tokens, 1), bench.vocab, 80 + turn))
            times.append((await bench.seconds(work((rows, tokens, 1 + count), bench.vocab, 90 + turn)) - first) / count)
    device = torch.device("cuda" if setting.cuda else "cpu")
    ops = choose(device, torch.bfloat16 if setting.cuda else torch.float32).experts
    routing = Routing(experts=shape.n_routed_experts, top_k=shape.num_experts_per_tok)
    logits = torch.randn(rows, routing.experts, device=device)
    counts = torch.zeros(routing.experts, dtype=torch.int64, device=device)
    without, counted = (
        seconds(partial(ops.route, logits, None, routing, given), setting.cuda) for given in (None, counts)
    )
    mixtures = shape.num_hidden_layers - shape.first_k_dense_replace
    step, more = statistics.median(times), mixtures * (counted - without)
    return [
        Figure("counting", f"a step of {rows} rows", 1e3 * step, "ms"),
        Figure("counting", f"of {mixtures} layers", 1e6 * more, "us", 0.0),
        Figure("counting", "of the step", 100 * more / step, "%", wanted="< 0.5"),
    ]


def seconds(call: Callable[[], object], cuda: bool) -> float:
    """Of one call; on a GPU in a CUDA graph."""
    if cuda:
        return graph_time(call, 64, 21) / 1e6
    times = []
    for _ in range(21):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


ROWS: dict[str, Callable[[Setting], Awaitable[list[Figure]]]] = {
    "kv": kv,
    "throughput": throughput,
    "long": long,
    "exchange": exchange,
    "head": head,
    "rebalance": rebalance,
    "counting": counting,
}


async def measure(setting: Setting, names: list[str]) -> list[Figure]:
    found: list[Figure] = []
    async with AsyncExitStack() as stack:
        if setting.sizes is SMALL:
            setting = replace(setting, engines=Engines(stack))
        for name in names:
            found += (made := await ROWS[name](setting))
            print(*made, sep="\n", flush=True)
    return found


def main(arguments: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory with the config.json of a DeepSeek")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the engines")
    parser.add_argument("--small", action="store_true", help="little work, for a tiny model on CPUs")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args(arguments)
    options: dict[str, Any] = dict(option.split("=", 1) for option in given.option)
    setting = Setting(given.model, {"device": "cuda", **options}, SMALL if given.small else Sizes())
    if setting.options["device"] == "cuda" and (seen := torch.cuda.device_count()) < setting.ranks:
        parser.error(f"{setting.ranks} ranks need as many GPUs, and torch sees {seen}")
    print(HEAD)
    found: list[Figure] = anyio.run(measure, setting, given.rows.split(","), backend_options={"use_uvloop": True})
    if given.json:
        given.json.write_text(json.dumps(to_builtins(found), indent=1))
    return found


if __name__ == "__main__":
    main()
