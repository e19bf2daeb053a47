"""Products with FP8 weights on a GPU, every way there is, against the time to read the matrix or to multiply by it.

    python bench/kernels/fp8.py [--shape NAME,...] [--tokens 1,8,...] [--sweep]

In microseconds, each of a CUDA graph over more matrices than the cache holds, in turn: the floor (an H200's 4.3 TB/s
and 1,580 TFLOP/s), cuBLAS in bfloat16, ours by `vector`, by `kernel` with activations as they are, and with FP8 ones
(`kernel8`), torch's product with scales of blocks (`blocks`) and of rows (`rows`), FlashInfer's (`flashinfer`, which
compiles on first use). Those with FP8 activations make them first. `--sweep` tries other cuts of our kernel;
`READING_TOKENS` and `CUTS` of engine/kernels/fp8/triton.py are the place for what is best.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench_cudagraph

from bench.lib.floors import BANDWIDTH, RATE_FP8
from engine.kernels.fp8.reference import E4M3, Fp8Ops, Fp8Weight, blocks
from engine.kernels.fp8.triton import Cut, TritonFp8Ops, quantize_tokens

OPS = TritonFp8Ops()
SHAPES = {
    "v3 q_a kv_a": (2112, 7168),
    "v3 q_b": (24576, 1536),
    "v3 o": (7168, 16384),
    "v3 shared gate_up": (4096, 7168),
    "v3 shared down": (7168, 2048),
    "v3 dense gate_up": (36864, 7168),
    "v2-lite q": (3072, 2048),
    "v2-lite shared gate_up": (5632, 2048),
    "v2-lite shared down": (2048, 2816),
    "llama3.1-8b gate_up": (28672, 4096),
    "llama3.1-8b down": (4096, 14336),
}
Way = Callable[[Tensor, Fp8Weight], Tensor]


def weight_of(rows: int, columns: int, rowwise: bool = False) -> Fp8Weight:
    numbers = (torch.randn(rows, columns, device="cuda") * 16).to(E4M3)
    shape = (rows,) if rowwise else (blocks(rows), blocks(columns))
    return OPS.weight(numbers, torch.full(shape, columns**-0.5 / 16, device="cuda"))


def microseconds(call: Way, inputs: Tensor, weights: list[Fp8Weight]) -> float:
    milliseconds: float = do_bench_cudagraph(lambda: [call(inputs, weight) for weight in weights], rep=20)
    return 1e3 * milliseconds / len(weights)


def bfloat16(inputs: Tensor, rows: int, count: int) -> float:
    """Microseconds of cuBLAS."""
    dense = [torch.randn(rows, inputs.shape[1], device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    milliseconds: float = do_bench_cudagraph(lambda: [inputs @ each.t() for each in dense], rep=20)
    return 1e3 * milliseconds / count


def kernel8(cut: Cut | None = None) -> Way:
    return lambda inputs, weight: OPS.by_kernel(*quantize_tokens(inputs), weight, None, inputs.dtype, cut)


def flashinfer(inputs: Tensor, weight: Fp8Weight) -> Tensor:
    from flashinfer.gemm import fp8_blockscale_gemm_sm90

    product: Tensor = fp8_blockscale_gemm_sm90(inputs, weight.numbers, None, weight.scale)
    return product


def ways(tokens: int) -> Iterator[tuple[str, Way]]:
    if tokens == 1:
        yield "vector", lambda inputs, weight: OPS.by_vector(inputs, weight, None)
    yield "kernel", lambda inputs, weight: OPS.by_kernel(inputs, None, weight, None)
    yield "kernel8", kernel8()
    yield "blocks", lambda inputs, weight: OPS.by_blocks(inputs, weight, None)
    if find_spec("flashinfer"):
        yield "flashinfer", flashinfer


def line(tokens: int, rows: int, columns: int, weights: list[Fp8Weight]) -> str:
    inputs = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    wanted = Fp8Ops().linear(inputs, weights[0], None).float()
    cublas = bfloat16(inputs, rows, len(weights) // 2 + 1)
    cells = []
    for name, way in ways(tokens):
        try:
            got = way(inputs, weights[0]).float()
        except (RuntimeError, ValueError, ImportError, AssertionError) as error:
            cells.append(f"{name} no: {type(error).__name__} {str(error)[:60]!r}")
            continue
        off = float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
        cells.append(f"{name} {microseconds(way, inputs, weights):.1f}" + (f" WRONG by {off:.2f}" if off > 0.1 else ""))
    rowwise = [weight_of(rows, columns, rowwise=True) for _ in range(len(weights))]
    cells.append(f"rows {microseconds(lambda x, w: OPS.by_lines(x, w, None), inputs, rowwise):.1f}")
    floor = 1e6 * max(
        (rows * columns + 2 * tokens * (rows + columns)) / BANDWIDTH, 2 * tokens * rows * columns / RATE_FP8
    )
    return f"{tokens:6} floor {floor:8.1f}  bf16 {cublas:8.1f}  " + "  ".join(cells)


def candidates(tokens: int, quantized: bool) -> Iterator[Cut]:
    rows = [each for each in (16, 32, 64, 128) if each / 2 < tokens or each == 16]
    depths = (128,) if quantized else (128, 256, 512)
    for row, column, depth, warps, stages in itertools.product(rows, (16, 32, 64, 128), depths, (4, 8), (3, 4, 5)):
        if row * column > 16384 * warps // 8 or (row * column < 2048 and warps == 8) or (quantized and row < 64):
            continue
        if depth * (row * (1 if quantized else 2) + column) * stages <= 220_000:
            yield Cut(row, column, depth, 8 if tokens > 128 else 1, warps, stages)


def sweep(tokens: int, columns: int, weights: list[Fp8Weight]) -> None:
    inputs = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    for quantized in (False, True):
        if (quantized and tokens < 64) or (not quantized and tokens > 256):
            continue
        times = []
        for cut in candidates(tokens, quantized):
            way: Way = kernel8(cut) if quantized else _plain(cut)
            try:
                way(inputs, weights[0])
            except (OutOfResources, PTXASError):
                continue
            times.append((microseconds(way, inputs, weights), cut))
        for took, cut in sorted(times, key=lambda each: each[0])[:4]:
            print(f"  {tokens:6} tokens {'kernel8' if quantized else 'kernel':8} {took:9.1f} us  {cut}", flush=True)


def _plain(cut: Cut) -> Way:
    return lambda inputs, weight: OPS.by_kernel(inputs, None, weight, None, cut=cut)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="v", help=f"parts of the names, of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default="1,8,32,64,128,256,1024,8192")
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args()
    for name, (rows, columns) in SHAPES.items():
        if not any(part in name for part in given.shape.split(",")):
            continue
        print(f"\n{name}, {rows} x {columns}; us")
        weights = [weight_of(rows, columns) for _ in range(max(2, (256 << 20) // (rows * columns)))]
        for tokens in map(int, given.tokens.split(",")):
            print(line(tokens, rows, columns, weights), flush=True)
            if given.sweep:
                sweep(tokens, columns, weights)


if __name__ == "__main__":
    main()
