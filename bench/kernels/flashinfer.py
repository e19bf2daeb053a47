"""What the FlashInfer backend decides by, on one GPU: FA3 or FA2 for prompts, and what a plan costs the host.

    python -m bench.kernels.flashinfer

Its decode beside other backends is in attention.py. FlashInfer must not compile while this runs: start the
engine with it once, or set FLASHINFER_DISABLE_JIT=1 and be told.
"""

import functools
import statistics
import time

import numpy as np
import torch
import triton

from bench.lib.floors import RATE
from engine.layers import AttentionShape
from engine.worker.steps.batch import build_batch
from engine.worker.steps.rows import Rows
from engine_plugins.attention.flashinfer.mha import FlashInferAttention

DEVICE = torch.device("cuda")
DIM, PAGE = 128, 16
PROMPTS = ((1, 0, 128), (1, 0, 512), (1, 0, 1024), (4, 0, 1024), (16, 0, 512), (1, 0, 8192), (1, 4096, 128),
           (1, 4096, 1024), (1, 16384, 512), (8, 2048, 256), (32, 1024, 64))  # fmt: skip


def table(rows: int, length: int) -> torch.Tensor:
    each = -(-length // PAGE)
    return torch.randperm(rows * each, device=DEVICE).to(torch.int32).view(rows, each)


def bench_prompts(heads: tuple[int, int]) -> None:
    print(f"\nprompts, {heads[0]} query and {heads[1]} key heads: TFLOP/s (us); * is what the backend takes")
    shape = AttentionShape(layers=1, query_heads=heads[0], kv_heads=heads[1], head_dim=DIM, scale=DIM**-0.5)
    backend = FlashInferAttention(shape, PAGE, DEVICE, torch.bfloat16)
    for rows, start, length in PROMPTS:
        pages = table(rows, start + length)
        cache = torch.randn(pages.numel(), 2, PAGE, heads[1], DIM, device=DEVICE, dtype=torch.bfloat16)
        query = torch.randn(rows * length, heads[0], DIM, device=DEVICE, dtype=torch.bfloat16)
        step = np.stack([np.arange(rows), np.full(rows, start), np.full(rows, length), np.ones(rows, np.int64)], axis=1)
        tokens = torch.zeros(rows, start + length + 1, dtype=torch.int32, device=DEVICE)
        batch = build_batch(Rows.of(step), tokens, pages, PAGE, ())
        work = 4 * heads[0] * DIM * rows * (start * length + length * (length + 1) / 2)
        chosen = backend.prepare(batch)[0].kernel.name
        line = f"{rows:>3} x {start:>5}+{length:<5} floor {1e6 * work / RATE:8.1f} us"
        for name in backend._kernels:
            backend._extend_kernel = lambda lengths, name=name: name
            attend = functools.partial(backend.attend, query, cache, backend.prepare(batch))
            time_of = 1e3 * triton.testing.do_bench(attend, warmup=10, rep=60, return_mode="median")
            line += f"   {name}{'*' if name == chosen else ' '} {work / time_of / 1e6:5.0f} ({time_of:7.1f})"
        del backend._extend_kernel
        print(line, flush=True)


def bench_plans(heads: tuple[int, int]) -> None:
    print("\na captured decode step's refill: us of the host")
    shape = AttentionShape(layers=1, query_heads=heads[0], kv_heads=heads[1], head_dim=DIM, scale=DIM**-0.5)
    backend = FlashInferAttention(shape, PAGE, DEVICE, torch.bfloat16)
    for rows in (256, 64, 8, 1):
        pages = table(rows, 1024)
        step = np.stack([np.arange(rows), np.full(rows, 900), np.ones(rows, np.int64), np.ones(rows, np.int64)], axis=1)
        batch = build_batch(Rows.of(step), torch.zeros(rows, 1025, dtype=torch.int32, device=DEVICE), pages, PAGE, ())
        plan = backend.capture(batch)
        assert plan is not None
        times = []
        for start in range(800, 900):
            torch.cuda.synchronize()
            began = time.perf_counter()
            backend.refill(plan, step[:, 0], np.full(rows, start))
            times.append(1e6 * (time.perf_counter() - began))
        print(f"{rows:>4} rows: {statistics.median(times):6.1f}", flush=True)


def main() -> None:
    for heads in ((32, 8), (16, 8)):
        bench_prompts(heads)
    bench_plans((32, 8))


if __name__ == "__main__":
    main()
