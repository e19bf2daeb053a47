"""Attention kernels on one GPU beside their floor: decode in GB/s of keys and values read, prompts in TFLOP/s, the last
tokens of prompts in microseconds.

    python -m bench.kernels.attention [--rows decode,prompts,tails,shared] [--sweep] [--backends triton,flashinfer]

Decode is timed as the worker runs it, a captured graph of several layers whose caches are larger than the L2 cache
together, so figures hold launches but no host. A plain copy reaches about 4,300 GB/s on an H200, a matrix product 790
TFLOP/s. `--sweep` times the Triton kernels with other cuts than their own.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from bench.lib.floors import BANDWIDTH
from bench.lib.timing import graph_time
from engine.errors import ConfigError
from engine.kernels.attention import decode as decoding
from engine.kernels.attention import extend as extending
from engine.kernels.attention.paged import Blocks, PagedShape
from engine.layers.attention import AttentionShape, PagedAttention, Prefix
from engine.layers.batch import Batch
from engine.plugin.registry import Plugins, resolve
from engine.worker.steps.batch import build_batch
from engine.worker.steps.rows import Rows

DEVICE = torch.device("cuda")
HEADS = {"llama3.1-8b": (32, 8), "qwen3-0.6b": (16, 8)}
DECODES = (
    (1, 192),
    (1, 1024),
    (1, 4096),
    (8, 1024),
    (8, 4096),
    (32, 2048),
    (64, 1024),
    (64, 4096),
    (256, 192),
    (256, 1024),
)
PROMPTS = ((1, 128), (1, 1024), (16, 1024), (4, 4096))
TAILS = ((1, 2, 2048), (1, 16, 16384), (1, 144, 8192), (8, 144, 8192), (1, 512, 8192), (1, 144, 65536))
DIM = 128


class Setting:
    """Caches of random numbers for `rows` requests of `length` positions; enough layers to outgrow the L2 cache."""

    def __init__(self, heads: tuple[int, int], rows: int, length: int, page_size: int, dtype: torch.dtype) -> None:
        self.shape = AttentionShape(
            layers=1, query_heads=heads[0], kv_heads=heads[1], head_dim=DIM, scale=DIM**-0.5, kv_dtype=dtype
        )
        self.rows, self.length, self.page_size = rows, length, page_size
        each = -(-length // page_size)
        self.bytes = 2 * rows * length * heads[1] * DIM * dtype.itemsize
        layers = max(1, min(16, int(3e8) // self.bytes))
        pages = (rows * each, 2, page_size, heads[1], DIM)
        self.caches = [torch.randn(pages, device=DEVICE, dtype=torch.bfloat16).to(dtype) for _ in range(layers)]
        self.table = torch.randperm(rows * each, device=DEVICE).to(torch.int32).view(rows, each)

    def query(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.shape.query_heads, DIM, device=DEVICE, dtype=torch.bfloat16)

    def batch(self, starts: np.ndarray, lengths: np.ndarray) -> Batch:
        rows = np.stack([np.arange(self.rows), starts, lengths, np.ones_like(starts)], axis=1)
        tokens = torch.zeros(self.rows, self.length + 1, dtype=torch.int32, device=DEVICE)
        return build_batch(Rows.of(rows), tokens, self.table, self.page_size, ())

    def decode_batch(self) -> Batch:
        return self.batch(np.full(self.rows, self.length - 1), np.ones(self.rows, np.int64))


def paged_backend(name: str, setting: Setting) -> PagedAttention | None:
    try:
        built = resolve(Plugins.load().entries("attention")[name].target)(
            setting.shape, setting.page_size, DEVICE, torch.bfloat16
        )
    except (ConfigError, KeyError) as error:
        print(f"{name}: {error}")
        return None
    assert isinstance(built, PagedAttention)
    return built


def decode_row(name: str, setting: Setting) -> float | None:
    """Microseconds of a layer's decode step through the backend, or None where it does not serve this."""
    backend = paged_backend(name, setting)
    if backend is None:
        return None
    batch, query = setting.decode_batch(), setting.query(setting.rows)
    plan = backend.capture(batch)
    if plan is None:
        return None
    backend.refill(plan, batch.slots.cpu().numpy(), batch.starts)
    return graph_time(lambda cache: backend.attend(query, cache, plan), setting.caches)


def prompt_row(name: str, setting: Setting) -> float | None:
    backend = paged_backend(name, setting)
    if backend is None:
        return None
    batch = setting.batch(np.zeros(setting.rows, np.int64), np.full(setting.rows, setting.length))
    query, plan = setting.query(setting.rows * setting.length), backend.prepare(batch)
    times = triton.testing.do_bench(
        lambda: backend.attend(query, setting.caches[0], plan), warmup=20, rep=100, return_mode="median"
    )
    return 1e3 * times


