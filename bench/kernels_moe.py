"""A layer of experts on a GPU, against the time to read the chosen experts' weights or to multiply by them.

    python bench/kernels_moe.py [--shape v2-lite,v3] [--type bf16,fp8] [--tokens 1,8,...] [--sweep]

Prints for each number of tokens: how many experts were chosen, the floor (an H200's 4.3 TB/s, 790 TFLOP/s in bfloat16
and twice that in FP8), and in microseconds the whole layer, its parts, each choice by itself (`vector`) and torch's
grouped product (`library`). Every time is a CUDA graph's. `--sweep` tries other cuts for gate and up and for down,
checks what they compute, and prints the best: `REGIMES` of engine/kernels/triton_moe.py is the place for them.
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

from engine.kernels.fp8 import BLOCK, E4M3
from engine.kernels.moe import ExpertWeights, Routed, Routing
from engine.kernels.triton_experts import combine, multiply, vector_down, vector_up
from engine.kernels.triton_fp8 import Cut, quantize_tokens
from engine.kernels.triton_moe import QUANTIZED_ROWS, VECTOR_TOKENS, TritonMoeOps, regime
from engine.kernels.triton_routing import order_reference

BANDWIDTH, RATE = 4.3e12, 790e12
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


def line(shape: Shape, weights: ExpertWeights, tokens: int, fp8: bool) -> str:
    hidden, gate, bias = step(shape, tokens)

    def route() -> Routed:
        return OPS.route(OPS.gate(hidden, gate), bias, shape.routing)

    routed = route()
    chosen = len(routed.experts.unique())
    least = floor(shape, tokens, chosen, fp8)
    whole = microseconds(lambda: OPS.experts(hidden, route(), weights))
    routing = microseconds(route)
    products = microseconds(lambda: OPS.experts(hidden, routed, weights))
    each, parts, library = "", "", ""
    if tokens <= 16:

        def by_choice() -> Tensor:
            made = vector_up(hidden, weights.gate_up, weights.gate_up_scale, routed.experts)
            return vector_down(made, weights.down, weights.down_scale, routed.experts, routed.weights, None)

        each = f"{microseconds(by_choice):.1f}"
    if routed.order is not None:
        up, down = product_times(shape, weights, hidden, routed)
        lines = torch.empty(tokens * shape.routing.top_k, shape.size, dtype=torch.bfloat16, device="cuda")
        last = microseconds(lambda: combine(lines, routed.weights, None, None))
        parts = f"{up:.1f} + {down:.1f} + {last:.1f}"
    if not fp8 and routed.order is not None and hasattr(torch, "_grouped_mm"):
        library = f"{microseconds(lambda: OPS.by_library(hidden, routed, weights, None)):.1f}"
    return (
        f"{tokens:6} {chosen:7} {least:8.1f} {whole:8.1f} {least / whole:6.0%} {routing:8.1f} {products:8.1f} "
        f"{each:>8} {library:>8}  {parts}"
    )


def product_times(shape: Shape, weights: ExpertWeights, hidden: Tensor, routed: Routed) -> tuple[float, float]:
    """Those of the two products as they are cut now."""
    now = regime(len(hidden), shape.routing.top_k, shape.routing.experts)
    pair = Pair(shape, weights, hidden, routed)
    up, down = now.fp8 if pair.fp8 else now.bfloat16
    return microseconds(lambda: pair.up(up)), microseconds(lambda: pair.down(down))


class Pair:
    """The products of one step, with the order that a cut needs."""

    def __init__(self, shape: Shape, weights: ExpertWeights, hidden: Tensor, routed: Routed) -> None:
        self.shape, self.weights, self.routed = shape, weights, routed
        self.hidden, self.numbers = hidden, quantize_tokens(hidden)
        self.choices = routed.experts.numel()
        made = torch.randn(self.choices, shape.inner, device="cuda").bfloat16()
        self.made, self.made_numbers = made, quantize_tokens(made)
        self.fp8 = weights.down.dtype == E4M3
        self.orders = {rows: order_reference(routed.experts, len(weights.down), rows) for rows in (16, 32, 64, 128)}

    def up(self, cut: Cut) -> Tensor:
        quantized = self.fp8 and cut.rows >= QUANTIZED_ROWS
        kind = E4M3 if quantized else torch.bfloat16
        out = torch.empty(self.choices, self.shape.inner, dtype=kind, device="cuda")
        scales = torch.empty(self.shape.inner // BLOCK, self.choices, device="cuda").t() if quantized else None
        inputs, input_scales = self.numbers if quantized else (self.hidden, None)
        gate_up, scale = self.weights.gate_up, self.weights.gate_up_scale
        top_k = self.shape.routing.top_k
        multiply(inputs, input_scales, gate_up, scale, self.orders[cut.rows], cut, top_k, out, scales)
        return out if scales is None else out.float() * scales.repeat_interleave(BLOCK, 1)

    def down(self, cut: Cut) -> Tensor:
        quantized = self.fp8 and cut.rows >= QUANTIZED_ROWS
        out = torch.empty(self.choices, self.shape.size, dtype=torch.bfloat16, device="cuda")
        inputs, input_scales = self.made_numbers if quantized else (self.made, None)
        down, scale = self.weights.down, self.weights.down_scale
        multiply(inputs, input_scales, down, scale, self.orders[cut.rows], cut, 0, out)
        return out


# ── other cuts ───────────────────────────────────────────────────────────────────────────────


def candidates(share: float, fp8: bool, gated: bool) -> Iterator[Cut]:
    """Cuts worth a try where an average expert has `share` tokens."""
    rows = [each for each in (16, 32, 64, 128) if each / 4 <= share + 4 and each * 8 >= min(share, 512)]
    for row, column, depth, warps in itertools.product(rows, (32, 64, 128, 256), (64, 128, 256), (4, 8)):
        quantized = fp8 and row >= QUANTIZED_ROWS
        area = row * column * (2 if gated else 1)
        if fp8 and (column > BLOCK or depth < 128 or (quantized and gated and column != BLOCK)):
            continue
        if depth == 256 and row > 32:
            continue
        if area > 32768 * warps // 4 or (area < 4096 and warps == 8) or (column == 256 and (gated or row < 128)):
            continue
        stage = depth * (row * (1 if quantized else 2) + column * (2 if gated else 1) * (1 if fp8 else 2))
        for stages in (3, 4, 5):
            if stage * stages <= 220_000:
                yield Cut(row, column, depth, 1 if row == 16 else 8, warps, stages)


def try_cut(pair: Pair, gated: bool, cut: Cut) -> Tensor | None:
    """What it computes; None where it does not fit the device."""
    try:
        return pair.up(cut) if gated else pair.down(cut)
    except (OutOfResources, PTXASError):
        return None


def compile_some(name: str, fp8: bool, gated: bool, cuts: list[Cut]) -> None:
    """In a process of its own: leaves the kernels in Triton's cache."""
    shape = SHAPES[name]
    hidden, gate, bias = step(shape, 5)
    routed = OPS.route(OPS.gate(hidden, gate), bias, shape.routing)
    routed = Routed(routed.weights, routed.experts % 2)
    pair = Pair(shape, weights_of(shape, fp8, 2), hidden, routed)
    for cut in cuts:
        try_cut(pair, gated, cut)
    torch.cuda.synchronize()


