"""Output tokens per second of the default model at 1 and 8 streams, through the offline API, on this machine.

    python -m bench.engine.streams [--streams 1,8] [--placement single,split] [--tokens 64] [--repeat 5] [--json FILE]

Each stream has a prompt of its own of 32 token ids and generates `--tokens`; the clock runs from the first
request to the last token, prompts included. The floor is what reading the weights once a step costs: weight bytes
over the bandwidth of a matrix-vector product of that size, in the same run. Medians, with the spread.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from engine import Engine, SamplingParams

PROMPT = 32


def read_bandwidth(count: float) -> float:
    """Bytes per second at which a matrix of `count` bytes times a vector reads it, with all threads."""
    matrix = torch.ones(int(count) // 4 // 4096, 4096)
    vector = torch.ones(4096)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - began)
    return matrix.nbytes / best


def rates(engine: Engine, streams: int, tokens: int, repeat: int) -> list[float]:
    rng = random.Random(streams)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    seconds = []
    for _ in range(repeat + 1):
        prompts = [[rng.randrange(1000, 40_000) for _ in range(PROMPT)] for _ in range(streams)]
        began = time.perf_counter()
        replies = engine.generate(prompts, params)
        seconds.append(time.perf_counter() - began)
        assert all(len(reply.ids) == tokens for reply in replies)
    return [streams * tokens / spent for spent in seconds[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--placement", default="single,split")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--weights", type=float, default=96.5e6, help="bytes of weights: those of the default model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bandwidth = read_bandwidth(options.weights)
    floor = bandwidth / options.weights  # steps per second
    rows: list[dict[str, Any]] = []
    for placement in options.placement.split(","):
        began = time.perf_counter()
        with Engine(model=options.model, placement=placement, max_model_len=1024) as engine:
            ready = time.perf_counter() - began
            for streams in map(int, options.streams.split(",")):
                measured = rates(engine, streams, options.tokens, options.repeat)
                rows.append(
                    {
                        "placement": placement,
                        "streams": streams,
                        "tokens_per_second": statistics.median(measured),
                        "spread": [min(measured), max(measured)],
                        "of_floor": statistics.median(measured) / (floor * streams),
                        "ready_seconds": ready,
                    }
                )
    print(f"memory read {bandwidth / 1e9:.1f} GB/s, so at most {floor:.0f} steps/s; {torch.get_num_threads()} threads")
    print("placement  streams   tok/s  (min - max)     of floor   ready s")
    for row in rows:
        low, high = row["spread"]
        print(
            f"{row['placement']:9s}  {row['streams']:7d}  {row['tokens_per_second']:6.1f}  ({low:.1f} - {high:.1f})"
            f"{row['of_floor']:13.2f}  {row['ready_seconds']:8.1f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"bandwidth": bandwidth, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
