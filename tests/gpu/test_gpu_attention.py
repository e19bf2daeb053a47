"""Every attention backend for GPUs against attention in float64: written, read, windowed, captured, in FP8.

Tolerances are absolute, for outputs of size about one: float32 sums in another order, bfloat16 and float16 round the
softmax's weights and the output once each.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.layers import AttentionShape
from engine.layers.attention import AttentionBackend, Prefix
from engine.layers.batch import Batch
from engine.plugin.registry import Plugins, resolve
from engine.plugin.testing import ATTENTION_CASES, AttentionCase, check_attention
from engine.worker.steps.batch import build_batch
from engine.worker.steps.rows import Rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
TOLERANCES = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
FP8 = torch.float8_e4m3fn
BACKENDS = [entry.name for entry in Plugins.load().entries("attention").values() if "cuda" in entry.devices]
DEVICE = torch.device("cuda")


@functools.cache
def backend_class(name: str) -> type[AttentionBackend]:
    return resolve(Plugins.load().entries("attention")[name].target)


def build(name: str, shape: AttentionShape, page_size: int, dtype: torch.dtype) -> AttentionBackend:
    """The backend; skips the test where the backend says that it does not serve this."""
    try:
        return backend_class(name)(shape, page_size, DEVICE, dtype)
    except ConfigError as error:
        pytest.skip(str(error))


def check(name: str, case: AttentionCase, dtype: torch.dtype, seed: int = 0) -> None:
    check_attention(
        functools.partial(_built, name), case, device="cuda", dtype=dtype, tolerance=TOLERANCES[dtype], seed=seed
    )


def _built(name: str, shape: AttentionShape, page_size: int, device: torch.device, dtype: torch.dtype) -> Any:
    return build(name, shape, page_size, dtype)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bfloat16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_is_that_of_the_definition(name: str, dtype: torch.dtype, case: AttentionCase) -> None:
    check(name, case, dtype)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_over_random_steps(name: str, seed: int) -> None:
    """Lengths around the borders of pages, blocks of positions and pieces of a context."""
    generator = np.random.default_rng(seed)
    borders = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 511, 512, 513, 700, 1023, 1024, 1500)
    rows = tuple(
        (int(generator.choice(borders)), int(generator.choice((1, 1, 1, 2, 16, 31, 33, 64, 130))))
        for _ in range(generator.integers(1, 9))
    )
    kv_heads = int(generator.choice((1, 2, 4, 8)))
    case = AttentionCase(
        page_size=int(generator.choice((1, 4, 16, 16, 32))),
        heads=(kv_heads * int(generator.choice((1, 2, 3, 4, 7, 8))), kv_heads),
        head_dim=int(generator.choice((64, 96, 128, 128, 256))),
        rows=rows,
        window=[None, None, 1, 16, 17, 100, 600][generator.integers(7)],
    )
    dtype = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)[seed % 4]
    check(name, case, dtype, seed)


@pytest.mark.parametrize("page_size", [1, 12, 16])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_decode_step_of_many_rows(name: str, page_size: int) -> None:
    generator = np.random.default_rng(page_size)
    rows = tuple((int(start), 1) for start in [*generator.integers(0, 300, 40), 2100])
    case = AttentionCase(page_size=page_size, heads=(16, 8), head_dim=128, rows=rows)
    check(name, case, torch.bfloat16)


class Bench:
    """A backend with a cache full of random keys and values, behind a page table in random order."""

    def __init__(
        self, name: str, rows: int, longest: int, *, kv_dtype: torch.dtype | None = None, window: int | None = None
    ) -> None:
        self.shape = AttentionShape(
            layers=1, query_heads=16, kv_heads=4, head_dim=128, scale=128**-0.5, window=window, kv_dtype=kv_dtype
        )
        self.size = 16
        self.backend = build(name, self.shape, self.size, torch.bfloat16)
        self.generator = torch.Generator(DEVICE).manual_seed(rows)
        each = -(-longest // self.size)
        group = self.backend.kv_group()
        pages = rows * each
        self.cache = self.random(pages, *group.shape).to(getattr(torch, group.dtype))
        order = torch.randperm(pages, generator=self.generator, device=DEVICE)
        self.table = order.to(torch.int32).view(rows, each)
        self.tokens = torch.zeros(rows, longest + 1, dtype=torch.int32, device=DEVICE)
        self.query = self.random(rows, 16, 128).bfloat16()
        self.key, self.value = (self.random(rows, 4, 128).bfloat16() for _ in range(2))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE)

    def eager(self, starts: np.ndarray) -> Tensor:
        """A decode step of all rows: [rows, query_heads, head_dim]."""
        rows = np.stack([np.arange(len(starts)), starts, np.ones_like(starts), np.ones_like(starts)], axis=1)
        batch = build_batch(Rows.of(rows), self.tokens, self.table, self.size, ((self.cache,),))
        return self.forward(batch, self.backend.prepare(batch))

    def forward(self, batch: Batch, plan: Any) -> Tensor:
        out = self.backend.forward(self.query, self.key, self.value, self.cache, batch.places, plan)
        return out.view(-1, 16, 128)

    def static(self, inputs: Tensor) -> Batch:
        """As the worker's graphs build it: `inputs` [2, rows] are slots and positions."""
        slots, positions = inputs.unbind(0)
        page = self.table[slots, positions // self.size].to(torch.int64)
        rows, nothing = torch.arange(len(slots) + 1, device=DEVICE), np.empty(0, np.int64)
        return Batch(
            ids=slots,
            positions=positions,
            places=page * self.size + positions % self.size,
            page_table=self.table,
            slots=slots,
            row_starts=positions,
            row_offsets=rows,
            starts=nothing,
            lengths=nothing,
            offsets=nothing,
            caches=((self.cache,),),
        )

    def reference(self, starts: np.ndarray) -> Tensor:
        """From what lies in the cache now, in float64."""
        outs = []
        for row, start in enumerate(starts.tolist()):
            pages = self.table[row, : start // self.size + 1].long()
            first = 0 if self.shape.window is None else max(start + 1 - self.shape.window, 0)
            halves = self.cache[pages].double().transpose(0, 1).reshape(2, -1, 4, 128)[:, first : start + 1]
            key, value = halves.repeat_interleave(4, dim=2)
            scores = torch.einsum("hd,khd->hk", self.query[row].double(), key) * self.shape.scale
            outs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value))
        return torch.stack(outs)


