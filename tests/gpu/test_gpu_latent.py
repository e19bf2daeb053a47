"""Every backend of latent attention for GPUs against attention over expanded keys and values in float64: absorbed,
expanded, captured, in FP8.

Tolerances are absolute, for outputs of size about one: bfloat16 rounds what is absorbed or expanded, the softmax's
weights, what is attended and the output once each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.dense.reference import write_latents
from engine.layers import Batch, LatentBackend, LatentShape, Mirror
from engine.plugin.registry import Plugins, resolve
from engine.plugin.testing import LATENT_CASES, LatentCase, check_latent_attention, latent_reference, latent_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
TOLERANCES = {torch.float32: 5e-5, torch.float16: 8e-3, torch.bfloat16: 4e-2}
FP8 = torch.float8_e4m3fn
BACKENDS = [entry.name for entry in Plugins.load().latent_attention.values() if "cuda" in entry.devices]
DEVICE = torch.device("cuda")
DEEPSEEK = (512, 64, 128, 128)


@functools.cache
def backend_class(name: str) -> type[LatentBackend]:
    return resolve(Plugins.load().latent_attention[name].target)


def build(name: str, shape: LatentShape, page_size: int, dtype: torch.dtype, **attributes: Any) -> LatentBackend:
    """The backend, with class attributes changed; skips the test where it says that it does not serve this."""
    made = type("Changed", (backend_class(name),), attributes)
    try:
        return made(shape, page_size, DEVICE, dtype)
    except ConfigError as error:
        pytest.skip(str(error))


def check(name: str, case: LatentCase, dtype: torch.dtype, seed: int = 0, **attributes: Any) -> None:
    def built(shape: LatentShape, page_size: int, device: torch.device, dtype: torch.dtype) -> LatentBackend:
        return build(name, shape, page_size, dtype, **attributes)

    check_latent_attention(built, case, device="cuda", dtype=dtype, tolerance=TOLERANCES[dtype], seed=seed)


@pytest.mark.parametrize("dims", [DEEPSEEK, None], ids=["deepseek", "small"])
@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_latent_attention_is_that_of_the_definition(name: str, case: LatentCase, dims: Any) -> None:
    check(name, dataclasses.replace(case, dims=dims or case.dims), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_other_types(name: str, dtype: torch.dtype) -> None:
    case = LatentCase(page_size=16, heads=16, rows=((700, 1), (0, 200), (3, 9), (300, 193)), dims=DEEPSEEK)
    check(name, dataclasses.replace(case, dims=(128, 32, 64, 64)) if dtype == torch.float32 else case, dtype)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", BACKENDS)
def test_random_steps(name: str, seed: int) -> None:
    """Lengths around the borders of pages, blocks of positions and ranges of teams; some rows expanded."""
    generator = np.random.default_rng(seed)
    borders = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 511, 512, 513, 1023, 1024, 1500)
    rows = tuple(
        (int(generator.choice(borders)), int(generator.choice((1, 1, 1, 2, 4, 5, 33, 64, 130, 192, 257))))
        for _ in range(generator.integers(1, 9))
    )
    case = LatentCase(
        page_size=int(generator.choice((1, 16, 64))),
        heads=int(generator.choice((16, 32, 128))),
        rows=rows,
        dims=DEEPSEEK,
    )
    least, chunk = int(generator.choice((2, 64, 192, 1000))), int(generator.choice((300, 10000)))
    check(name, case, torch.bfloat16, seed, expands=lambda _, starts, lengths: lengths >= least, chunk_tokens=chunk)


@pytest.mark.parametrize("heads", [16, 20, 32, 128])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_decode_step_of_many_rows(name: str, page_size: int, heads: int) -> None:
    generator = np.random.default_rng(page_size)
    rows = tuple((int(start), 1) for start in [*generator.integers(0, 300, 70), 2100, 0])
    check(name, LatentCase(page_size=page_size, heads=heads, rows=rows, dims=DEEPSEEK), torch.bfloat16)


class Bench:
    """A backend over random latents behind a page table in random order; a query for each of `tokens` tokens."""

    def __init__(
        self, name: str, rows: int, longest: int, tokens: int, *, heads: int = 16,
        kv_dtype: torch.dtype | None = None, **attributes: Any,
    ) -> None:  # fmt: skip
        self.size = 16
        self.shape = LatentShape(
            layers=1, query_heads=heads, latent_dim=512, rope_dim=64, key_dim=128, value_dim=128, scale=192**-0.5,
            kv_dtype=kv_dtype,
        )  # fmt: skip
        self.backend = build(name, self.shape, self.size, torch.bfloat16, **attributes)
        generator = torch.Generator(DEVICE).manual_seed(rows)
        each = -(-longest // self.size)
        order = torch.randperm(rows * each, generator=generator, device=DEVICE)
        self.table = order.to(torch.int32).view(rows, each)
        group = self.backend.kv_group()
        self.cache = torch.empty(rows * each, *group.shape, dtype=getattr(torch, group.dtype), device=DEVICE)
        latents = torch.randn(rows * each * self.size, 576, generator=generator, device=DEVICE).bfloat16()
        write_latents(latents, self.cache, torch.arange(len(latents), device=DEVICE))
        self.query = torch.randn(tokens, heads, 192, generator=generator, device=DEVICE).bfloat16()
        self.up = (torch.randn(heads, 256, 512, generator=generator, device=DEVICE) * 512**-0.5).bfloat16()

    def forward(self, plan: Any) -> Tensor:
        return self.backend.forward(self.query, self.query[:0, 0], self.up, self.cache, plan)

    def eager(self, starts: np.ndarray) -> Tensor:
        rows = [(int(start), 1) for start in starts]
        batch = latent_step(self.backend, self.table.cpu(), rows, ((self.cache,),))
        return self.forward(self.backend.prepare(batch))

    def static(self, numbers: Tensor, rows: int) -> Batch:
        """As the worker's graphs build it: `numbers` are slots, starts and offsets of `rows` rows."""
        slots, starts, offsets = numbers.split([rows, rows, rows + 1])
        nothing = np.empty(0, np.int64)
        return Batch(
            ids=torch.zeros(len(self.query), dtype=torch.int64, device=DEVICE), positions=starts, places=starts,
            page_table=self.table, slots=slots, row_starts=starts, row_offsets=offsets,
            starts=nothing, lengths=nothing, offsets=nothing, caches=((self.cache,),),
        )  # fmt: skip

    def wanted(self, part: slice, slot: int, start: int, length: int) -> Tensor:
        """From what lies in the cache now, in float64."""
        context = self.cache[self.table[slot].long()].float().flatten(0, 1)[: start + length].cpu()
        return latent_reference(self.query[part].cpu(), context, self.up.cpu(), self.shape)

    def off(self, out: Tensor, rows: list[tuple[int, int, int]]) -> float:
        worst, first = 0.0, 0
        for slot, start, length in rows:
            part = slice(first, first + length)
            worst = max(worst, float((out[part].double().cpu() - self.wanted(part, slot, start, length)).abs().max()))
            first += length
        return worst


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize(("rows", "heads"), [(1, 16), (1, 128), (3, 16), (3, 128), (40, 16), (40, 128), (260, 16)])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_replayed_decode_step_gives_what_a_step_gives(name: str, rows: int, heads: int) -> None:
    few = {"few_rows": 2 if heads == 16 else 0} if name == "flashinfer" else {}  # both of its kernels
    bench = Bench(name, rows, 1200, rows, heads=heads, **few)
    numbers = torch.arange(3 * rows + 1, device=DEVICE)
    numbers[rows:] -= 2 * rows  # offsets
    numbers[rows : 2 * rows] = 0
    plan = bench.backend.capture(bench.static(numbers, rows))
    if plan is None:
        pytest.skip(f"{name} cannot be captured")
    slots = np.arange(rows)
    bench.backend.refill(plan, slots, np.zeros(rows, np.int64))
    graph, out = captured(lambda: bench.forward(plan))
    generator = np.random.default_rng(rows)
    for longest in (1, 70, 1199, 300):
        starts = generator.integers(0, longest, rows)
        starts[0] = longest - 1
        numbers[rows : 2 * rows] = torch.from_numpy(starts).to(DEVICE)
        out.fill_(torch.nan)
        bench.backend.refill(plan, slots, starts)
        graph.replay()
        replayed = out.clone()
        checked = [(row, int(starts[row]), 1) for row in range(min(rows, 40))]
        assert bench.off(replayed, checked) < TOLERANCES[torch.bfloat16]
        assert (replayed.double() - bench.eager(starts).double()).abs().max() < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(("tokens", "heads"), [(32, 16), (256, 16), (256, 128), (1024, 16)])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_replayed_step_with_prompts_follows_its_numbers(name: str, tokens: int, heads: int) -> None:
    rows, slots = 64, 12
    bench = Bench(name, slots, 640, tokens, heads=heads)
    numbers = Mirror(3 * rows + 1, DEVICE)
    plan = bench.backend.capture_prompts(bench.static(numbers.device, rows))
    if plan is None:
        pytest.skip(f"{name} cannot be captured")
    nothing = np.empty(0, np.int64)
    bench.backend.refill_prompts(plan, nothing, nothing, np.zeros(1, np.int64))
    graph, out = captured(lambda: bench.forward(plan))
    generator = np.random.default_rng(tokens)
    for count in (1, 3, 9, 2):
        lengths = generator.integers(1, max(tokens // count // 2, 2), count)
        lengths[0] += tokens - lengths.sum() if count == 2 else 0  # as many tokens as there can be
        lengths = np.minimum(lengths, 640)
        lengths[-1] = 1 if count > 1 else lengths[-1]
        starts = generator.integers(0, 640 - lengths + 1)
        chosen, offsets = generator.permutation(slots)[:count], np.concatenate(([0], np.cumsum(lengths)))
        host = numbers.host()
        host[:] = 0
        host[:count], host[rows : rows + count] = chosen, starts
        host[2 * rows :] = np.pad(offsets, (0, rows - count), mode="edge")
        numbers.send()
        bench.backend.refill_prompts(plan, starts, lengths, offsets)
        out.fill_(torch.nan)
        graph.replay()
        listed = list(zip(chosen.tolist(), starts.tolist(), lengths.tolist(), strict=True))
        assert bench.off(out, listed) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_cache_in_fp8(name: str, rows: int, heads: int) -> None:
    """Against what the cache holds, rounded: the kernels lose no more than from a cache in bfloat16."""
    bench = Bench(name, rows, 900, rows, heads=heads, kv_dtype=FP8)
    starts = np.random.default_rng(rows).integers(0, 900, rows)
    checked = [(row, int(starts[row]), 1) for row in range(min(rows, 40))]
    assert bench.off(bench.eager(starts), checked) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("name", BACKENDS)
def test_the_error_of_a_cache_in_fp8(name: str) -> None:
    """Latents of size about one are rounded by up to 1 in 16; what is attended averages over them."""
    case = LatentCase(page_size=16, heads=16, rows=((600, 1), (200, 9), (0, 5), (300, 200)), dims=DEEPSEEK)

    def built(shape: LatentShape, page_size: int, device: torch.device, dtype: torch.dtype) -> LatentBackend:
        return build(name, shape, page_size, dtype)

    check_latent_attention(built, case, device="cuda", dtype=torch.bfloat16, kv_dtype=FP8, tolerance=0.2)


def test_plans_may_be_made_while_the_device_is_at_earlier_steps() -> None:
    """FlashInfer's plans are copied from pinned memory that later ones must not overwrite too early."""
    rows = 6
    bench, generator = Bench("flashinfer", rows, 640, rows, few_rows=0), np.random.default_rng(0)
    numbers = Mirror(3 * rows + 1, DEVICE)
    plan = bench.backend.capture(bench.static(numbers.device, rows))

    def refill(starts: np.ndarray) -> None:
        host = numbers.host()
        host[:] = np.concatenate((np.arange(rows), starts, np.arange(rows + 1)))
        numbers.send()
        bench.backend.refill(plan, np.arange(rows), starts)

    refill(np.zeros(rows, np.int64))
    graph, out = captured(lambda: bench.forward(plan))
    steps, outs = generator.integers(0, 640, (3, rows)), []
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about a tenth of a second, in which the host gets ahead
    for starts in steps:
        refill(starts)
        graph.replay()
        outs.append(out.clone())
    eager = [bench.eager(starts) for starts in steps]
    for got, starts, other in zip(outs, steps, eager, strict=True):
        listed = [(row, int(start), 1) for row, start in enumerate(starts)]
        assert bench.off(got, listed) < TOLERANCES[torch.bfloat16]
        assert bench.off(other, listed) < TOLERANCES[torch.bfloat16]
