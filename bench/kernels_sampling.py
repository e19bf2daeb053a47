"""What sampling costs on a GPU: microseconds a step by rows and filters, against the floor of one read of the logits.

    python bench/kernels_sampling.py [--vocabulary 151936] [--dtype bfloat16] [--bandwidth 4300]

The kernels are replayed from a CUDA graph, so launches from Python are not counted; torch's sort is timed beside them,
called as it was in their place. `sharp` logits are those of a trained model, `flat` ones those of random weights, where
nearly every token is a candidate.
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.kernels.filters import cuts
from engine.kernels.sampling import draw
from engine.messages import Sampling
from engine.worker.sampler import Columns, sample

FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "top-k 20": {"top_k": 20},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 20, top-p 0.95": {"top_k": 20, "top_p": 0.95},
    "all": {"top_k": 50, "top_p": 0.95, "min_p": 0.01},
}


def microseconds(call: Callable[[], object], repeats: int = 20, rounds: int = 5) -> float:
    """Median over `rounds` of the mean of `repeats`."""
    call()
    found = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(repeats):
            call()
        ended.record()
        ended.synchronize()
        found.append(1e3 * began.elapsed_time(ended) / repeats)
    return statistics.median(found)


def replayed(call: Callable[[], object]) -> Callable[[], None]:
    """`call` as a graph; it runs once before, as what compiles cannot be captured."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def logits_of(kind: str, rows: int, size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(rows, size, device="cuda", generator=generator)
    if kind == "sharp":
        logits = 2 * logits - 12
        likely = torch.randint(0, size, (rows, 200), device="cuda", generator=generator)
        logits.scatter_(1, likely, 4 * torch.randn(rows, 200, device="cuda", generator=generator))
    return logits.to(dtype)


def measure(kind: str, rows: int, size: int, dtype: torch.dtype, fields: dict[str, float]) -> tuple[float, float]:
    """Microseconds of the kernels, and of torch."""
    logits = logits_of(kind, rows, size, dtype)
    columns = Columns.empty(rows)
    for slot in range(rows):
        off = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": slot}
        columns.set(slot, Sampling(**{**off, **fields}))  # type: ignore[arg-type]
    slots = torch.arange(rows, device="cuda")
    lasts = torch.zeros(rows, dtype=torch.int64, device="cuda")
    reals = torch.from_numpy(np.stack((columns.temperature, columns.top_p, columns.min_p))).cuda()
    top_ks, seeds = torch.from_numpy(columns.top_k).int().cuda(), torch.from_numpy(columns.seed).cuda()
    tokens = torch.zeros(rows, 8, dtype=torch.int32, device="cuda")

    def ours() -> None:
        cut = cuts(logits, slots, reals[0], reals[1], reals[2], top_ks) if columns.filters else None
        draw(logits, slots, lasts, reals[0], seeds, tokens, cut)

    positions = np.ones(rows, np.int64)
    torchs = microseconds(lambda: sample(logits.float(), columns, positions), repeats=3)
    return microseconds(replayed(ours)), torchs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--bandwidth", type=float, default=4300.0, help="GB/s of the device's memory")
    parser.add_argument("--rows", default="1,32,256")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, vocabulary {given.vocabulary}, {given.dtype}")
    print("| logits | rows | filters | us | floor, us | ratio | torch, us |\n|---|---|---|---|---|---|---|")
    for kind in ("sharp", "flat"):
        for rows in map(int, given.rows.split(",")):
            floor = rows * given.vocabulary * dtype.itemsize / given.bandwidth / 1e3
            for name, fields in FILTERS.items():
                ours, torchs = measure(kind, rows, given.vocabulary, dtype, fields)
                print(f"| {kind} | {rows} | {name} | {ours:.1f} | {floor:.1f} | {ours / floor:.1f} | {torchs:.0f} |")


if __name__ == "__main__":
    main()