def bench_decode(backends: list[str]) -> None:
    print("\ndecode, GB/s (us) of keys and values; the floor in us, at 4300 GB/s")
    cases = [(model, 16, torch.bfloat16, work) for model, work in product(HEADS, DECODES)]
    cases += [("llama3.1-8b", 1, torch.bfloat16, (64, 4096)), ("llama3.1-8b", 16, torch.float8_e4m3fn, (64, 4096))]
    cases += [("llama3.1-8b", 16, torch.float8_e4m3fn, (256, 1024))]
    for model, page_size, dtype, (rows, length) in cases:
        setting = Setting(HEADS[model], rows, length, page_size, dtype)
        kind = "fp8" if dtype.itemsize == 1 else "bf16"
        line = f"{model:12} {page_size:>4} {kind:>5} {f'{rows} x {length}':>13} {1e6 * setting.bytes / BANDWIDTH:>9.1f}"
        for name in backends:
            time = decode_row(name, setting)
            line += f"  {name}: -" if time is None else f"  {name}: {setting.bytes / time / 1e3:6.0f} ({time:6.1f})"
        print(line, flush=True)


def bench_prompts(backends: list[str]) -> None:
    print("\nprompts, TFLOP/s (us); the floor in us, at 790 TFLOP/s")
    for model, (rows, length) in product(HEADS, PROMPTS):
        setting = Setting(HEADS[model], rows, length, 16, torch.bfloat16)
        work = prompt_work(setting)
        line = f"{model:12} {f'{rows} x {length}':>13} {work / 790e6:>9.1f}"
        for name in backends:
            time = prompt_row(name, setting)
            line += f"  {name}: -" if time is None else f"  {name}: {work / time / 1e6:6.0f} ({time:7.1f})"
        print(line, flush=True)


def bench_tails(backends: list[str]) -> None:
    """The last tokens of prompts whose beginning is cached; `whole` is Triton's kernel without a cut of contexts."""
    print("\nlast tokens of prompts, us a layer, median (longest of 7); the floor in us, of what is read or done")
    for model, (rows, tokens, cached) in product(HEADS, TAILS):
        setting = Setting(HEADS[model], rows, cached + tokens, 16, torch.bfloat16)
        work = 4 * setting.shape.query_heads * DIM * rows * tokens * (cached + tokens / 2)
        floor = max(1e6 * setting.bytes / BANDWIDTH, work / 790e6)
        line = f"{model:12} {f'{rows} x {tokens} behind {cached}':>24} {floor:>9.1f}"
        for name in (*backends, "whole"):
            times = tail_row(name, setting, tokens)
            line += f"  {name}: -" if times is None else f"  {name}: {np.median(times):7.1f} ({max(times):7.1f})"
        print(line, flush=True)


def tail_row(name: str, setting: Setting, tokens: int) -> list[float] | None:
    least, extending.LEAST_PIECE = extending.LEAST_PIECE, 1 << 30 if name == "whole" else extending.LEAST_PIECE
    try:
        backend = paged_backend("triton" if name == "whole" else name, setting)
        if backend is None:
            return None
        batch = setting.batch(np.full(setting.rows, setting.length - tokens), np.full(setting.rows, tokens))
        query, plan = setting.query(setting.rows * tokens), backend.prepare(batch)
    finally:
        extending.LEAST_PIECE = least
    return [graph_time(lambda cache: backend.attend(query, cache, plan), setting.caches) for _ in range(7)]


def paged_shape(setting: Setting) -> PagedShape:
    shape = setting.shape
    return PagedShape(
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        page_size=setting.page_size,
        scale=shape.scale,
        window=None,
    )


def tried(run: Callable[..., float], *arguments: Any) -> float:
    """What `run` measures; infinite where a cut asks for more than the device has."""
    try:
        return run(*arguments)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def sweep_decode() -> None:
    cuts = ((64, 4, 3, 3), (128, 4, 2, 2))
    works = (
        (1, 192),
        (1, 1024),
        (1, 4096),
        (8, 192),
        (8, 1024),
        (32, 192),
        (32, 2048),
        (64, 1024),
        (256, 192),
        (256, 1024),
    )
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for model in HEADS:
        settings = [Setting(HEADS[model], rows, length, 16, torch.bfloat16) for rows, length in works]
        print(f"\nTriton decode, {model}, us; positions, warps, stages, programs an SM", *works)
        for positions, warps, stages, each in cuts:
            blocks = Blocks(queries=16, positions=positions, warps=warps, stages=stages)
            teams = each * processors // HEADS[model][1]
            times = [tried(cut_decode, s, blocks, teams) for s in settings]
            print(f"{positions:>4} {warps:>2} {stages:>2} {each:>2}:", *(f"{took:8.1f}" for took in times), flush=True)


