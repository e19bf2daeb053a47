"""Latent attention on one GPU beside its floor: decode in GB/s of latents read, prompts both ways, and what the two
ways save.

    python -m bench.kernels.mla [--backends flashinfer,triton] [--heads 16,128] [--sweep] [--quick]

Decode is timed as the worker runs it, a captured graph of several layers whose caches are larger than the L2 cache
together, so figures hold launches but no host. A plain copy reaches about 4,300 GB/s on an H200, a matrix product 790
TFLOP/s; with many heads decode is bound by the latter. `--sweep` times the Triton decode kernel with other cuts than
its own. The table of decode steps comes last.
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

from bench.lib.floors import BANDWIDTH, RATE
from bench.lib.timing import graph_time
from engine.errors import ConfigError
from engine.kernels.attention import mla as triton_mla
from engine.kernels.dense.reference import LatentNorm
from engine.kernels.dense.triton import TritonOps
from engine.layers import AttentionShape, Batch, LatentBackend, LatentShape
from engine.plugin.registry import Plugins, resolve
from engine.worker.steps.batch import build_batch
from engine.worker.steps.rows import Rows

DEVICE = torch.device("cuda")
BATCHES, CONTEXTS = (1, 32, 128), (1024, 8192, 32768)
SMALL = ((1, 256), (2, 256), (4, 256), (8, 256), (256, 256), (256, 1024))
CUTS = ((16, 32, 4, 2), (16, 32, 4, 3), (16, 32, 8, 3), (16, 64, 4, 3), (32, 32, 8, 3), (32, 64, 8, 3),
        (64, 16, 8, 3), (64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2))  # fmt: skip


class Setting:
    """Caches of random latents for `rows` requests of `length` positions; enough layers to outgrow the L2 cache."""

    def __init__(self, heads: int, rows: int, length: int, page_size: int = 64, fp8: bool = False) -> None:
        kv_dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        self.shape = LatentShape(
            layers=1, query_heads=heads, latent_dim=512, rope_dim=64, key_dim=128, value_dim=128, scale=192**-0.5,
            kv_dtype=kv_dtype,
        )  # fmt: skip
        self.rows, self.length, self.page_size = rows, length, page_size
        self.bytes = rows * length * self.shape.width * kv_dtype.itemsize
        self.operations = 2 * rows * length * heads * (2 * 512 + 64)
        each, layers = -(-length // page_size), max(1, min(16, int(3e8) // self.bytes))
        pages = (rows * each, page_size, self.shape.width)
        self.caches = [torch.randn(pages, device=DEVICE, dtype=torch.bfloat16).to(kv_dtype) for _ in range(layers)]
        self.table = torch.randperm(rows * each, device=DEVICE).to(torch.int32).view(rows, each)
        self.up = torch.randn(heads, 256, 512, device=DEVICE, dtype=torch.bfloat16) * 512**-0.5

    @property
    def floor(self) -> float:
        """Microseconds of a decode step of a layer."""
        return 1e6 * max(self.bytes / BANDWIDTH, self.operations / RATE)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    def batch(self, starts: np.ndarray, lengths: np.ndarray) -> Batch:
        rows = np.stack([np.arange(self.rows), starts, lengths, np.ones_like(starts)], axis=1)
        tokens = torch.zeros(self.rows, self.length + 1, dtype=torch.int32, device=DEVICE)
        return build_batch(Rows.of(rows), tokens, self.table, self.page_size, ())

    def decode_batch(self) -> Batch:
        return self.batch(np.full(self.rows, self.length - 1), np.ones(self.rows, np.int64))

    def backend(self, name: str, **attributes: Any) -> LatentBackend | None:
        made = type("Changed", (resolve(Plugins.load().latent_attention[name].target),), attributes)
        try:
            built = made(self.shape, self.page_size, DEVICE, torch.bfloat16)
        except ConfigError as error:
            print(f"{name}: {error}")
            return None
        assert isinstance(built, LatentBackend)
        return built


def eager_time(call: Callable[[], Any]) -> float:
    return 1e3 * float(triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median"))


def decode_time(name: str, setting: Setting, whole: bool = False) -> float | None:
    """Of a layer's decode step: attention over latents, or the `whole` with what is absorbed before and after."""
    backend = setting.backend(name, few_rows=0)  # FlashInfer's own kernel, also where the backend would take Triton's
    if backend is None:
        return None
    batch, heads = setting.decode_batch(), setting.shape.query_heads
    plan = backend.capture(batch)
    if plan is None:
        return None
    backend.refill(plan, batch.slots.cpu().numpy(), batch.starts)
    query, rotated = setting.random(setting.rows, heads, 512), setting.random(setting.rows, heads, 192)
    if whole:
        return graph_time(
            lambda cache: backend.forward(rotated, rotated[:0, 0], setting.up, cache, plan), setting.caches
        )
    return graph_time(lambda cache: backend.attend(query, rotated[..., 128:], cache, plan), setting.caches)


