"""One model on two GPUs beside the same on one, in turn on the same machine: what tensor or pipeline parallelism saves.

    python -m bench.engine.parallel bench/configs/llama3.1-8b [--tp 2] [--rows checks,sums,latency,...] [--json FILE]
    python -m bench.engine.parallel bench/configs/llama3.1-8b --tp 1 --pp 2 --rows checks,128k

`checks` come first, and no figure is printed where one fails: sums of our kernel against NCCL's, and the ids of a small
seeded model in float32. `sums` are microseconds of a sum over the ranks with residual and norm behind it, in a CUDA
graph: by our two ways, by NCCL and the norm's own kernel, and that kernel alone, which one rank needs too; the floor is
the time on the link. The other rows are of two engines that run at the same time and are asked in turn, with dummy
weights (bench/engine/gpu.py has the workloads): medians, and the median of the ratios of the turns. The floor of tp
ranks is a tp-th of that of one, and the time of its sums on the link; that of stages is their share of one's.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch
from msgspec import Struct, to_builtins

from bench.engine.gpu import PEERS, Bench, Shape
from bench.lib import synthetic, workloads
from bench.lib.floors import LINK
from engine import AsyncEngine, SamplingParams
from engine.kernels import choose
from engine.parallel.groups import Groups
from engine.parallel.peers import graph_time, join_peers, sum_by_nccl
from engine.testing.ranks import open_ranks

SUM_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
KV_TOKENS = 400_000  # both engines fit beside each other
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False)


# ── checks ───────────────────────────────────────────────────────────────────────────────────

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": 512,
    "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "float32", "eos_token_id": 1023,
}  # fmt: skip


def small_checkpoint(folder: Path) -> None:
    """A seeded model, as a checkpoint."""
    from safetensors.torch import save_file

    size, inner, vocab = SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["vocab_size"]
    kv = size // SMALL["num_attention_heads"] * SMALL["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"lm_head": (vocab, size), "model.embed_tokens": (vocab, size)}
    shapes["model.norm"] = (size,)
    for layer in range(SMALL["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.{name}_proj": (kv, size) for name in ("k", "v")}
        shapes |= {f"{path}.self_attn.{name}_proj": (size, size) for name in ("q", "o")}
        shapes |= {f"{path}.mlp.{name}_proj": (inner, size) for name in ("gate", "up")}
        shapes |= {f"{path}.mlp.down_proj": (size, inner)}
        shapes |= {f"{path}.{name}_layernorm": (size,) for name in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator) * (0.06 if len(shape) > 1 else 0.1)
        + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(SMALL))
    synthetic.tokenizer(vocab).save(str(folder / "tokenizer.json"))


class Split(Struct, frozen=True):
    """How the layers are shared out: each over `tp` ranks, all over `pp` stages."""

    tp: int
    pp: int

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp {self.tp}" if self.pp == 1 else f"tp {self.tp} pp {self.pp}"


ONE = Split(1, 1)


async def same_ids(split: Split) -> str:
    """Whether a small model says the same on one rank and on several, in float32, alone and beside others."""
    prompts = [[(7 * place + 3 * length) % 1000 for place in range(length)] for length in (3, 17, 40, 200, 64, 9)]
    said = []
    with tempfile.TemporaryDirectory() as name:
        small_checkpoint(Path(name))
        for each in (ONE, split):
            options: dict[str, Any] = {"model": name, "device": "cuda", "dtype": "float32", "kv_tokens": 8192}
            async with AsyncEngine(**options, tp=each.tp, pp=each.pp, max_running=32) as engine:
                replies = await engine.generate(prompts, GREEDY)
                alone = [(await engine.generate(prompt, GREEDY)).ids for prompt in prompts]
                said.append(([reply.ids for reply in replies], alone))
    different = {token for ids in said[0][0] for token in ids}
    assert len(different) > 16, f"a model that says {different} tells nothing"
    assert said[1] == said[0], f"{split} says other ids than {ONE}: {said[1]} and {said[0]}"
    return f"ids of {split} are those of {ONE}: {len(prompts)} prompts of {GREEDY.max_tokens} ids, twice"


class Sum(Struct, frozen=True):
    """Microseconds of one sum with its norm, by each way; None where the inboxes are too small."""

    rows: int
    words: float | None
    by_rows: float | None
    nccl: float
    norm: float  # alone
    floor: float


def sums(groups: Groups, width: int, checked: int) -> list[Sum]:
    """On a rank: checks `checked` rounds of random sums against NCCL's, then times."""
    import torch.distributed as distributed

    group, device, kind = groups.along("tp"), groups.device, torch.bfloat16
    peers = join_peers(group, device, width=width, rows=max(SUM_ROWS), dtype=kind)
    assert peers is not None, "these GPUs cannot write to each other's memory"
    ops = choose(device, kind).dense
    weight = torch.ones(width, dtype=kind, device=device)
    for turn in range(checked):
        for rows in (1, 7, 64, 256, 2048):
            torch.manual_seed(100 * turn + rows + 7 * groups.mesh.rank)
            part = torch.randn(rows, width, device=device).to(kind)
            total = part.clone()
            distributed.all_reduce(total, group=group.joined())
            for way in peers.ways:
                if way.takes(part):
                    mine = way.exchange(part.clone())
                    assert torch.equal(mine, total), f"a sum of {rows} rows is not NCCL's: {(mine - total).abs().max()}"
    peers.check(group.ranks)
    made = []
    for rows in SUM_ROWS:
        part, stream = (torch.randn(rows, width, device=device).to(kind) for _ in range(2))
        part.mul_(1e-3)

        own = part, stream, weight, 1e-6
        words, by_rows = (
            graph_time(partial(way.exchange, *own), 32, 9) if way.takes(part) else None for way in peers.ways
        )
        nccl = graph_time(partial(sum_by_nccl, group, ops, *own), 32, 9)
        norm = graph_time(partial(ops.add_rms_norm, *own), 32, 9)
        floor = 1e6 * (group.size - 1) * part.nbytes / LINK
        made.append(Sum(rows, words, by_rows, nccl, norm, floor))
    peers.check(group.ranks)
    return made


