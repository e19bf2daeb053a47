"""Contract checks that the built-in attention backends, models and grammar engines pass, for authors to run.

    @pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
    def test_attention(case):
        check_attention(MyBackend, case)

    @pytest.mark.parametrize("case", LATENT_CASES, ids=str)
    def test_latent_attention(case):
        check_latent_attention(MyLatentBackend, case)

    @pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
    def test_model(scenario):
        check_model(MyModel, config, tensors, reference, scenario)

    @pytest.mark.parametrize("case", GRAMMAR_CASES, ids=str)
    def test_grammar(case):
        check_grammar(MyEngine, case)

    def test_parser():
        check_tool_parser(MyParser)  # or check_reasoning_parser; check_any_split for replies of your own

Each raises AssertionError with the numbers. Imports torch. Left out: speed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kernels.ops import write_latents
from engine.layers.attention import AttentionBackend, AttentionShape, Backend
from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.latent import LatentBackend, LatentShape
from engine.layers.model import Model
from engine.layers.quantization import Scheme
from engine.messages import Sampling, SlotAdmit, StepPlan
from engine.plugin.grammar_checks import (
    GRAMMAR_CASES,
    INVALID,
    GrammarCase,
    check_grammar,
    check_invalid,
    check_together,
    check_whitespace,
)
from engine.plugin.manager import Plugins
from engine.plugin.parser_checks import check_any_split, check_reasoning_parser, check_tool_parser
from engine.plugin.specs import KVSpec
from engine.plugin.terms import Terms
from engine.worker.backends import Backends
from engine.worker.batch import build_batch
from engine.worker.kv import allocate
from engine.worker.runner import Runner, Step

__all__ = [
    "ATTENTION_CASES",
    "GRAMMAR_CASES",
    "INVALID",
    "MODEL_SCENARIOS",
    "AttentionCase",
    "GrammarCase",
    "ModelHarness",
    "check_any_split",
    "check_attention",
    "check_grammar",
    "check_invalid",
    "check_model",
    "check_reasoning_parser",
    "check_together",
    "check_tool_parser",
    "check_whitespace",
]

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
        wanted = torch.cat([_reference(context, case, scale, start)
                            for context, (start, _) in zip(contexts, case.rows, strict=True)])  # fmt: skip
        _assert_close(got.double().cpu(), wanted, tolerance, f"layer {layer} of {case}")


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
    batch: Batch = build_batch(plan, ids, table.to(backend.device), case.page_size, caches)
    spans = [contexts[row][:, rows[row][0] : sum(rows[row])] for row in kept]
    tokens = torch.cat(spans, dim=1).to(backend.device, backend.dtype)
    query, key, value = tokens[2], tokens[0, :, : case.heads[1]], tokens[1, :, : case.heads[1]]
    out = backend.forward(query, key, value, caches[0][layer], batch.places, backend.prepare(batch))
    assert out.shape == (len(tokens[2]), case.heads[0] * case.head_dim), f"forward returned {tuple(out.shape)}"
    return out.view(-1, case.heads[0], case.head_dim)


def _reference(context: Tensor, case: AttentionCase, scale: float, start: int) -> Tensor:
    """Attention by its definition, in float64: [length, query_heads, head_dim] of one row's last positions."""
    query_heads, kv_heads = case.heads
    key, value = (part[:, :kv_heads].repeat_interleave(query_heads // kv_heads, dim=1) for part in context[:2])
    scores = torch.einsum("qhd,khd->hqk", context[2][start:], key) * scale
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool).triu(start + 1)
    if case.window is not None:
        unseen |= torch.ones_like(unseen).tril(start - case.window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), value)


def _assert_close(got: Tensor, wanted: Tensor, tolerance: float, where: str) -> None:
    worst = float((got - wanted).abs().max())
    assert worst <= tolerance, f"{where}: off by {worst:.3g}, more than {tolerance:.3g}"


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
        _assert_close(got.double().cpu(), wanted, tolerance, f"layer {layer} of {case}")


def latent_step(backend: Backend, table: Tensor, rows: Sequence[tuple[int, int]], caches: Any) -> Batch:
    """The batch of `rows`, as far as they have tokens; row r has line r of `table`."""
    plan = np.array([[row, start, length, 0] for row, (start, length) in enumerate(rows) if length], np.int64)
    longest = max(start + length for start, length in rows)
    ids = torch.zeros(len(rows), longest + 1, dtype=torch.int32, device=backend.device)
    batch: Batch = build_batch(plan, ids, table.to(backend.device), backend.page_size, caches)
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


# ── models ───────────────────────────────────────────────────────────────────────────────────

Reference = Callable[[list[int]], Tensor]  # ids to logits [len(ids), vocab_size]


