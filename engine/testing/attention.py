"""Contract checks of attention backends: heads and latents, over pages scattered in a cache. Imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kernels.attention.reference import attend
from engine.kernels.dense.reference import write_latents
from engine.layers.attention import AttentionBackend, AttentionShape, Backend
from engine.layers.batch import Batch
from engine.layers.latent import LatentBackend, LatentShape
from engine.plugin.specs import KVSpec
from engine.testing.tensors import assert_close
from engine.worker.memory import allocate
from engine.worker.steps.batch import build_batch
from engine.worker.steps.rows import Rows

# ── attention ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One step. `rows` are (start, length); `shares` maps a row to an earlier one that computes, in this very
    step, the tokens before its start and owns their pages."""

    page_size: int
    heads: tuple[int, int]  # of queries, of keys
    head_dim: int
    rows: tuple[tuple[int, int], ...]
    shares: tuple[tuple[int, int], ...] = ()
    scale: float | None = None
    window: int | None = None

    def __str__(self) -> str:
        rows = ",".join(f"{start}+{length}" for start, length in self.rows)
        window = "" if self.window is None else f"-window{self.window}"
        return f"page{self.page_size}-heads{self.heads[0]}/{self.heads[1]}x{self.head_dim}{window}-{rows}"


ATTENTION_CASES: tuple[AttentionCase, ...] = (
    AttentionCase(page_size=16, heads=(9, 3), head_dim=64, rows=((0, 1),)),
    AttentionCase(page_size=16, heads=(9, 3), head_dim=64, rows=((15, 1), (16, 1), (0, 1), (200, 1))),
    AttentionCase(page_size=16, heads=(4, 4), head_dim=64, rows=((0, 40),)),
    AttentionCase(page_size=1, heads=(8, 2), head_dim=64, rows=((5, 1), (3, 7), (0, 9))),
    AttentionCase(page_size=4, heads=(4, 1), head_dim=32, rows=((0, 9), (7, 1), (6, 5), (30, 1), (0, 1))),
    AttentionCase(page_size=16, heads=(8, 8), head_dim=128, rows=((31, 33), (1, 2), (17, 1)), scale=0.5),
    AttentionCase(page_size=16, heads=(6, 2), head_dim=80, rows=((16, 16), (0, 16), (32, 1))),
    AttentionCase(page_size=4, heads=(6, 3), head_dim=64, rows=((0, 11), (8, 3), (4, 1)), shares=((1, 0), (2, 0))),
    AttentionCase(page_size=16, heads=(9, 3), head_dim=64, rows=((16, 1), (0, 16)), shares=((0, 1),)),
    # windows: decode rows around the borders of pages, prefill from nothing and from the cache, all of it mixed, a
    # window of one page, of one token, one larger than any context, a shared prefix that the window has passed
    AttentionCase(page_size=4, heads=(4, 1), head_dim=64, window=6, rows=((3, 1), (4, 1), (5, 1), (6, 1), (9, 1))),
    AttentionCase(page_size=16, heads=(4, 4), head_dim=64, window=7, rows=((0, 40),)),
    AttentionCase(page_size=4, heads=(8, 2), head_dim=32, window=5, rows=((0, 3), (40, 1), (9, 7), (0, 5), (2, 1))),
    AttentionCase(page_size=16, heads=(6, 2), head_dim=80, window=16, rows=((15, 1), (31, 33), (16, 1), (32, 16))),
    AttentionCase(page_size=1, heads=(8, 2), head_dim=64, window=1, rows=((5, 1), (3, 7), (0, 9))),
    AttentionCase(page_size=4, heads=(4, 2), head_dim=64, window=99, rows=((0, 9), (7, 1), (6, 5), (30, 1))),
    AttentionCase(page_size=4, heads=(6, 3), head_dim=64, window=4, rows=((0, 11), (8, 3), (8, 1)), shares=((1, 0),)),
)