def sums_table(found: list[Sum]) -> str:
    lines = [f"{'sum and norm, us':>18} {'words':>8} {'rows':>8} {'NCCL':>8} {'norm alone':>11} {'link':>8}"]
    for each in found:
        ways = "".join(f" {way:>8.2f}" if way is not None else f" {'-':>8}" for way in (each.words, each.by_rows))
        lines.append(f"{each.rows:>18}{ways} {each.nccl:>8.2f} {each.norm:>11.2f} {each.floor:>8.2f}")
    return "\n".join(lines)


# ── engines in turn ──────────────────────────────────────────────────────────────────────────


async def latency(bench: Bench, turn: int) -> float:
    """ms a token at batch 1."""
    short, long = workloads.latency(bench.vocab, turn)
    first = await bench.seconds(short, temperature=0.0)
    return 1e3 * (await bench.seconds(long, temperature=0.0) - first) / 255


def step(batch: int) -> Callable[[Bench, int], Awaitable[float]]:
    async def timed(bench: Bench, turn: int) -> float:
        short, long = workloads.decode_step(bench.vocab, batch, turn)
        first = await bench.seconds(short)
        return 1e3 * (await bench.seconds(long) - first) / 128

    return timed


async def throughput(bench: Bench, turn: int) -> float:
    work = workloads.throughput(bench.vocab, turn)
    return workloads.tokens_out(work) / await bench.seconds(work)


def prompts(make: Callable[[int, int], workloads.Work]) -> Callable[[Bench, int], Awaitable[float]]:
    async def timed(bench: Bench, turn: int) -> float:
        return await bench.seconds(make(bench.vocab, turn))

    return timed


