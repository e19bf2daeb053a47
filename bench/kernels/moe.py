"""A layer of experts on a GPU, against the time to read the chosen experts' weights or to multiply by them.

    python -m bench.kernels.moe [--shape v2-lite,v3] [--type bf16,fp8] [--tokens 1,8,...] [--sweep]

Prints for each number of tokens: how many experts were chosen, the floor (an H200's 4.3 TB/s, 790 TFLOP/s in bfloat16
and twice that in FP8), and in microseconds the whole layer, its parts, what it takes to count choices, and without
`--sweep` other ways: each choice as a vector by itself (`vector`); torch's grouped product, or for FP8 weights that by
activations in bfloat16 (`other`).
Every time is a CUDA graph's. `--sweep` tries other cuts for gate and up and for down, checks what they compute, and
prints the best: for `REGIMES` of engine/kernels/experts/triton.py, and `ALONE` for FP8 weights and few tokens. For FP8
the cuts are few, chosen by their registers and bytes under way; down must be as deep as gate and up have columns.
"""

import argparse
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench_cudagraph

from bench.lib.floors import BANDWIDTH, RATE
from engine.kernels.experts.products import combine, multiply, vector_down, vector_up
from engine.kernels.experts.products_fp8 import multiply_fp8
from engine.kernels.experts.reference import ExpertWeights, Routed, Routing
from engine.kernels.experts.routing import order_reference
from engine.kernels.experts.triton import ALONE, VECTOR_TOKENS, TritonMoeOps, regime
from engine.kernels.fp8.reference import BLOCK, E4M3
from engine.kernels.fp8.triton import Cut, quantize_tokens

OPS = TritonMoeOps()


@dataclass(frozen=True)
class Shape:
    routing: Routing
    size: int
    inner: int


SHAPES = {
    "v2-lite": Shape(Routing(experts=64, top_k=6), 2048, 1408),
    "v3": Shape(
        Routing(experts=256, top_k=8, scoring="sigmoid", groups=8, kept_groups=4, group_best=2, normalised=True),
        7168,
        2048,
    ),
    "qwen3-30b": Shape(Routing(experts=128, top_k=8, normalised=True), 2048, 768),
}


def microseconds(call: Callable[[], object]) -> float:
    return 1e3 * float(do_bench_cudagraph(call, rep=20))


