"""Some tokens times the matrices of real models on a GPU: torch, our own kernels with several cuts, and the floor.

    python -m bench.kernels.linear [--tokens 1,32,64,128,256] [--models qwen3-0.6b,...]

A captured graph multiplies by more matrices than the second-level cache holds, one after the other, as a model does; us
each. The floor is the larger of reading the matrix at 4.3 TB/s and multiplying at 790 TFLOP/s. `chain` is one layer's
matrices with the norms and the activation between them, without attention.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from bench.lib.floors import BANDWIDTH, RATE
from bench.lib.timing import graph_time
from engine.kernels.dense.linear import Cut, skinny_linear
from engine.kernels.dense.triton import TritonOps

DEVICE = torch.device("cuda")
SHAPES = {
    "qwen3-0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
    "llama3.1-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
HEADS = {"qwen3-0.6b": (151936, 1024), "llama3.1-8b": (128256, 4096)}
CUTS = [
    Cut(rows=rows, columns=columns, warps=warps, stages=stages, tokens=tokens)
    for rows, columns, warps, stages, tokens in (
        (16, 256, 4, 4, 64), (32, 128, 4, 5, 64), (32, 256, 4, 4, 64), (64, 128, 4, 4, 64), (64, 64, 4, 6, 64),
        (16, 512, 4, 3, 64), (64, 128, 8, 5, 64), (128, 128, 8, 4, 64),
        (16, 256, 4, 3, 128), (32, 128, 4, 4, 128), (64, 128, 4, 3, 128), (128, 64, 8, 4, 128),
    )
]  # fmt: skip


def matrices(rows: int, columns: int) -> list[Tensor]:
    count = max(4, min(48, (300 << 20) // (rows * columns * 2)))
    return [torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16) * 0.02 for _ in range(count)]


def best_cuts(inputs: Tensor, weights: list[Tensor]) -> list[tuple[float, Cut]]:
    times = []
    wanted = linear(inputs, weights[0])
    for cut in CUTS:
        if cut.tokens > 64 >= len(inputs):
            continue  # the same as with fewer
        try:
            got = skinny_linear(inputs, weights[0], None, cut)
            assert (got - wanted).norm() < 2e-2 * wanted.norm(), f"{cut} computes something else"
            times.append((graph_time(partial(skinny_linear, inputs, bias=None, cut=cut), weights), cut))
        except triton.runtime.errors.OutOfResources:
            continue
    return sorted(times, key=lambda each: each[0])


def bench_matrix(name: str, shape: tuple[int, int], tokens: int) -> Cut | None:
    weights = matrices(*shape)
    inputs = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.bfloat16)
    floor = max(shape[0] * shape[1] * 2 / BANDWIDTH, 2 * shape[0] * shape[1] * tokens / RATE) * 1e6
    line = f"{name:20} {tokens:>4} {floor:7.2f}  torch {graph_time(lambda w: linear(inputs, w), weights):7.2f}"
    if tokens == 1:
        for rows, columns in ((2, 1024), (2, 2048), (2, 4096), (4, 1024), (4, 2048), (8, 1024), (1, 4096)):
            took = graph_time(
                partial(TritonOps().vector_linear, inputs, bias=None, rows=rows, columns=columns), weights
            )
            line += f" {rows}x{columns} {took:.2f}"
    found = best_cuts(inputs, weights) if tokens > 1 else []
    for took, cut in found[:3]:
        line += f"  {took:.2f} [{cut.tokens}x{cut.rows}x{cut.columns} w{cut.warps} s{cut.stages}]"
    print(line, flush=True)
    return found[0][1] if found else None


def bench_chain(name: str, tokens: int, cuts: dict[str, Cut | None]) -> str:
    """Microseconds of a layer without attention, over several layers' weights."""
    ops = TritonOps()
    layers = [{part: matrices(*shape)[0] for part, shape in SHAPES[name].items()} for _ in range(8)]
    norm = torch.ones(SHAPES[name]["qkv"][1], device=DEVICE, dtype=torch.bfloat16)
    hidden, stream = (torch.randn(tokens, len(norm), device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    attended = torch.randn(tokens, SHAPES[name]["o"][1], device=DEVICE, dtype=torch.bfloat16)

    def layer(times: Callable[[Tensor, Tensor, str], Tensor], parts: dict[str, Tensor]) -> None:
        x, _ = ops.add_rms_norm(hidden, stream, norm, 1e-6)
        times(x, parts["qkv"], "qkv")
        x = times(attended, parts["o"], "o")
        x, _ = ops.add_rms_norm(x, stream, norm, 1e-6)
        times(ops.silu_and_mul(times(x, parts["gate_up"], "gate_up")), parts["down"], "down")

    ways: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
        "torch": lambda x, w, part: linear(x, w),
        "skinny": lambda x, w, part: skinny_linear(x, w, None, cuts[part] or CUTS[0]),
    }
    if tokens == 1:
        ways["vector"] = lambda x, w, part: ops.vector_linear(x, w, None)
    times = {way: graph_time(partial(layer, each), layers) for way, each in ways.items()}
    return ", ".join(f"{way} {took:.2f}" for way, took in times.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,32,64,128,256")
    parser.add_argument("--models", default=",".join(SHAPES))
    given = parser.parse_args()
    for name, tokens in product(given.models.split(","), map(int, given.tokens.split(","))):
        cuts = {
            part: bench_matrix(f"{name} {part}", shape, tokens)
            for part, shape in {**SHAPES[name], "head": HEADS[name]}.items()
        }
        print(f"{name} chain {tokens}: {bench_chain(name, tokens, cuts)}", flush=True)


if __name__ == "__main__":
    main()