class ModelHarness:
    """A model with caches and tables, driven as the worker drives it; request i has slot i.

    Pages of the requests are scattered. `tensors` maps names in the checkpoint to weights.
    """

    page_size = 4
    slots = 4

    def __init__(
        self,
        model: type[Model],
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        attention: type[Backend] | None = None,
        quantization: Scheme | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_model_len: int = 64,
    ) -> None:
        build = Build(
            dtype=dtype,
            device=torch.device(device),
            page_size=self.page_size,
            max_model_len=max_model_len,
            attention_backend=attention or Backends(Plugins.load(), device).build,
            quantization=quantization,
            deferred=True,
        )
        built = model(Terms(config), build)
        with torch.inference_mode():
            built.load(tensors.items())
        self.each = -(-max_model_len // self.page_size)
        caches = allocate(built.kv_spec(), self.each * self.slots, build.device)
        self.runner = Runner(
            built, caches, build.device, slots=self.slots, max_model_len=max_model_len, page_size=self.page_size
        )
        self.order = np.random.default_rng(0).permutation(self.each * self.slots)

    def admit(self, prompts: Iterable[list[int]], cached: Mapping[int, tuple[int, int]] | None = None) -> StepPlan:
        """A plan without rows that gives prompts slots and pages. `cached` maps a slot to (owner, count): its
        first `count` pages are those of slot `owner`."""
        greedy = Sampling(0.0, 0, 1.0, 0.0, 0)
        admits = tuple(SlotAdmit(slot, np.array(ids, "<i4").tobytes(), greedy) for slot, ids in enumerate(prompts))
        pages = self.order.reshape(self.slots, self.each).copy()
        for slot, (owner, count) in (cached or {}).items():
            pages[slot, :count] = pages[owner, :count]
        triples = [(admit.slot, index, pages[admit.slot, index]) for admit in admits for index in range(self.each)]
        return StepPlan(0, b"", admits, np.array(triples, "<i4").tobytes())

    @torch.inference_mode()
    def logits(self, rows: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Logits at every position of a step's rows (slot, start, length): [length, vocab_size] each."""
        hidden, _ = self.runner.forward(np.array([[*row, 0] for row in rows], np.int64))
        return list(self.runner.model.logits(hidden).cpu().split([length for _, _, length in rows]))


def _whole(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    harness.runner.apply(harness.admit(prompts[:1]))
    (got,) = harness.logits([(0, 0, len(prompts[0]))])
    _assert_close(got, reference(prompts[0]), tolerance, "a whole prompt's logits")


def _chunked(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    harness.runner.apply(harness.admit(prompts[:1]))
    bounds = [0, 1, 6, 8, len(prompts[0]) - 1, len(prompts[0])]
    got = torch.cat([harness.logits([(0, start, end - start)])[0] for start, end in pairwise(bounds)])
    _assert_close(got, reference(prompts[0]), tolerance, f"the logits of a prompt in chunks that end at {bounds[1:]}")


def _batched(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    harness.runner.apply(harness.admit(prompts))
    first = harness.logits([(0, 0, 5), (1, 0, len(prompts[1]) - 1)])
    rest = [(2, 0, len(prompts[2])), (1, len(prompts[1]) - 1, 1), (0, 5, len(prompts[0]) - 5)]
    two, one, zero = harness.logits(rest)
    for slot, got in enumerate((torch.cat((first[0], zero)), torch.cat((first[1], one)), two)):
        _assert_close(got, reference(prompts[slot]), tolerance, f"the logits of row {slot} of a mixed batch")


def _cached(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    """Slot 1 finds its first pages computed by slot 0 before, slot 2 by slot 0 in the same step."""
    owner = prompts[0]
    ids = [owner, owner[:8] + prompts[1], owner[:12] + prompts[2]]
    harness.runner.apply(harness.admit(ids, cached={1: (0, 2), 2: (0, 3)}))
    harness.logits([(0, 0, 8)])
    rows = [(2, 12, len(ids[2]) - 12), (1, 8, len(ids[1]) - 8), (0, 8, len(owner) - 8)]
    for (slot, start, _), got in zip(rows, harness.logits(rows), strict=True):
        where = f"the logits of slot {slot}, whose first {start} tokens are cached"
        _assert_close(got, reference(ids[slot])[start:], tolerance, where)


def _greedy(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    """Steps are launched without looking at the results of those before, as the engine does, and as many ahead."""
    count, ahead = 10, 3
    plan = harness.admit(prompts)
    steps: deque[Step] = deque()
    done: list[np.ndarray] = []

    def finish_first() -> None:
        done.append(np.frombuffer(harness.runner.finish(steps.popleft()).tokens, "<i4"))

    for step in range(count):
        rows = [
            (slot, len(ids) + step - 1, 1, 1) if step else (slot, 0, len(ids), 1) for slot, ids in enumerate(prompts)
        ]
        rows_bytes = np.array(rows, "<i4").tobytes()
        if len(steps) == ahead:
            finish_first()
        steps.append(harness.runner.launch(StepPlan(step, rows_bytes, plan.admits, plan.pages)))
        plan = StepPlan(0, b"")
    while steps:
        finish_first()
    for slot, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(reference(ids)[-1].argmax()))
        got = [int(tokens[slot]) for tokens in done]
        assert got == ids[len(prompt) :], f"greedy ids of row {slot} are {got}, not {ids[len(prompt) :]}"


_SCENARIOS = {"whole": _whole, "chunked": _chunked, "batched": _batched, "cached": _cached, "greedy": _greedy}
MODEL_SCENARIOS: tuple[str, ...] = tuple(_SCENARIOS)


def check_model(
    model: type[Model],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    reference: Reference,
    scenario: str,
    *,
    attention: type[Backend] | None = None,
    quantization: Scheme | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-4,
) -> None:
    """Runs one of MODEL_SCENARIOS: a whole prompt, one in chunks, among other rows, with cached pages, and greedy
    decoding; compares logits, or ids, with `reference` (ids to logits [len(ids), vocab_size]).

    `config` is in config.json's terms; 16 tokens of vocabulary and 64 positions are enough. `attention` is by
    default the built-in choice for `device`. With a `quantization`, `reference` is of the weights as they are stored.
    """
    harness = ModelHarness(
        model, config, tensors, attention=attention, quantization=quantization, device=device, dtype=dtype
    )
    generator = np.random.default_rng(1)
    vocab_size = harness.runner.model.vocab_size
    prompts = [generator.integers(0, vocab_size, length).tolist() for length in (21, 9, 14)]
    _SCENARIOS[scenario](harness, reference, prompts, tolerance)
