"""One token times the matrices of real models on a GPU: ours, cuBLAS, and the time to read the matrix at 4.3 TB/s.

python bench/kernels_linear.py
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from engine.kernels.triton import TritonOps

BANDWIDTH = 4.3e12
SHAPES = {
    "qwen3-0.6b qkv": (4096, 1024),
    "qwen3-0.6b o": (1024, 2048),
    "qwen3-0.6b gate_up": (6144, 1024),
    "qwen3-0.6b down": (1024, 3072),
    "llama3.1-8b qkv": (6144, 4096),
    "llama3.1-8b o": (4096, 4096),
    "llama3.1-8b gate_up": (28672, 4096),
    "llama3.1-8b down": (4096, 14336),
}


def measure(ops: TritonOps, rows: int, columns: int) -> str:
    """A line of the table; every call multiplies more matrices than the cache holds, in turn, as a model does."""
    count = max(2, (256 << 20) // (rows * columns * 2))
    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    inputs = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)

    def microseconds(call: Callable[[Tensor], Tensor]) -> float:
        milliseconds: float = do_bench_cudagraph(lambda: [call(weight) for weight in weights], rep=20)
        return 1e3 * milliseconds / count

    cublas = microseconds(lambda weight: torch.nn.functional.linear(inputs, weight))
    ours = microseconds(lambda weight: ops.vector_linear(inputs, weight, None))
    cuts = []
    for r, c in itertools.product((2, 4, 8, 16), (256, 512, 1024, 2048)):
        if r * c in (2048, 4096, 8192) and c <= columns:
            took = microseconds(partial(ops.vector_linear, inputs, bias=None, rows=r, columns=c))
            cuts.append((took, f"{r}x{c} {took:.2f}"))
    best = ", ".join(text for _, text in sorted(cuts)[:4])
    return f"{rows * columns * 2 / BANDWIDTH * 1e6:7.2f} {cublas:7.2f} {ours:7.2f}  {best}"


def main() -> None:
    print(f"{'':22} {'floor':>7} {'cuBLAS':>7} {'ours':>7}  us; other cuts (rows x columns)")
    for name, (rows, columns) in SHAPES.items():
        print(f"{name:22} {measure(TritonOps(), rows, columns)}", flush=True)


if __name__ == "__main__":
    main()
