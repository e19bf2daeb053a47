"""Ours on one GPU beside what the peers were measured at, on the same workloads; every row with its floor.

    python -m bench.engine.gpu bench/configs/qwen3-0.6b [--rows nano,latency,...] [--json FILE] [--option N=V ...]

Dummy weights from config.json alone, prompts as ids, no detokenizing, sampling at 0.6 past the end token (latency:
greedy); the prefix cache is forgotten before each repetition; medians. Tokens choose experts evenly; with --option
load=dummy-ties they all choose the same. The row `grammar` runs `constrained` free, then under JSON schemas, over a
made-up tokenizer (synthetic.py), and prints the shares; `context` has decode steps at a long context, with --option
plugins=naive without absorption (naive.py); `short` and `arrivals` mix prompts with decode rows; `trace` prints how
long the device waits in decode steps. The floor is what no version can beat on an H200: prompts at 790 TFLOP/s (FP8
weights: twice that), each decode step its weights and its keys and values at 4.3 TB/s. Peers: vLLM 0.26.0 and SGLang
0.5.16 on one H200, torch 2.11.0+cu130, at their defaults, 2026-11-22. Kernels are checked by tests/gpu; run that first.
"""

import argparse
import json
import math
import statistics
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

BEGAN = time.perf_counter()  # before the imports: they are part of the start

import anyio  # noqa: E402
from msgspec import Struct  # noqa: E402

from bench.lib import synthetic, traces, workloads  # noqa: E402
from bench.lib.floors import BANDWIDTH, RATE  # noqa: E402
from engine import AsyncEngine, SamplingParams  # noqa: E402
from engine.messages.control import Stats  # noqa: E402

BATCHES = (8, 32, 64, 128, 256)
TURNS = 9  # of what is compared with itself under schemas
PEERS: dict[str, dict[str, tuple[float, float]]] = json.loads(
    Path(__file__).parents[1].joinpath("peers.json").read_text()
)