def sweep(name: str, weights: ExpertWeights, tokens: int, fp8: bool, pool: ProcessPoolExecutor, workers: int) -> None:
    shape = SHAPES[name]
    hidden, gate, bias = step(shape, tokens)
    pair = Pair(shape, weights, hidden, OPS.route(OPS.gate(hidden, gate), bias, shape.routing))
    share = tokens * shape.routing.top_k / shape.routing.experts
    for gated in (True, False):
        cuts = list(candidates(share, fp8, gated))
        tasks = [pool.submit(compile_some, name, fp8, gated, cuts[first::workers]) for first in range(workers)]
        for task in tasks:
            task.result()
        what = "gate, up" if gated else "down"
        for took, cut, worst in sorted(timed(pair, gated, cuts), key=lambda each: each[0])[:6]:
            wrong = f"  WRONG by {worst:.2f}" if worst > 1 else ""
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
    """Microseconds of each cut that fits, and how far it is from the first, in the typical size of a number."""
    wanted = None
    for cut in cuts:
        got = try_cut(pair, gated, cut)
        if got is not None:
            wanted = got.float() if wanted is None else wanted
            worst = float((got.float() - wanted).abs().max() / wanted.square().mean().sqrt())
            yield microseconds(partial(try_cut, pair, gated, cut)), cut, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="v2-lite,v3", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--type", default="bf16,fp8")
    parser.add_argument("--tokens", default="1,2,4,8,32,64,128,256,1024,8192")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile for --sweep")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for name, kind in itertools.product(given.shape.split(","), given.type.split(",")):
        shape, fp8 = SHAPES[name], kind == "fp8"
        if name == "v3" and not fp8:
            continue  # 22 GB a layer in FP8
        weights = weights_of(shape, fp8, shape.routing.experts)
        print(f"\n{name}, {kind}; us")
        columns = ("tokens", "experts", "floor", "layer", "of it", "routing", "products", "vector", "library")
        print("{:>6} {:>7} {:>8} {:>8} {:>6} {:>8} {:>8} {:>8} {:>8}  up + down + combine".format(*columns))
        for tokens in map(int, given.tokens.split(",")):
            print(line(shape, weights, tokens, fp8), flush=True)
        if given.sweep:
            with ProcessPoolExecutor(given.workers, mp_context=context) as pool:
                for tokens in map(int, given.tokens.split(",")):
                    if tokens <= VECTOR_TOKENS:
                        sweep_vectors(name, weights, tokens)
                    else:
                        sweep(name, weights, tokens, fp8, pool, given.workers)
        del weights


if __name__ == "__main__":
    main()