def cut_decode(setting: Setting, blocks: Blocks, teams: int) -> float:
    batch, query, shape = setting.decode_batch(), setting.query(setting.rows), paged_shape(setting)
    rows = decoding.plan_decode(batch.slots, batch.row_starts, batch.row_offsets[:-1], shape, teams)
    out = torch.empty_like(query)
    return graph_time(
        lambda cache: decoding.attend_decode(query, cache, setting.table, out, rows, shape, blocks), setting.caches
    )


def bench_shared() -> None:
    """As in the workload `shared_prefix`: 8 prefixes of 2,048 positions, 32 rows each, and 192 of each row's own."""
    print("\nshared prefixes, us a layer: each row by itself, prefixes once")
    for model in HEADS:
        setting = Setting(HEADS[model], 256, 2240, 16, torch.bfloat16)
        for first in range(0, 256, 32):
            setting.table[first : first + 32, :128] = setting.table[first, :128]
        batch, query, shape = setting.decode_batch(), setting.query(256), paged_shape(setting)
        teams = decoding.decode_teams(shape, DEVICE, 256)
        numbers = torch.zeros(decoding.SharedRows.size(256), dtype=torch.int64)
        prefixes = [Prefix(np.arange(first, first + 32), 2048) for first in range(0, 256, 32)]
        listed = decoding.list_shared(prefixes, 256, shape, teams)
        for part, values in zip(numbers.split([2, 768, 256, 256]), listed, strict=True):
            part[: len(values)] = torch.from_numpy(values)
        shared = decoding.SharedRows.of(numbers.to(DEVICE), 256, shape)
        tokens, out, times = batch.row_offsets[:-1], torch.empty_like(query), []
        for each in (None, shared):
            rows = decoding.plan_decode(batch.slots, batch.row_starts, tokens, shape, teams, shared=each)
            attend = partial(decoding.attend_decode, query, page_table=setting.table, out=out, rows=rows, shape=shape)
            times.append(graph_time(attend, setting.caches))
        print(f"{model:12} {times[0]:8.1f} {times[1]:8.1f}", flush=True)


def sweep_prompts() -> None:
    cuts = ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2))
    works = [(model, work) for model, work in product(HEADS, PROMPTS[1:])]
    settings = [Setting(HEADS[model], rows, length, 16, torch.bfloat16) for model, (rows, length) in works]
    print("\nTriton prompts, TFLOP/s; queries, positions, warps, stages", *works)
    for queries, positions, warps, stages in cuts:
        blocks = Blocks(queries=queries, positions=positions, warps=warps, stages=stages)
        rates = [prompt_work(s) / tried(cut_extend, s, blocks) / 1e6 for s in settings]
        print(f"{queries:>4} {positions:>4} {warps:>2} {stages:>2}:", *(f"{rate:8.0f}" for rate in rates), flush=True)


def prompt_work(setting: Setting) -> float:
    """Operations of causal attention among all positions."""
    return 4 * setting.shape.query_heads * DIM * setting.rows * setting.length * (setting.length + 1) / 2


def cut_extend(setting: Setting, blocks: Blocks) -> float:
    shape, query = paged_shape(setting), setting.query(setting.rows * setting.length)
    batch = setting.batch(np.zeros(setting.rows, np.int64), np.full(setting.rows, setting.length))
    teams = extending.extend_teams(shape, DEVICE)
    listed = extending.list_extend_tasks(batch.starts, batch.lengths, shape, blocks, teams)
    rows = extending.ExtendRows(
        tasks=torch.from_numpy(listed).to(DEVICE),
        slots=batch.slots,
        starts=batch.row_starts,
        offsets=batch.row_offsets,
        scratch=extending.extend_scratch(shape, query.dtype, teams, DEVICE),
    )
    out, cache = torch.empty_like(query), setting.caches[0]
    return 1e3 * triton.testing.do_bench(
        lambda: extending.attend_extend(query, cache, setting.table, out, rows, shape, blocks),
        warmup=10,
        rep=40,
        return_mode="median",
    )


ROWS: dict[str, Callable[[list[str]], None]] = {
    "decode": bench_decode,
    "prompts": bench_prompts,
    "tails": bench_tails,
    "shared": lambda _: bench_shared(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--sweep", action="store_true", help="time the Triton kernels with other cuts")
    parser.add_argument("--backends", default="triton,flashinfer")
    given = parser.parse_args()
    for row in given.rows.split(","):
        if row not in ROWS:
            parser.error(f"--rows {row} is none of {', '.join(ROWS)}")
        ROWS[row](given.backends.split(","))
    if given.sweep:
        sweep_decode()
        sweep_prompts()


if __name__ == "__main__":
    main()