def decode_rows(backends: list[str], heads: list[int], quick: bool) -> list[str]:
    lines = ["decode, GB/s of latents read (us); page 64; the floor in us: 4300 GB/s or 790 TFLOP/s"]
    works = [*SMALL, *product(BATCHES, CONTEXTS)] if not quick else [*SMALL[:2], *product(BATCHES, CONTEXTS[:1])]
    cases = [(count, 64, False, work) for count, work in product(heads, works)]
    cases += [(count, 16, False, (128, 1024)) for count in heads] + [(count, 1, False, (128, 1024)) for count in heads]
    cases += [(count, 64, True, work) for count, work in product(heads, ((1, 8192), (32, 8192), (128, 8192)))]
    for count, page_size, fp8, (rows, length) in cases:
        setting = Setting(count, rows, length, page_size, fp8)
        line = f"heads {count:>3} page {page_size:>2} {'fp8 ' if fp8 else 'bf16'} {f'{rows} x {length}':>12} "
        line += f"{setting.floor:8.1f}"
        for name in backends:
            time = decode_time(name, setting)
            line += f"  {name}: -" if time is None else f"  {name}: {setting.bytes / time / 1e3:5.0f} ({time:7.1f})"
        print(line, flush=True)
        lines.append(line)
        del setting
    return lines


def bench_layer(backends: list[str], heads: list[int]) -> None:
    """What a decode step has besides: the kernel before attention, and what is absorbed before and after it."""
    print("\na decode step's whole attention with the products before and after, at 256 positions, us of a layer")
    for count, rows in product(heads, (1, 8, 64, 256)):
        setting = Setting(count, rows, 256)
        query, latents = setting.random(rows, count, 192), setting.random(rows, 576)
        norm = LatentNorm(setting.random(512), 1e-6)
        rotation = (torch.ones(rows, 1, 32, device=DEVICE), torch.zeros(rows, 1, 32, device=DEVICE))
        places = torch.arange(rows, device=DEVICE)
        write = partial(TritonOps().latent_into_pages, query, latents, norm, rotation, True)
        before = graph_time(partial(write_into, write, places), setting.caches)
        line = f"heads {count:>3} rows {rows:>3}: norm, rotation, pages {before:5.1f}"
        for name in backends:
            time, alone = decode_time(name, setting, whole=True), decode_time(name, setting)
            line += f"  {name}: -" if time is None or alone is None else f"  {name}: {time:6.1f}, alone {alone:6.1f}"
        print(line, flush=True)