class Shape(Struct, frozen=True):
    """What a floor needs to know of a model, from its config.json. Two bytes a weight and a cached number."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    # of latent attention
    kv_lora_rank: int = 0
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # of mixtures of experts
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    ties: bool = False  # --load dummy-ties: all tokens choose the same experts
    fp8: bool = False  # weights of layers are one byte, and products twice as fast

    @property
    def dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_weights(self) -> int:
        """Of a layer."""
        size, heads = self.hidden_size, self.num_attention_heads
        if not self.kv_lora_rank:
            return size * 2 * (heads + self.num_key_value_heads) * self.dim
        queries = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        query = queries * size if self.q_lora_rank is None else self.q_lora_rank * (size + queries)
        up = heads * (self.qk_nope_head_dim + self.v_head_dim) * self.kv_lora_rank
        return query + size * (self.kv_lora_rank + self.qk_rope_head_dim) + up + heads * self.v_head_dim * size

    def layer_weights(self, experts: float) -> float:
        """Of all layers, with so many of the experts that a router chooses from."""
        mixtures = self.num_hidden_layers - self.first_k_dense_replace if self.n_routed_experts else 0
        inner: float = (self.num_hidden_layers - mixtures) * self.intermediate_size
        inner += mixtures * self.moe_intermediate_size * (experts + self.n_shared_experts)
        return self.num_hidden_layers * self.attention_weights + 3 * self.hidden_size * inner

    def prompt_seconds(self, computed: int, pairs: int) -> float:
        """`computed` tokens, in which `pairs` queries meet keys."""
        dims = 2 * self.dim
        if self.kv_lora_rank:
            dims = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        attention = 2 * pairs * self.num_attention_heads * dims * self.num_hidden_layers
        products = 2 * self.layer_weights(self.num_experts_per_tok) * computed
        return (products / (1 + self.fp8) + attention) / RATE

    def step_seconds(self, context: int, rows: int) -> float:
        """A decode step whose rows see `context` positions in all, if tokens choose experts evenly, or all the same."""
        experts = float(self.num_experts_per_tok)
        if self.n_routed_experts and not self.ties:
            missed = (1 - self.num_experts_per_tok / self.n_routed_experts) ** rows
            experts = self.n_routed_experts * (1 - missed)
        weights = self.layer_weights(experts) / (1 + self.fp8) + self.vocab_size * self.hidden_size
        cached = self.kv_lora_rank + self.qk_rope_head_dim
        if not self.kv_lora_rank:
            cached = 2 * self.num_key_value_heads * self.dim
        return 2 * (weights + self.num_hidden_layers * cached * context) / BANDWIDTH

    def floor(self, work: workloads.Work, shared: int = 0) -> float:
        """Seconds for all of `work` at once, of whose prompts' tokens `shared` are in the cache."""
        tokens = sum(len(ids) for ids, _ in work)
        pairs = sum(len(ids) ** 2 // 2 for ids, _ in work)
        seconds = self.prompt_seconds(tokens - shared, int(pairs * (tokens - shared) / tokens))
        for step in range(1, max(count for _, count in work)):
            running = [len(ids) + step for ids, count in work if count > step]
            seconds += self.step_seconds(sum(running), len(running))
        return seconds


class Row(Struct):
    """One line of the table: medians of what was timed, in the unit of the name's peers."""

    name: str
    ours: float
    spread: float  # largest less smallest, over the median
    floor: float
    unit: str
    peers: tuple[float, ...]
    busy: float  # share of the timed seconds that steps ran on the device; of a pair of rows the first one's
    idle: float  # share of the device's time that it waited for the next step, which was on its way
    values: list[float]  # one a repetition, as they came


class Bench:
    """Runs workloads on an engine."""

    def __init__(self, engine: AsyncEngine, shape: Shape, peers: dict[str, tuple[float, float]], vocab: int) -> None:
        self.engine = engine
        self.shape = shape
        self.peers = peers
        self.vocab = vocab
        self.busy = 0.0  # seconds of all steps so far
        self.begin_row()
        engine.front.on_stats.append(self._on_stats)

    def _on_stats(self, stats: Stats) -> None:
        self.busy += sum(array("f", stats.step_seconds))

    def begin_row(self) -> None:
        """What was timed so far belongs to no row."""
        self.timed = (0.0, 0.0, 0.0)  # since then: seconds of steps, between them, of the wall clock

    @property
    def idle(self) -> float:
        """Seconds between steps so far."""
        return self.engine.front.stats.idle_seconds_total

    async def seconds(
        self, work: workloads.Work, temperature: float = 0.6, flush: bool = True, schema: str | None = None
    ) -> float:
        """Wall-clock seconds of all of `work` at once, until its tokens are here."""
        if flush:
            await self.engine.front.flush()
        params = [_params(count, temperature, schema) for _, count in work]
        began, busy, idle = time.perf_counter(), self.busy, self.idle
        replies = await self.engine.generate([ids for ids, _ in work], params)
        seconds = time.perf_counter() - began
        await anyio.sleep(0.02)  # the last steps' times are on their way
        steps, between, wall = self.timed
        self.timed = steps + self.busy - busy, between + self.idle - idle, wall + seconds
        assert [len(reply.ids) for reply in replies] == [count for _, count in work], "a reply has another length"
        return seconds

    def row(self, name: str, unit: str, times: list[float], floor: float) -> Row:
        spread = (max(times) - min(times)) / statistics.median(times)
        steps, between, wall = self.timed
        self.begin_row()
        busy, idle = (steps / wall, between / (steps + between)) if wall else (math.nan, math.nan)
        return Row(name, statistics.median(times), spread, floor, unit, self.peers.get(name, ()), busy, idle, times)

    async def rate(self, name: str, make: Callable[[int, int], workloads.Work]) -> list[Row]:
        """Output tokens a second, three times."""
        return await self.rates({name: None}, make, 3)

    async def rates(
        self, schemas: dict[str, str | None], make: Callable[[int, int], workloads.Work], repetitions: int
    ) -> list[Row]:
        """Output tokens a second under each schema, in turn, so that all see the same of a machine that drifts."""
        rates: dict[str, list[float]] = {name: [] for name in schemas}
        timed = dict.fromkeys(schemas, (0.0, 0.0, 0.0))
        floors = []
        for repetition in range(repetitions):
            work = make(self.vocab, repetition)
            out = workloads.tokens_out(work)
            floors.append(out / self.shape.floor(work))
            for name, schema in schemas.items():
                self.timed = timed[name]
                rates[name].append(out / await self.seconds(work, schema=schema))
                timed[name] = self.timed
        rows = []
        for name in schemas:
            self.timed = timed[name]
            rows.append(self.row(name, "tok/s", rates[name], statistics.median(floors)))
        return rows

    async def grammar(self) -> list[Row]:
        """`constrained` as it is measured: free, under its schema, and under a kinder one; then smaller batches."""
        hard, easy = json.dumps(workloads.JSON_SCHEMA), json.dumps(workloads.EASY_SCHEMA)
        schemas = {"constrained": None, "JSON_SCHEMA": hard, "easy schema": easy}
        for text in (hard, easy):  # to compile it, and to see a batch of them once
            await self.seconds(workloads.constrained(self.vocab, 9)[:64], schema=text)
        rows = await self.rates(schemas, workloads.constrained, TURNS)
        print(f"256 rows, of the free throughput: {_shares({row.name: row.values for row in rows})}", flush=True)
        for batch in (1, 8, 32, 64, 128):
            speeds: dict[str, list[float]] = {name: [] for name in schemas}
            for repetition in range(TURNS):
                for name, schema in schemas.items():
                    speeds[name].append(1 / await self._step(batch, repetition, schema))
            print(f"{batch} rows, of a free step's speed: {_shares(speeds)}", flush=True)
        return rows

    async def _step(self, batch: int, repetition: int, schema: str | None) -> float:
        """ms of a decode step of `batch` rows."""
        short, long = workloads.decode_step(self.vocab, batch, repetition)
        first = await self.seconds(short, schema=schema)
        return 1e3 * (await self.seconds(long, schema=schema) - first) / 128

    async def prefill(self) -> list[Row]:
        times = [await self.seconds(workloads.prefill(self.vocab, repetition)) for repetition in range(3)]
        return [self.row("prefill", "s", times, self.shape.floor(workloads.prefill(self.vocab, 0)))]

    async def latency(self) -> list[Row]:
        each, first = [], []
        for repetition in range(6):
            short, long = workloads.latency(self.vocab, repetition)
            first.append(1e3 * await self.seconds(short, temperature=0.0))
            each.append((1e3 * await self.seconds(long, temperature=0.0) - first[-1]) / 255)
        floor = self.shape.floor(long) - self.shape.floor(short)
        return [
            self.row("latency", "ms", each[1:], 1e3 * floor / 255),
            self.row("ttft", "ms", first[1:], 1e3 * self.shape.step_seconds(128, 128)),
        ]

    async def steps(self) -> list[Row]:
        rows = []
        for batch in BATCHES:
            times = []
            for repetition in range(3):
                short, long = workloads.decode_step(self.vocab, batch, repetition)
                first = await self.seconds(short)
                times.append(1e3 * (await self.seconds(long) - first) / 128)
            floor = 1e3 * (self.shape.floor(long) - self.shape.floor(short)) / 128
            rows.append(self.row(f"step {batch}", "ms", times, floor))
        return rows

    async def context(self) -> list[Row]:
        """ms of decode steps at a long context. Prompts are computed once, then found in the cache."""
        rows = []
        for batch in (3, 32):
            short, long = workloads.long_context(self.vocab, batch)
            await self.seconds(short)
            self.begin_row()
            times = []
            for _ in range(3):
                first = await self.seconds(short, flush=False)
                times.append(1e3 * (await self.seconds(long, flush=False) - first) / 32)
            floor = 1e3 * (self.shape.floor(long) - self.shape.floor(short)) / 32
            rows.append(self.row(f"{batch} x 8192", "ms", times, floor))
        return rows

    async def arrivals(self) -> list[Row]:
        """ms by which each of 40 newcomers, one every 10 ms, delays 128 replies."""
        times = []
        for repetition in range(3):
            base, newcomers = workloads.arrivals(self.vocab, repetition)
            alone = await self.seconds(base)
            await self.engine.front.flush()
            async with anyio.create_task_group() as group:
                for number, newcomer in enumerate(newcomers):
                    group.start_soon(self._arrive, 0.15 + 0.01 * number, newcomer)
                times.append(1e3 * (await self.seconds(base, flush=False) - alone) / len(newcomers))
        floor = 1e3 * self.shape.prompt_seconds(200, 200 * 200 // 2)
        return [self.row("arrivals", "ms", times, floor)]

    async def _arrive(self, seconds: float, newcomer: tuple[list[int], int]) -> None:
        ids, count = newcomer
        await anyio.sleep(seconds)
        await self.engine.generate(ids, _params(count))

    async def trace(self) -> list[Row]:
        """What the device does from one decode step to the next, as torch's profiler saw it, which slows steps down."""
        with TemporaryDirectory() as folder:
            for batch in (1, 32, 256):
                _, long = workloads.decode_step(self.vocab, batch, 0)
                await self.engine.front.profile(folder, 64)
                await self.seconds(long)
                seen = traces.waits(Path((await self.engine.front.profile("", 0)).path), batch)
                print(f"batch {batch}, traced: {seen}", flush=True)
        return []

    async def shared(self) -> list[Row]:
        cold, warm = [], []
        for repetition in range(3):
            first, second = workloads.shared_prefix(self.vocab, repetition)
            cold.append(await self.seconds(first))
            warm.append(await self.seconds(second, flush=False))
        every = 256 * 2048
        return [
            self.row("shared cold", "s", cold, self.shape.floor(first, shared=every - 8 * 2048)),
            self.row("shared warm", "s", warm, self.shape.floor(second, shared=every)),
        ]


def _params(count: int, temperature: float = 0.6, schema: str | None = None) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, max_tokens=count, ignore_eos=True, detokenize=False, json_schema=schema
    )


def _shares(turns: dict[str, list[float]]) -> str:
    """Of speeds that were measured in turn, what all but the first had of it: each turn's median, and the quartiles."""
    (_, free), *others = turns.items()
    parts = []
    for name, values in others:
        low, middle, high = statistics.quantiles([value / alone for value, alone in zip(values, free, strict=True)])
        parts.append(f"{name} {middle:.3f} ({low:.3f} - {high:.3f})")
    return ", ".join(parts)


ROWS: dict[str, Callable[[Bench], Any]] = {
    "latency": Bench.latency,
    "steps": Bench.steps,
    "nano": lambda bench: bench.rate("nano", workloads.nano),
    "constrained": lambda bench: bench.rate("constrained", workloads.constrained),
    "grammar": Bench.grammar,
    "throughput": lambda bench: bench.rate("throughput", workloads.throughput),
    "prefill": Bench.prefill,
    "shared": Bench.shared,
    "short": lambda bench: bench.rate("short", workloads.short),
    "arrivals": Bench.arrivals,
    "context": Bench.context,
    "trace": Bench.trace,
}
USUAL = {
    "qwen3-0.6b": ("latency", "steps", "nano", "constrained"),
    "llama3.1-8b": ("latency", "steps", "throughput", "prefill", "shared"),
    "dsv2-lite": ("latency", "steps", "throughput", "prefill"),
}


def table(rows: list[Row]) -> str:
    head = f"{'row':12} {'ours':>9} {'spread':>7} {'busy':>5} {'idle':>5} {'floor':>9} {'of it':>6}"
    lines = [f"{head} {'vLLM':>8} {'SGLang':>8} {'gain':>6}"]
    for row in rows:
        faster = row.unit == "tok/s"
        share = row.ours / row.floor if faster else row.floor / row.ours
        best = (max if faster else min)(row.peers) if row.peers else None
        gain = "" if best is None else f"{row.ours / best if faster else best / row.ours:.2f}x"
        peers = "".join(f" {peer:>8g}" for peer in row.peers) or " " * 18
        numbers = (
            f"{row.ours:>9.4g} {row.spread:>7.1%} {row.busy:>5.0%} {row.idle:>5.1%} {row.floor:>9.4g} {share:>6.0%}"
        )
        lines.append(f"{row.name:12} {numbers}{peers} {gain:>6} {row.unit}")
    return "\n".join(lines)


async def run(model: Path, names: list[str], options: dict[str, str]) -> tuple[list[Row], dict[str, Any]]:
    config = json.loads((model / "config.json").read_text())
    given: dict[str, Any] = {"load": "dummy", "device": "cuda", "json_whitespace": False, **options}
    plugins = given.get("plugins", "").split(",")
    known = {field: config[field] for field in Shape.__struct_fields__ if field in config}
    shape = Shape(**known, ties=given["load"] == "dummy-ties", fp8="fp8" in plugins)
    with ExitStack() as stack:
        folder = stack.enter_context(synthetic.with_tokenizer(model)) if "grammar" in names else model
        if "naive" in plugins:
            from bench.engine.naive import installed

            stack.enter_context(installed())
        return await _run(model, names, shape, {"model": str(folder), **given}, config["vocab_size"])


async def _run(
    model: Path, names: list[str], shape: Shape, given: dict[str, Any], vocab: int
) -> tuple[list[Row], dict[str, Any]]:
    async with AsyncEngine(**given) as engine:
        info = await engine.front.ready()
        start = {"ready": time.perf_counter() - BEGAN, **info.phases}
        print("start:", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in start.items()), flush=True)
        print(f"{info.attention} on {info.device}; {info.pages * info.page_size} tokens of cache", flush=True)
        bench = Bench(engine, shape, PEERS.get(model.name, {}), vocab)
        for temperature in (0.6, 0.0):
            await bench.seconds(workloads.warm_up(bench.vocab), temperature)
        rows: list[Row] = []
        for name in names:
            bench.begin_row()
            made = await ROWS[name](bench)
            rows += made
            print(*table(made).splitlines()[1:], sep="\n", flush=True)
    return rows, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory with a config.json")
    parser.add_argument("--rows", help=f"of {', '.join(ROWS)}; default: those that the peers were measured on")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the engine")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args()
    names = given.rows.split(",") if given.rows else list(USUAL.get(given.model.name, ROWS))
    options = dict(option.split("=", 1) for option in given.option)
    rows, start = anyio.run(run, given.model, names, options, backend_options={"use_uvloop": True})
    print(table(rows))
    if given.json:
        from msgspec import to_builtins

        given.json.write_text(json.dumps({"start": start, "rows": to_builtins(rows)}, indent=1))


if __name__ == "__main__":
    main()