@pytest.mark.parametrize(("rows", "window"), [(1, None), (3, None), (40, None), (40, 100), (260, None)])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_replayed_graph_gives_what_a_step_gives(name: str, rows: int, window: int | None) -> None:
    bench = Bench(name, rows, 1200, window=window)
    inputs = torch.zeros(2, rows, dtype=torch.int64, device=DEVICE)
    inputs[0] = torch.arange(rows, device=DEVICE)
    plan = bench.backend.capture(bench.static(inputs))
    if plan is None:
        pytest.skip(f"{name} cannot be captured")
    slots = np.arange(rows)
    bench.backend.refill(plan, slots, np.zeros(rows, np.int64))
    bench.forward(bench.static(inputs), plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bench.forward(bench.static(inputs), plan)
    generator = np.random.default_rng(rows)
    for longest in (1, 70, 1199, 300):
        starts = generator.integers(0, longest, rows)
        starts[0] = longest - 1
        inputs[1] = torch.from_numpy(starts).to(DEVICE)
        out.fill_(torch.nan)
        bench.backend.refill(plan, slots, starts)
        graph.replay()
        replayed = out.clone()
        wanted = bench.reference(starts)
        assert (replayed.double() - wanted).abs().max() < TOLERANCES[torch.bfloat16]
        assert (replayed.double() - bench.eager(starts).double()).abs().max() < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_cache_in_fp8(name: str, rows: int) -> None:
    """Against what the cache holds, rounded: the kernels lose no more than from a cache in bfloat16."""
    bench = Bench(name, rows, 900, kv_dtype=FP8)
    starts = np.random.default_rng(rows).integers(0, 900, rows)
    out = bench.eager(starts)
    assert (out.double() - bench.reference(starts)).abs().max() < TOLERANCES[torch.bfloat16]
    row, start = rows - 1, int(starts[-1])
    page = int(bench.table[row, start // bench.size])
    written = bench.cache[page, :, start % bench.size].float()
    assert torch.equal(written, torch.stack((bench.key[row], bench.value[row])).to(FP8).float())


@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_that_share_prefixes_attend_to_all_of_them(name: str, kv_dtype: torch.dtype | None) -> None:
    """A captured step: prefixes of many rows and of two, rows without one; then a step in which none is shared, and one
    of a prefix of fewer blocks than pieces."""
    rows = 60
    bench = Bench(name, rows, 1200, kv_dtype=kv_dtype)
    bench.table[3:45, :40] = bench.table[3, :40]
    bench.table[50:52, :64] = bench.table[50, :64]
    inputs = torch.zeros(2, rows, dtype=torch.int64, device=DEVICE)
    inputs[0] = torch.arange(rows, device=DEVICE)
    plan = bench.backend.capture_shared(bench.static(inputs))
    if plan is None:
        pytest.skip(f"{name} has no way to share prefixes")
    slots = np.arange(rows)
    bench.backend.refill_shared(plan, slots, np.zeros(rows, np.int64), ())
    bench.forward(bench.static(inputs), plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bench.forward(bench.static(inputs), plan)
    prefixes = (Prefix(np.arange(3, 45), 640), Prefix(np.arange(50, 52), 1024))
    generator = np.random.default_rng(rows)
    for found in (prefixes, (), prefixes[:1], (Prefix(np.arange(3, 45), 160),)):
        starts = generator.integers(1024, 1199, rows)
        inputs[1] = torch.from_numpy(starts).to(DEVICE)
        out.fill_(torch.nan)
        bench.backend.refill_shared(plan, slots, starts, found)
        graph.replay()
        assert (out.double() - bench.reference(starts)).abs().max() < TOLERANCES[torch.bfloat16]


def test_steps_that_mix_prompts_and_decode_rows_in_triton_agree_with_each_alone() -> None:
    case = AttentionCase(page_size=16, heads=(32, 8), head_dim=128, rows=((700, 1), (0, 300), (1, 1), (512, 129)))
    check("triton", case, torch.bfloat16)
    check("triton", dataclasses.replace(case, window=200), torch.bfloat16)


@pytest.mark.parametrize("window", [None, 900])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", BACKENDS)
def test_few_tokens_behind_a_long_context(name: str, dtype: torch.dtype, window: int | None) -> None:
    """Whose blocks are cut into pieces, beside rows that are whole."""
    rows = ((4000, 144), (2100, 2), (700, 1), (0, 40))
    case = AttentionCase(page_size=16, heads=(32, 8), head_dim=128, rows=rows, window=window)
    check(name, case, dtype)
    check(name, dataclasses.replace(case, heads=(7, 1), rows=((3000, 16),)), dtype)