class Goal(Struct, frozen=True):
    """A row: how one turn is measured, how often, in which unit, and which ratio of tp to one rank is wanted."""

    measure: Callable[[Bench, int], Awaitable[float]]
    turns: int
    unit: str
    wanted: float


GOALS = {
    "latency": Goal(latency, 6, "ms", 0.66),
    "step 64": Goal(step(64), 4, "ms", 0.66),
    "prefill": Goal(prompts(workloads.prefill), 4, "s", 1.7),
    "throughput": Goal(throughput, 3, "tok/s", 1.65),
    "step 8": Goal(step(8), 3, "ms", 0.66),
    "step 256": Goal(step(256), 3, "ms", 0.66),
    "8 x 24k": Goal(prompts(workloads.long_prompts), 3, "s", 1.7),
    "128k": Goal(prompts(workloads.longest_prompt), 3, "s", 1.8),
}
PROMPTS = {"prefill": workloads.prefill, "8 x 24k": workloads.long_prompts, "128k": workloads.longest_prompt}


class Compared(Struct, frozen=True):
    """A line of the table: medians of one rank and of several, the median of the turns' ratios, and what they wait."""

    name: str
    one: float
    several: float
    ratio: float  # of times tp / 1 of a step; of throughput and prefill how much faster
    wanted: float
    floor: float  # of several
    unit: str
    idle: tuple[float, float]  # shares of the device's time
    values: list[tuple[float, float]]


def floors(shape: Shape, name: str, split: Split, vocab: int, turn: int = 0) -> float:
    """What no version can beat on several ranks: each one's share of one's, and the sums on the link. Stages are worth
    nothing to a single step."""
    sum_bytes = 2 * shape.num_hidden_layers // split.pp * 2 * shape.hidden_size * (split.tp - 1)  # of a token
    if name == "throughput":
        work = workloads.throughput(vocab, turn)
        tokens = sum(len(ids) + count for ids, count in work)
        return workloads.tokens_out(work) / (shape.floor(work) / split.ranks + tokens * sum_bytes / LINK)
    if name in PROMPTS:
        work = PROMPTS[name](vocab, turn)
        return shape.floor(work) / split.ranks + sum(len(ids) for ids, _ in work) * sum_bytes / LINK
    rows = 1 if name == "latency" else int(name.split()[1])
    short, long = workloads.latency(vocab, turn) if rows == 1 else workloads.decode_step(vocab, rows, turn)
    steps = long[0][1] - 1
    return 1e3 * ((shape.floor(long) - shape.floor(short)) / steps / split.tp + rows * sum_bytes / LINK)


async def compare(benches: dict[Split, Bench], name: str, goal: Goal, split: Split) -> Compared:
    values: dict[Split, list[float]] = {ONE: [], split: []}
    for bench in benches.values():
        bench.begin_row()
    for turn in range(goal.turns):
        for each, bench in benches.items():
            values[each].append(await goal.measure(bench, turn))
    pairs = list(zip(values[ONE], values[split], strict=True))
    warm = pairs[1:]  # the first turn meets what is new
    ratios = [one / several if goal.unit == "s" else several / one for one, several in warm]
    one, several = (statistics.median(each) for each in zip(*warm, strict=True))
    bench = benches[split]
    rows = [benches[each].row(name, goal.unit, values[each], 1.0) for each in (ONE, split)]
    floor = floors(bench.shape, name, split, bench.vocab)
    idle = rows[0].idle, rows[1].idle
    return Compared(name, one, several, statistics.median(ratios), goal.wanted, floor, goal.unit, idle, pairs)