def weights_of(shape: Shape, fp8: bool, experts: int) -> ExpertWeights:
    """Random ones: their numbers change no time."""

    def matrix(rows: int, columns: int) -> Tensor:
        out = torch.empty(experts, rows, columns, dtype=E4M3 if fp8 else torch.bfloat16, device="cuda")
        for one in out:
            one.copy_(torch.randn(rows, columns, device="cuda") * (16 if fp8 else columns**-0.5))
        return out

    gate_up, down = matrix(2 * shape.inner, shape.size), matrix(shape.size, shape.inner)
    if not fp8:
        return ExpertWeights(gate_up, down)
    blocks = (shape.inner // BLOCK, shape.size // BLOCK)
    up_scale = torch.full((experts, 2, *blocks), shape.size**-0.5 / 16, device="cuda")
    down_scale = torch.full((experts, *blocks[::-1]), shape.inner**-0.5 / 16, device="cuda")
    return ExpertWeights(gate_up, down, up_scale, down_scale)


def step(shape: Shape, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, the router's weight and its bias."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    hidden = torch.randn(tokens, shape.size, device="cuda", generator=generator).bfloat16()
    gate = torch.randn(shape.routing.experts, shape.size, device="cuda", generator=generator).bfloat16()
    biased = shape.routing.scoring == "sigmoid"
    return hidden, gate * shape.size**-0.5, torch.zeros(shape.routing.experts, device="cuda") if biased else None


def floor(shape: Shape, tokens: int, chosen: int, fp8: bool) -> float:
    """Microseconds."""
    numbers = 3 * shape.size * shape.inner
    read = chosen * numbers * (1 if fp8 else 2) + shape.routing.experts * shape.size * 2 + 4 * tokens * shape.size
    return 1e6 * max(read / BANDWIDTH, 2 * tokens * shape.routing.top_k * numbers / RATE / (2 if fp8 else 1))


def line(shape: Shape, weights: ExpertWeights, tokens: int, fp8: bool, others: bool) -> str:
    hidden, gate, bias = step(shape, tokens)

    def route(counts: Tensor | None = None) -> Routed:
        return OPS.route(OPS.gate(hidden, gate), bias, shape.routing, counts)

    routed, counts = route(), torch.zeros(shape.routing.experts, dtype=torch.int64, device="cuda")
    chosen = len(routed.experts.unique())
    least = floor(shape, tokens, chosen, fp8)
    whole = microseconds(lambda: OPS.experts(hidden, route(), weights))
    routing = microseconds(route)
    counting = microseconds(lambda: route(counts)) - routing
    products = microseconds(lambda: OPS.experts(hidden, routed, weights))
    each, parts, other = "", "", ""
    if others and tokens <= 16:

        def by_choice() -> Tensor:
            made = vector_up(hidden, weights.gate_up, weights.gate_up_scale, routed.experts)
            return vector_down(made, weights.down, weights.down_scale, routed.experts, routed.weights, None)

        each = f"{microseconds(by_choice):.1f}"
    if routed.order is not None or fp8:
        up, down = product_times(shape, weights, hidden, routed)
        lines = torch.empty(tokens * shape.routing.top_k, shape.size, dtype=torch.bfloat16, device="cuda")
        last = microseconds(lambda: combine(lines, routed.weights, None, None))
        parts = f"{up:.1f} + {down:.1f} + {last:.1f}"
    if others and routed.order is not None:
        cuts = regime(tokens, shape.routing.top_k, shape.routing.experts).bfloat16
        if fp8:
            other = f"{microseconds(lambda: OPS.by_task(hidden, routed, weights, None, *cuts)):.1f}"
        elif hasattr(torch, "_grouped_mm"):
            other = f"{microseconds(lambda: OPS.by_library(hidden, routed, weights, None)):.1f}"
    return (
        f"{tokens:6} {chosen:7} {least:8.1f} {whole:8.1f} {least / whole:6.0%} {routing:8.1f} {counting:8.2f} "
        f"{products:8.1f} {each:>8} {other:>8}  {parts}"
    )


def cuts_now(shape: Shape, tokens: int, fp8: bool) -> tuple[Cut, Cut]:
    """Those of gate and up, and of down, in a step of so many tokens."""
    if fp8 and tokens <= VECTOR_TOKENS:
        return ALONE
    now = regime(tokens, shape.routing.top_k, shape.routing.experts)
    return now.fp8 if fp8 else now.bfloat16


def product_times(shape: Shape, weights: ExpertWeights, hidden: Tensor, routed: Routed) -> tuple[float, float]:
    """Those of the two products as they are cut now."""
    pair = Pair(shape, weights, hidden, routed)
    up, down = cuts_now(shape, len(hidden), pair.fp8)
    return microseconds(lambda: pair.up(up)), microseconds(lambda: pair.down(down))


class Pair:
    """The products of one step, with the order that a cut needs; without one where each choice is a task."""

    def __init__(self, shape: Shape, weights: ExpertWeights, hidden: Tensor, routed: Routed) -> None:
        self.shape, self.weights, self.hidden = shape, weights, hidden
        self.choices, self.top_k = routed.experts.numel(), shape.routing.top_k
        self.made = torch.randn(self.choices, shape.inner, device="cuda").bfloat16()
        self.fp8 = weights.down.dtype == E4M3
        self.numbers = quantize_tokens(hidden)
        self.made_numbers = {each: quantize_tokens(self.made, each=each) for each in (64, BLOCK)}
        rows = (16, 32, 64, 128, 256)
        self.orders = {each: order_reference(routed.experts, len(weights.down), each) for each in rows}
        self.alone = routed.experts if self.fp8 and len(hidden) <= VECTOR_TOKENS else None

    def up(self, cut: Cut) -> tuple[Tensor, Tensor | None]:
        """What is made, and in FP8 its scales."""
        out = torch.empty(self.choices, self.shape.inner, dtype=E4M3 if self.fp8 else torch.bfloat16, device="cuda")
        gate_up, scale, order = self.weights.gate_up, self.weights.gate_up_scale, self.orders[cut.rows]
        if scale is None:
            multiply(self.hidden, gate_up, None, order, cut, self.top_k, out)
            return out, None
        scales = torch.empty(self.shape.inner // cut.columns, self.choices, device="cuda").t()
        tasks = order if self.alone is None else self.alone
        multiply_fp8(*self.numbers, gate_up, scale, tasks, cut, self.top_k, out, scales)
        return out, scales

    def down(self, cut: Cut) -> Tensor:
        out = torch.empty(self.choices, self.shape.size, dtype=torch.bfloat16, device="cuda")
        down, scale, order = self.weights.down, self.weights.down_scale, self.orders[cut.rows]
        if scale is None:
            multiply(self.made, down, None, order, cut, 0, out)
        else:
            tasks = order if self.alone is None else self.alone
            multiply_fp8(*self.made_numbers[cut.depth], down, scale, tasks, cut, 0, out)
        return out


# ── other cuts ───────────────────────────────────────────────────────────────────────────────


def candidates(share: float, gated: bool) -> Iterator[Cut]:
    """Cuts for bfloat16 worth a try where an average expert has `share` tokens."""
    rows = [each for each in (16, 32, 64, 128) if each / 4 <= share + 4 and each * 8 >= min(share, 512)]
    for row, column, depth, warps in itertools.product(rows, (32, 64, 128, 256), (64, 128, 256), (4, 8)):
        area = row * column * (2 if gated else 1)
        if depth == 256 and row > 32:
            continue
        if area > 32768 * warps // 4 or (area < 4096 and warps == 8) or (column == 256 and (gated or row < 128)):
            continue
        stage = depth * 2 * (row + column * (2 if gated else 1))
        for stages in (3, 4, 5):
            if stage * stages <= 220_000:
                yield Cut(row, column, depth, 1 if row == 16 else 8, warps, stages)


# In FP8, up to a share of tokens: for gate and up, and for down, as columns, depth, warps, stages.
FEW_FP8 = (
    ((64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (128, 128, 4, 2), (128, 128, 4, 3), (128, 128, 8, 3)),
    ((64, 128, 4, 4), (64, 128, 4, 6), (128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 8, 4), (64, 64, 4, 6),
     (128, 64, 4, 6)),
)  # fmt: skip
ALONE_FP8 = (
    ((64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 4, 8), (64, 128, 4, 11), (128, 128, 4, 3), (128, 128, 4, 5)),
    ((64, 64, 4, 8), (64, 64, 4, 12), (128, 64, 4, 6), (128, 64, 4, 10), (64, 128, 4, 6), (128, 128, 4, 5)),
)
MANY_FP8 = (
    (Cut(128, 128, 128, 8, 8, 3), Cut(128, 128, 128, 8, 16, 3), Cut(128, 64, 128, 8, 8, 3), Cut(128, 64, 128, 8, 8, 4),
     Cut(256, 64, 128, 8, 16, 3), Cut(64, 128, 128, 8, 8, 3), Cut(64, 64, 128, 8, 4, 3)),
    (Cut(128, 128, 128, 8, 8, 3), Cut(128, 128, 128, 16, 8, 4), Cut(128, 128, 128, 8, 16, 4),
     Cut(128, 64, 128, 8, 8, 4), Cut(128, 128, 64, 8, 8, 4), Cut(64, 128, 128, 8, 4, 3), Cut(64, 128, 128, 8, 8, 3)),
)  # fmt: skip


def fp8_candidates(share: float, alone: bool, gated: bool) -> list[Cut]:
    """Eight at most."""
    if share > 64:
        return list(MANY_FP8[not gated])
    few = (ALONE_FP8 if alone else FEW_FP8)[not gated]
    row = 16 if alone or share <= 8 else 32 if share <= 24 else 64
    cuts = [Cut(row, column, depth, 1 if row == 16 else 4, *rest) for column, depth, *rest in few]
    wider = Cut(64, 128, 128, 4, 8 if gated else 4, 3)
    if row == 64 and gated:  # others spill
        cuts = [each for each in cuts if each.columns == 64 or each.warps == 8]
    return cuts if row == 16 else [*cuts, wider]


def trials(shape: Shape, tokens: int, fp8: bool, gated: bool) -> list[Cut]:
    """The cut that is used now, with which others are compared, and others."""
    share = tokens * shape.routing.top_k / shape.routing.experts
    others = fp8_candidates(share, tokens <= VECTOR_TOKENS, gated) if fp8 else candidates(share, gated)
    return list(dict.fromkeys([cuts_now(shape, tokens, fp8)[not gated], *others]))


def try_cut(pair: Pair, gated: bool, cut: Cut) -> Tensor | None:
    """What it computes; None where it does not fit the device."""
    try:
        made, scales = pair.up(cut) if gated else (pair.down(cut), None)
    except (OutOfResources, PTXASError):
        return None
    return made.float() if scales is None else made.float() * scales.repeat_interleave(cut.columns, 1)


def compile_some(name: str, fp8: bool, some: list[tuple[bool, bool, Cut]]) -> None:
    """In a process of its own: leaves kernels in Triton's cache, which are for each choice by itself, for gate and up,
    and cut so."""
    shape = SHAPES[name]
    weights = weights_of(shape, fp8, 2)
    pairs = []
    for tokens in (5, 1):
        hidden, gate, bias = step(shape, tokens)
        routed = OPS.route(OPS.gate(hidden, gate), bias, shape.routing)
        pairs.append(Pair(shape, weights, hidden, Routed(routed.weights, routed.experts % 2)))
    for alone, gated, cut in some:
        try_cut(pairs[alone], gated, cut)
    torch.cuda.synchronize()


def compile_all(name: str, fp8: bool, steps: list[int], pool: ProcessPoolExecutor, workers: int) -> None:
    """All that the sweeps of these steps will try."""
    shape = SHAPES[name]
    kernels = {
        (fp8 and tokens <= VECTOR_TOKENS, gated, cut): None
        for tokens in steps
        for gated in (True, False)
        if fp8 or tokens > VECTOR_TOKENS
        for cut in trials(shape, tokens, fp8, gated)
    }
    some = list(kernels)
    for task in [pool.submit(compile_some, name, fp8, some[first::workers]) for first in range(workers)]:
        task.result()


def sweep(name: str, weights: ExpertWeights, tokens: int, fp8: bool) -> None:
    shape = SHAPES[name]
    hidden, gate, bias = step(shape, tokens)
    pair = Pair(shape, weights, hidden, OPS.route(OPS.gate(hidden, gate), bias, shape.routing))
    for gated in (True, False):
        what = "gate, up" if gated else "down"
        found = sorted(timed(pair, gated, trials(shape, tokens, fp8, gated)), key=lambda each: each[0])
        for took, cut, worst in found[: 9 if fp8 else 6]:
            wrong = f"  WRONG by {worst:.2f}" if worst > 0.15 else ""
            print(f"  {tokens:6} tokens {what:8} {took:9.1f} us  {cut}{wrong}", flush=True)


def sweep_vectors(name: str, weights: ExpertWeights, tokens: int) -> None:
    """The products of few tokens."""
    shape = SHAPES[name]
    hidden, gate, bias = step(shape, tokens)
    routed = OPS.route(OPS.gate(hidden, gate), bias, shape.routing)
    up, down = (weights.gate_up, weights.gate_up_scale), (weights.down, weights.down_scale)
    made = vector_up(hidden, *up, routed.experts)
    times: dict[str, list[tuple[float, int, int]]] = {"gate, up": [], "down": []}
    for rows, columns in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096)):
        if 2048 <= rows * columns <= 16384:
            first = partial(vector_up, hidden, *up, routed.experts, rows, columns)
            second = partial(vector_down, made, *down, routed.experts, routed.weights, None, rows, columns)
            times["gate, up"].append((microseconds(first), rows, columns))
            times["down"].append((microseconds(second), rows, columns))
    for what, found in times.items():
        best = ", ".join(f"{rows} x {columns} {took:.1f}" for took, rows, columns in sorted(found)[:5])
        print(f"  {tokens:6} tokens {what:8} rows x columns, us: {best}", flush=True)


def timed(pair: Pair, gated: bool, cuts: list[Cut]) -> Iterator[tuple[float, Cut, float]]:
    """Microseconds of each cut that fits, and how far it is from the first: at most 1 in 16 where both round to FP8."""
    wanted = None
    for cut in cuts:
        got = try_cut(pair, gated, cut)
        if got is not None:
            wanted = got if wanted is None else wanted
            typical = wanted.square().mean().sqrt()
            worst = float(((got - wanted).abs() / (wanted.abs() + 10 * typical)).max())
            yield microseconds(partial(pair.up if gated else pair.down, cut)), cut, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="v2-lite,v3", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--type", default="bf16,fp8")
    parser.add_argument("--tokens", default="1,2,4,8,32,64,128,256,1024,8192")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile for --sweep")
    given = parser.parse_args()
    steps = [int(each) for each in given.tokens.split(",")]
    for name, kind in itertools.product(given.shape.split(","), given.type.split(",")):
        shape, fp8 = SHAPES[name], kind == "fp8"
        if name == "v3" and not fp8:
            continue  # 22 GB a layer in FP8
        if given.sweep:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(given.workers, mp_context=context) as pool:
                compile_all(name, fp8, steps, pool, given.workers)
        weights = weights_of(shape, fp8, shape.routing.experts)
        print(f"\n{name}, {kind}; us")
        columns = ("tokens", "experts", "floor", "layer", "of it", "routing", "counting", "products", "vector", "other")
        print("{:>6} {:>7} {:>8} {:>8} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8}  up + down + combine".format(*columns))
        for tokens in steps:
            print(line(shape, weights, tokens, fp8, not given.sweep), flush=True)
        for tokens in steps if given.sweep else ():
            if fp8 or tokens > VECTOR_TOKENS:
                sweep(name, weights, tokens, fp8)
            else:
                sweep_vectors(name, weights, tokens)
        del weights


if __name__ == "__main__":
    main()