def none(backend: LatentBackend, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """In the place of `LatentBackend.expands`: all rows are absorbed."""
    return np.zeros(len(lengths), bool)


def every(backend: LatentBackend, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.ones(len(lengths), bool)


def write_into(write: Callable[[Tensor, Tensor], None], places: Tensor, cache: Tensor) -> None:
    write(cache, places)


def bench_prompts(backends: list[str], heads: list[int]) -> None:
    """Both ways, for rows of n tokens after s cached ones: where expanding begins to be better."""
    print("\nrows of n tokens after s cached: us of a layer absorbed / expanded (TFLOP/s of the expanded)")
    works = [(1, 0, 1024), (16, 0, 1024), (8, 0, 4096), (1, 0, 8192)]
    works += [(4, s, n) for s, n in product((0, 1024, 8192), (64, 128, 192, 256, 512))] + [(1, 30000, 512)]
    for count, (rows, start, length) in product(heads, works):
        setting = Setting(count, rows, start + length)
        batch = setting.batch(np.full(rows, start), np.full(rows, length))
        query, latents = setting.random(rows * length, count, 192), setting.random(rows * length, 576)
        line = f"heads {count:>3} {f'{rows} x {start}+{length}':>16}"
        work = 2 * count * 320 * rows * (start * length + length * (length + 1) / 2)
        for name in backends:
            times = []
            for expands in (none, every):
                backend = setting.backend(name, expands=expands)
                if backend is None:
                    break
                arguments = (query, latents, setting.up, setting.caches[0], backend.prepare(batch))
                times.append(eager_time(partial(backend.forward, *arguments)))
            line += f"  {name}: {' / '.join(f'{time:8.1f}' for time in times)}"
            line += f" ({work / times[1] / 1e6:4.0f})" if len(times) == 2 else ""
        print(line, flush=True)


def bench_naive(backends: list[str], heads: list[int]) -> None:
    """The ablation: a decode step that expands its whole context, as one without absorption would, and one whose cache
    holds keys and values of all heads (of 128 numbers both: less than the 192 and 128 that these have)."""
    print("\ndecode: us of a layer absorbed; expanding all of the context; attending to cached keys and values")
    for count, rows, length in product(heads, (1, 32), (1024, 8192)):
        setting = Setting(count, rows, length)
        batch = setting.decode_batch()
        query, latents = setting.random(rows, count, 192), setting.random(rows, 576)
        line = f"heads {count:>3} {f'{rows} x {length}':>12}  keys and values {full_time(setting):9.1f}"
        for name in backends:
            absorbed = decode_time(name, setting, whole=True)
            backend = setting.backend(name, expands=every)
            if absorbed is None or backend is None:
                continue
            arguments = (query, latents, setting.up, setting.caches[0], backend.prepare(batch))
            expanded = eager_time(partial(backend.forward, *arguments))
            line += f"  {name}: absorbed {absorbed:7.1f} expanded {expanded:9.1f}"
        print(line, flush=True)
        del setting
    for count in heads:
        full = count * (192 + 128)
        print(f"numbers cached a token and layer: 576; as keys and values of {count} heads {full}, {full / 576:.0f} x")


def full_time(setting: Setting) -> float:
    """Of a decode step over keys and values of all heads, by the Triton backend; infinite where they do not fit."""
    heads, rows, length = setting.shape.query_heads, setting.rows, setting.length
    if 4 * rows * length * heads * 128 > 30 << 30:
        return float("inf")
    shape = AttentionShape(layers=1, query_heads=heads, kv_heads=heads, head_dim=128, scale=128**-0.5)
    backend = resolve(Plugins.load().attention["triton"].target)(shape, setting.page_size, DEVICE, torch.bfloat16)
    pages = (setting.table.numel(), 2, setting.page_size, heads, 128)
    cache = torch.randn(pages, device=DEVICE, dtype=torch.bfloat16)
    batch, query = setting.decode_batch(), setting.random(rows, heads, 128)
    plan = backend.capture(batch)
    backend.refill(plan, batch.slots.cpu().numpy(), batch.starts)
    return graph_time(lambda pages: backend.attend(query, pages, plan), [cache])


def mla_shape(setting: Setting) -> triton_mla.MlaShape:
    return triton_mla.MlaShape(
        heads=setting.shape.query_heads,
        latent_dim=512,
        rope_dim=64,
        page_size=setting.page_size,
        scale=setting.shape.scale,
    )


def cut_time(setting: Setting, cut: triton_mla.Cut, each: int) -> float:
    """Of the Triton decode kernel with that cut, `each` teams' programs a processor; infinite where it does not fit."""
    heads, shape = setting.shape.query_heads, mla_shape(setting)
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    teams = max(1, each * processors // triton.cdiv(heads, cut.lines))
    batch = setting.decode_batch()
    rows = triton_mla.MlaDecodeRows(
        slots=batch.slots, positions=batch.row_starts, tokens=batch.row_offsets[:-1],
        scratch=triton_mla.MlaScratch.of(teams, shape, DEVICE), teams=teams,
    )  # fmt: skip
    query, rotated = setting.random(setting.rows, heads, 512), setting.random(setting.rows, heads, 64)
    out = torch.empty_like(query)
    try:
        return graph_time(
            lambda cache: triton_mla.attend_mla_decode(query, rotated, cache, setting.table, out, rows, shape, cut),
            setting.caches,
        )
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def sweep(heads: list[int]) -> None:
    works = ((1, 256), (1, 1024), (1, 32768), (32, 1024), (128, 1024), (128, 8192))
    for count, fp8 in product(heads, (False, True)):
        settings = [Setting(count, rows, length, fp8=fp8) for rows, length in works]
        print(f"\nTriton decode, {count} heads, {'fp8' if fp8 else 'bf16'}: us; lines, positions, warps, stages, each")
        print(" " * 18, *(f"{f'{rows}x{length}':>9}" for rows, length in works))
        for (lines, positions, warps, stages), each in product(CUTS, (1, 2)):
            if lines > max(16, triton.next_power_of_2(count)):
                continue
            cut = triton_mla.Cut(lines=lines, positions=positions, warps=warps, stages=stages)
            own = cut == triton_mla.decode_cut(mla_shape(settings[0]), torch.bfloat16)
            times = [cut_time(setting, cut, each) for setting in settings]
            label = f"{lines:>3} {positions:>3} {warps:>2} {stages:>2} {each:>2}{'*' if own else ' '}"
            print(f"{label:>18}", *(f"{time:9.1f}" for time in times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="flashinfer,triton")
    parser.add_argument("--heads", default="16,128")
    parser.add_argument("--sweep", action="store_true", help="time the Triton decode kernel with other cuts")
    parser.add_argument("--quick", action="store_true", help="a few decode steps only")
    given = parser.parse_args()
    backends, heads = given.backends.split(","), [int(count) for count in given.heads.split(",")]
    if not given.quick:
        bench_layer(backends, heads)
        bench_prompts(backends, heads)
        bench_naive(backends, heads)
    if given.sweep:
        sweep(heads)
    print()
    lines = decode_rows(backends, heads, given.quick)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