def table(rows: list[Compared], split: Split) -> str:
    head = f"{'row':12} {ONE!s:>9} {split!s:>9} {'ratio':>6} {'wanted':>7} {'floor':>9}"
    lines = [f"{head} {'idle 1':>7} {f'idle {split.ranks}':>7}"]
    for row in rows:
        sign = "<=" if row.unit == "ms" else ">="
        numbers = f"{row.one:>9.4g} {row.several:>9.4g} {row.ratio:>6.3f} {sign}{row.wanted:>5.2f} {row.floor:>9.4g}"
        lines.append(f"{row.name:12} {numbers} {row.idle[0]:>7.1%} {row.idle[1]:>7.1%} {row.unit}")
    return "\n".join(lines)


async def engines(model: Path, names: list[str], split: Split, options: dict[str, str]) -> list[Compared]:
    config = json.loads((model / "config.json").read_text())
    known = {field: config[field] for field in Shape.__struct_fields__ if field in config}
    shape, vocab = Shape(**known, fp8="fp8" in options.get("plugins", "")), config["vocab_size"]
    given: dict[str, Any] = {"model": str(model), "load": "dummy", "device": "cuda", "kv_tokens": KV_TOKENS, **options}
    rows: list[Compared] = []
    async with AsyncEngine(**given, tp=split.tp, pp=split.pp) as several, AsyncEngine(**given) as one:
        benches = {}
        for each, engine in ((ONE, one), (split, several)):
            info = await engine.front.ready()
            phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in info.phases.items())
            print(
                f"{each}: {info.attention} on {info.device}, {info.pages * info.page_size} tokens; {phases}",
                flush=True,
            )
            benches[each] = Bench(engine, shape, PEERS.get(model.name, {}), vocab)
            for temperature in (0.6, 0.0):
                await benches[each].seconds(workloads.warm_up(vocab), temperature)
        for name in names:
            rows.append(await compare(benches, name, GOALS[name], split))
            print(*table(rows[-1:], split).splitlines()[1:], flush=True)
    return rows


def shares(rows: list[Compared], found: list[Sum], layers: int) -> str:
    """What the sums of a step take of it, beside their time on the link."""
    said = []
    for row in rows:
        count = {"latency": 1, "step 8": 8, "step 64": 64, "step 256": 256}.get(row.name)
        for each in found:
            if each.rows == count:
                best = min(way for way in (each.words, each.by_rows, each.nccl) if way is not None)
                step_us = 1e3 * row.several
                said.append(
                    f"{row.name}: sums and norms {2 * layers * best / step_us:.1%} of a step, beyond the norms "
                    f"{2 * layers * (best - each.norm) / step_us:.1%}, link {2 * layers * each.floor / step_us:.2%}"
                )
    return "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory with a config.json")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--rows", help=f"of checks, sums, {', '.join(GOALS)}; default: all")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the engines")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args()
    split = Split(given.tp, given.pp)
    if (seen := torch.cuda.device_count()) < split.ranks:
        parser.error(f"{split} needs {split.ranks} GPUs, and torch sees {seen}")
    names = given.rows.split(",") if given.rows else ["checks", "sums", *GOALS]
    config = json.loads((given.model / "config.json").read_text())
    found: list[Sum] = []
    if given.tp > 1:
        with tempfile.TemporaryDirectory() as folder, open_ranks(Path(folder), given.tp, gpus=True) as ranks:
            found = ranks.run(sums, config["hidden_size"], 20)[0]
        print(f"sums of our kernel are NCCL's\n{sums_table(found)}", flush=True)
    if "checks" in names:
        print(anyio.run(same_ids, split), flush=True)
    rows: list[Compared] = []
    if wanted := [name for name in GOALS if name in names]:
        options = dict(option.split("=", 1) for option in given.option)
        rows = anyio.run(engines, given.model, wanted, split, options, backend_options={"use_uvloop": True})
        print(f"{table(rows, split)}\n{shares(rows, found, config['num_hidden_layers'])}")
    if given.json:
        given.json.write_text(json.dumps({"sums": to_builtins(found), "rows": to_builtins(rows)}, indent=1))


if __name__ == "__main__":
    main()
