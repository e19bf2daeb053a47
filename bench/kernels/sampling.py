"""What sampling costs on a GPU: microseconds a step by rows and filters, against the floor of one read of the logits.

    python -m bench.kernels.sampling [--vocabulary 151936] [--dtype bfloat16] [--bandwidth 4300]

The kernels are replayed from a CUDA graph, so launches from Python are not counted; torch's sort is timed beside them,
called as it was in their place. `sharp` logits are those of a trained model, `flat` ones those of random weights, where
nearly every token is a candidate. What changes logits first, and log-probabilities, follow: these are called as a step
calls them, so at few rows the figure is that of the host.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kernels.logits.draw import draw
from engine.kernels.logits.filters import cuts
from engine.kernels.logits.reference import Filters, LogitOps, pack_ids
from engine.kernels.logits.triton import TritonLogitOps
from engine.messages.step import SlotAdmit
from engine.params.sampling import Sampling
from engine.worker.sampling.adjustments import Adjustments
from engine.worker.sampling.logprobs import score
from engine.worker.sampling.sampler import Columns

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
    lengths = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def ours() -> None:
        cut = cuts(logits, slots, reals[0], reals[1], reals[2], top_ks) if columns.filters else None
        draw(logits, slots, lasts, reals[0], seeds, tokens, lengths, cut)

    def torchs() -> None:
        filters = Filters(reals[1], reals[2], top_ks) if columns.filters else None
        LogitOps().draw(logits, slots, lasts, reals[0], seeds, tokens, lengths, filters)

    return microseconds(replayed(ours)), microseconds(torchs, repeats=3)


def measure_rest(rows: int, size: int, dtype: torch.dtype, said: int) -> dict[str, float]:
    """Microseconds of what else a step may do with its logits, where all rows have `said` tokens and ask for it."""
    logits = logits_of("sharp", rows, size, dtype)
    exact, kernels = logits.float(), TritonLogitOps()
    generator = np.random.default_rng(0)
    tokens = torch.from_numpy(generator.integers(0, size, (rows + 1, said + 1)).astype(np.int32)).cuda()
    ids = np.sort(generator.choice(size, 300, replace=False)).astype("<i4")
    plain: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    asked: dict[str, dict[str, Any]] = {
        f"penalties over {said} tokens": {"repetition_penalty": 1.1, "frequency_penalty": 0.5},
        "300 biases": {"bias_ids": ids.tobytes(), "biases": np.ones(300, "<f4").tobytes()},
        "allowed ids": {"allowed_ids": ids.tobytes()},
    }
    found = {"to float32": microseconds(lambda: logits.to(torch.float32, copy=True))}
    slots, ends = np.arange(rows), np.full(rows, said)
    for name, fields in asked.items():
        adjustments = Adjustments(rows, size, logits.device, kernels)
        sampling = Sampling(**plain, **fields)
        adjustments.admit([SlotAdmit(slot, b"", sampling, said // 2) for slot in range(rows)])
        found[name] = microseconds(partial(adjustments.apply, exact, slots, ends, tokens))
    drawn, every = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.arange(rows, device="cuda")
    found["log-probabilities"] = microseconds(replayed(lambda: score(kernels, logits, drawn, every)))
    temperatures = torch.ones(rows, device="cuda")
    sampled = partial(draw, logits, every, every, temperatures, every, tokens.new_zeros(rows, rows + 1))
    found["draw"] = microseconds(replayed(sampled))
    for name, share in (("of 1 in 10,000", 1e-4), ("of most", 0.9)):
        left = [pack_ids(np.flatnonzero(generator.random(size) < share), size) for _ in range(rows)]
        masks = torch.from_numpy(np.stack(left)).cuda()
        found[f"draw {name}, by masks"] = microseconds(replayed(partial(sampled, masks=(masks, every))))
    barred = logits.clone()
    found["masks, written"] = microseconds(replayed(lambda: kernels.apply_bitmask(barred, masks, every)))
    found["log-probabilities, torch"] = microseconds(lambda: LogitOps().score(logits, drawn, None, 20), repeats=3)
    return found


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
    print("\n| rows | what | us |\n|---|---|---|")
    for rows in map(int, given.rows.split(",")):
        for name, microsecond in measure_rest(rows, given.vocabulary, dtype, 1000).items():
            print(f"| {rows} | {name} | {microsecond:.1f} |")


if __name__ == "__main__":
    main()