def check_attention(
    backend: type[AttentionBackend],
    case: AttentionCase,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> None:
    """Runs `case` in two layers and compares with attention in float64. Pages are scattered over a cache that
    is full of what earlier requests left, so an answer that looks where it must not is far off."""
    generator = torch.Generator().manual_seed(seed)
    (query_heads, kv_heads), dim = case.heads, case.head_dim
    scale = dim**-0.5 if case.scale is None else case.scale
    shape = AttentionShape(
        layers=2, query_heads=query_heads, kv_heads=kv_heads, head_dim=dim, scale=scale, window=case.window
    )
    built = backend(shape, case.page_size, torch.device(device), dtype)
    table, pages = _scattered_pages(case, generator)
    spec = KVSpec(case.page_size, (built.kv_group(),))
    assert spec.groups[0].layers == 2, f"kv_group() declares {spec.groups[0].layers} layers, not the 2 of its shape"
    caches = allocate(spec, pages, torch.device(device))
    for cache in caches[0]:
        if cache.is_floating_point():
            cache.copy_(50 * torch.randn(cache.shape, generator=generator))
    for layer in range(2):
        contexts = [_random(generator, dtype, 3, start + length, dim, query_heads) for start, length in case.rows]
        for row, owner in case.shares:
            start = case.rows[row][0]
            contexts[row][:2, :start] = contexts[owner][:2, :start]
        before = [(start if row not in dict(case.shares) else 0) for row, (start, _) in enumerate(case.rows)]
        if any(before):
            filled = [(0, length) for length in before]
            _attend(built, case, filled, contexts, table, caches, layer)
        got = _attend(built, case, case.rows, contexts, table, caches, layer)
        wanted = torch.cat([_attended(context, kv_heads, start, scale, case.window)
                            for context, (start, _) in zip(contexts, case.rows, strict=True)])  # fmt: skip
        assert_close(got.double().cpu(), wanted, tolerance, f"layer {layer} of {case}")


def _random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Float64, but of values that `dtype` holds exactly. The last two dimensions come swapped: [..., heads, dim]."""
    return torch.randn(shape, generator=generator).to(dtype).double().transpose(-1, -2)


def _scattered_pages(case: "AttentionCase | LatentCase", generator: torch.Generator) -> tuple[Tensor, int]:
    """A page table [R, P] int32 of pages out of order, and how many pages there are: more than are used."""
    counts = [-(-(start + length) // case.page_size) for start, length in case.rows]
    total = sum(counts) + 5
    order = torch.randperm(total, generator=generator).to(torch.int32)
    table = torch.full((len(counts), max(counts)), int(order[-1]), dtype=torch.int32)
    for row, part in enumerate(order[: sum(counts)].split(counts)):
        table[row, : len(part)] = part
    for row, owner in case.shares:
        shared = case.rows[row][0] // case.page_size
        table[row, :shared] = table[owner, :shared]
    return table, total


def _attend(
    backend: AttentionBackend, case: AttentionCase, rows: Sequence[tuple[int, int]], contexts: list[Tensor],
    table: Tensor, caches: Any, layer: int,
) -> Tensor:  # fmt: skip
    """[T, query_heads, head_dim] of one step through the backend."""
    kept = [row for row, (_, length) in enumerate(rows) if length]
    plan = np.array([[row, *rows[row], 0] for row in kept], np.int64)
    longest = max(start + length for start, length in rows)
    ids = torch.zeros(len(rows), longest + 1, dtype=torch.int32, device=backend.device)
    batch: Batch = build_batch(Rows.of(plan), ids, table.to(backend.device), case.page_size, caches)
    spans = [contexts[row][:, rows[row][0] : sum(rows[row])] for row in kept]
    tokens = torch.cat(spans, dim=1).to(backend.device, backend.dtype)
    query, key, value = tokens[2], tokens[0, :, : case.heads[1]], tokens[1, :, : case.heads[1]]
    out = backend.forward(query, key, value, caches[0][layer], batch.places, backend.prepare(batch))
    assert out.shape == (len(tokens[2]), case.heads[0] * case.head_dim), f"forward returned {tuple(out.shape)}"
    return out.view(-1, case.heads[0], case.head_dim)


def _attended(context: Tensor, kv_heads: int, start: int, scale: float, window: int | None) -> Tensor:
    key, value = context[:2, :, :kv_heads]
    return attend(context[2][start:], key, value, scale, window)


# ── latent attention ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class LatentCase:
    """One step of latent attention; `rows` and `shares` as in an AttentionCase. `dims` are those of the latent, of what
    is rotated, of an expanded key without it, and of a value."""

    page_size: int
    heads: int
    rows: tuple[tuple[int, int], ...]
    shares: tuple[tuple[int, int], ...] = ()
    dims: tuple[int, int, int, int] = (64, 16, 16, 32)

    def __str__(self) -> str:
        rows = ",".join(f"{start}+{length}" for start, length in self.rows)
        return f"page{self.page_size}-heads{self.heads}x{'/'.join(map(str, self.dims))}-{rows}"


LATENT_CASES: tuple[LatentCase, ...] = (
    LatentCase(page_size=16, heads=16, rows=((0, 1),)),
    LatentCase(page_size=16, heads=16, rows=((15, 1), (16, 1), (0, 1), (200, 1))),
    LatentCase(page_size=1, heads=8, rows=((5, 1), (3, 7), (0, 9))),
    LatentCase(page_size=4, heads=5, rows=((0, 9), (7, 1), (6, 5), (30, 1), (0, 1))),
    LatentCase(page_size=64, heads=16, rows=((31, 33), (63, 1), (64, 2), (130, 1)), dims=(32, 32, 16, 16)),
    LatentCase(page_size=4, heads=3, rows=((0, 11), (8, 3), (4, 1)), shares=((1, 0), (2, 0))),
    # rows long enough to be expanded: from nothing, after few and many cached tokens, before and between others
    LatentCase(page_size=16, heads=2, rows=((0, 200),)),
    LatentCase(page_size=4, heads=2, rows=((9, 1), (0, 192), (40, 3), (77, 210), (5, 1))),
    LatentCase(page_size=16, heads=2, rows=((0, 196), (192, 195), (16, 1)), shares=((1, 0), (2, 0))),
)


def check_latent_attention(
    backend: type[LatentBackend],
    case: LatentCase,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> None:
    """Runs `case` in two layers and compares with the attention of expanded keys and values, in float64. As in
    `check_attention`, the cache is full of what others left."""
    generator = torch.Generator().manual_seed(seed)
    latent, rope, key, value = case.dims
    shape = LatentShape(
        layers=2, query_heads=case.heads, latent_dim=latent, rope_dim=rope, key_dim=key, value_dim=value,
        scale=(key + rope) ** -0.5, kv_dtype=kv_dtype,
    )  # fmt: skip
    built = backend(shape, case.page_size, torch.device(device), dtype)
    table, pages = _scattered_pages(case, generator)
    caches = allocate(KVSpec(case.page_size, (built.kv_group(),)), pages, built.device)
    up = (torch.randn(case.heads, key + value, latent, generator=generator) * latent**-0.5).to(dtype)
    for layer, cache in enumerate(caches[0]):
        cache.copy_(50 * torch.randn(cache.shape, generator=generator))
        contexts = [torch.randn(sum(row), shape.width, generator=generator).to(dtype) for row in case.rows]
        for row, owner in case.shares:
            contexts[row][: case.rows[row][0]] = contexts[owner][: case.rows[row][0]]
        queries = [torch.randn(row[1], case.heads, key + rope, generator=generator).to(dtype) for row in case.rows]
        before = [0 if row in dict(case.shares) else start for row, (start, _) in enumerate(case.rows)]
        if any(before):
            filled = latent_step(built, table, [(0, length) for length in before], caches)
            spans = [context[:length] for context, length in zip(contexts, before, strict=True)]
            write_latents(torch.cat(spans).to(built.device), cache, filled.places)
        batch = latent_step(built, table, case.rows, caches)
        latents = torch.cat([context[start:] for context, (start, _) in zip(contexts, case.rows, strict=True)])
        latents = latents.to(built.device)
        write_latents(latents, cache, batch.places)
        query = torch.cat(queries).to(built.device)
        got = built.forward(query, latents, up.to(built.device), cache, built.prepare(batch))
        wanted = torch.cat(
            [latent_reference(part, context, up, shape) for part, context in zip(queries, contexts, strict=True)]
        )
        assert got.dtype == dtype and got.shape == wanted.shape, f"forward returned {tuple(got.shape)} of {got.dtype}"
        assert_close(got.double().cpu(), wanted, tolerance, f"layer {layer} of {case}")


def latent_step(backend: Backend, table: Tensor, rows: Sequence[tuple[int, int]], caches: Any) -> Batch:
    """The batch of `rows`, as far as they have tokens; row r has line r of `table`."""
    plan = np.array([[row, start, length, 0] for row, (start, length) in enumerate(rows) if length], np.int64)
    longest = max(start + length for start, length in rows)
    ids = torch.zeros(len(rows), longest + 1, dtype=torch.int32, device=backend.device)
    batch: Batch = build_batch(Rows.of(plan), ids, table.to(backend.device), backend.page_size, caches)
    return batch


def latent_reference(query: Tensor, context: Tensor, up: Tensor, shape: LatentShape) -> Tensor:
    """By the definition, in float64: the last positions of `context` [m, width] by `query` [n, heads, dim]."""
    latents, rotated = context.double().split([shape.latent_dim, shape.rope_dim], dim=1)
    both = torch.einsum("ml,hdl->mhd", latents, up.double())
    key, value = both.split([shape.key_dim, shape.value_dim], dim=2)
    key = torch.cat((key, rotated[:, None].expand(-1, len(up), -1)), dim=2)
    scores = torch.einsum("nhd,mhd->hnm", query.double(), key) * shape.scale
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(context) - len(query) + 1)
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), value)
