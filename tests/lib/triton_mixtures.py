"""Triton's mixtures of experts against their definition in torch: on a GPU (tests/gpu/test_gpu_moe.py), or interpreted
on a CPU (test_interpreted.py, which runs this in a process of its own)."""

import itertools

import numpy as np
import pytest
import torch
from kernel_numbers import DEVICE, FP8_TOLERANCE, GPU, TOLERANCE, assert_near, exact, random
from torch import Tensor

from engine.kernels.experts import routing as triton_routing
from engine.kernels.experts import triton as triton_moe
from engine.kernels.experts.products import combine, vector_down, vector_up
from engine.kernels.experts.products_fp8 import multiply_fp8, multiply_pair
from engine.kernels.experts.reference import ExpertWeights, MoeOps, Places, Routed, Routing
from engine.kernels.experts.routing import gate, order_reference, route
from engine.kernels.experts.triton import Regime, TritonMoeOps
from engine.kernels.fp8.reference import BLOCK, E4M3, dequantize, quantize_blocks, quantize_rows
from engine.kernels.fp8.triton import Cut
from engine.kernels.fp8.triton import quantize_tokens as triton_quantize_tokens
from engine.parallel.placement import table_of

DTYPES = [torch.bfloat16, torch.float32] if GPU else [torch.float32]
REFERENCE, TRITON = MoeOps(), TritonMoeOps()

V3 = {"scoring": "sigmoid", "groups": 4, "kept_groups": 2, "group_best": 2, "normalised": True, "scale": 2.5}
ROUTINGS = {
    "v2-lite": (Routing(experts=64, top_k=6), False),
    "v2": (Routing(experts=40, top_k=6, groups=8, kept_groups=3, scale=16.0), False),
    "v3": (Routing(experts=256 if GPU else 32, top_k=8, **V3), True),
    "mixtral": (Routing(experts=8, top_k=2, normalised=True), False),
    "one of three": (Routing(experts=3, top_k=1), False),
}
TOKENS = (1, 5, 63, 64, 257, 3000) if GPU else (1, 5, 37)


# ── routing ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "size"), [(64, 2048), (256, 7168), (3, 576)] if GPU else [(3, 48), (8, 64)])
def test_logits(experts: int, size: int, dtype: torch.dtype) -> None:
    weight = random(experts, size, dtype=dtype, seed=1) * size**-0.5
    for tokens in (1, 5, 32, 200) if GPU else (1, 5):
        hidden = random(tokens, size, dtype=dtype)
        wanted = REFERENCE.gate(hidden, weight)
        for got in (gate(hidden, weight), TRITON.gate(hidden, weight)):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [0, 16])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_choices_their_order_and_their_counts(
    name: str, tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing, biased = ROUTINGS[name]
    if not GPU:
        monkeypatch.setattr(triton_routing, "TILE", 512)  # so that there are several chunks
    logits = 2 * random(tokens, routing.experts)
    bias = random(routing.experts, seed=1) if biased else None
    counts = torch.zeros(routing.experts, dtype=torch.int64, device=DEVICE)
    wanted, got = REFERENCE.route(logits, bias, routing), route(logits, bias, routing, rows, counts)
    dense = [torch.zeros_like(logits).scatter(1, each.experts, each.weights) for each in (got, wanted)]
    torch.testing.assert_close(*dense)
    assert torch.equal(counts, torch.bincount(got.experts.flatten(), minlength=routing.experts))
    if rows:
        assert_ordered(got, routing.experts, rows)
    route(logits, bias, routing, rows)
    assert int(counts.sum()) == tokens * routing.top_k, "what is not asked for is not counted"


def assert_ordered(routed: Routed, experts: int, rows: int) -> None:
    order, wanted = routed.order, order_reference(routed.experts, experts, rows)
    count = int(wanted.count)
    assert torch.equal(order.choices, wanted.choices) and torch.equal(order.ends, wanted.ends)
    assert int(order.count) == count <= order.places and order.rows == rows
    assert torch.equal(order.tasks[:, :count], wanted.tasks[:, :count])
    expert, begin, length = wanted.tasks[:, :count].tolist()
    assert sum(length) == len(order.choices) and all(0 < each <= rows for each in length)
    chosen = routed.experts.flatten()[wanted.choices.long()].tolist()
    assert all(chosen[b : b + n] == [e] * n for e, b, n in zip(expert, begin, length, strict=True))


@pytest.mark.parametrize(("tokens", "real"), [(3, 2), (21, 9), (21, 0), (8, 8)])
def test_padding_chooses_no_expert(tokens: int, real: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its hidden states hold; and what was made of the others is the same."""
    monkeypatch.setattr(triton_routing, "TILE", 64 if not GPU else 4096)
    cut = Cut(16, 32, 32, 2, 4, 2)
    monkeypatch.setattr(triton_moe, "REGIMES", (Regime(float("inf"), (cut, cut), (cut, cut)),))
    routing, weights = Routing(experts=8, top_k=3, normalised=True), matrices(8, 48, 40, "blocks", torch.float32)
    logits, hidden = random(tokens, 8), random(tokens, 48, seed=1)
    limit = torch.tensor([real], device=DEVICE)
    logits[real:] = torch.nan
    hidden[real:] = torch.nan
    counts = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    got, wanted = (ops.route(logits, None, routing, counts, limit) for ops in (TRITON, REFERENCE))
    assert int(counts.sum()) == 2 * real * 3
    for routed in (got, wanted):
        assert (routed.experts[real:] == -1).all() and not routed.weights[real:].any()
    if got.order is not None:
        order = order_reference(got.experts, 8, got.order.rows)
        count = int(order.count)
        assert int(got.order.count) == count and torch.equal(got.order.ends, order.ends)
        assert torch.equal(got.order.choices[: 3 * real], order.choices[: 3 * real])
        assert torch.equal(got.order.tasks[:, :count], order.tasks[:, :count])
    mine = TRITON.experts(hidden, got, weights)[:real]
    if real:
        alone = Routed(got.weights[:real], got.experts[:real])
        assert_near(mine, REFERENCE.experts(hidden[:real], alone, weights), 1e-4)
        assert_near(REFERENCE.experts(hidden, got, weights)[:real], mine, 1e-4)


def placed(experts: int, placement: list[list[int]], rank: int) -> Places:
    lines = torch.from_numpy(table_of(np.array(placement, np.int32), rank, experts, len(placement)))
    return Places(lines.to(DEVICE), len(placement[rank]))


@pytest.mark.parametrize("rows", [0, 16])
@pytest.mark.parametrize(("tokens", "real"), [(21, 9), (21, 21)])
def test_choices_among_the_experts_of_a_rank(
    tokens: int, real: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the definition says, in several chunks; each choice is some rank's, and counts go by the experts chosen."""
    if not GPU:
        monkeypatch.setattr(triton_routing, "TILE", 64)
    routing, limit = Routing(experts=6, top_k=3, normalised=True), torch.tensor([real], device=DEVICE)
    placement = [[4, 0, 1], [2, 3, 1], [5, 1, 0]]
    logits = 2 * random(tokens, 6)
    whole = REFERENCE.route(logits, None, routing, None, limit)
    seen = torch.zeros_like(logits, dtype=torch.int64)
    for rank, line in enumerate(placement):
        counts = torch.zeros(6, dtype=torch.int64, device=DEVICE)
        where = placed(6, placement, rank)
        got = route(logits, None, routing, rows, counts, limit, where)
        wanted = REFERENCE.route(logits, None, routing, None, limit, where)
        dense = [torch.zeros(tokens, 4, device=DEVICE).scatter(1, r.experts + 1, r.weights) for r in (got, wanted)]
        torch.testing.assert_close(*dense)
        assert torch.equal(counts, torch.bincount(whole.experts[:real].flatten(), minlength=6))
        assert not got.weights[got.experts < 0].any()
        held = torch.tensor([*line, 5], device=DEVICE)[got.experts]
        seen += torch.zeros_like(seen).scatter_add(1, held, (got.experts >= 0).to(torch.int64))
        if rows:
            order, count = order_reference(got.experts, 3, rows), int((got.experts >= 0).sum())
            assert torch.equal(got.order.choices[:count], order.choices[:count])
            assert torch.equal(got.order.ends, order.ends) and int(got.order.count) == int(order.count)
            tasks = slice(0, int(order.count))
            assert torch.equal(got.order.tasks[:, tasks], order.tasks[:, tasks])
    assert seen[:real].sum() == 3 * real and seen.max() == 1, "each choice is computed once"


def test_logits_that_are_no_numbers_choose_experts_that_exist() -> None:
    logits = random(4, 8)
    logits[1], logits[2], logits[3, :7] = torch.nan, -torch.inf, -torch.inf
    routed = route(logits, None, Routing(experts=8, top_k=3), 16)
    assert [len(set(row)) for row in routed.experts.tolist()] == [3] * 4
    assert int(routed.experts.min()) >= 0 and int(routed.experts.max()) < 8
    assert_ordered(routed, 8, 16)


# ── products ─────────────────────────────────────────────────────────────────────────────────


def matrices(experts: int, size: int, inner: int, kind: str, dtype: torch.dtype) -> ExpertWeights:
    gate_up = random(experts, 2 * inner, size, seed=1) * size**-0.5
    down = random(experts, size, inner, seed=2) * inner**-0.5
    sizes = 0.1 + torch.rand(experts, 2, 1, 1, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    gate_up *= sizes.repeat_interleave(inner, 2).flatten(1, 2)
    if kind == "plain":
        return ExpertWeights(gate_up.to(dtype), down.to(dtype))
    quantize = quantize_blocks if kind == "blocks" else quantize_rows
    halves = [[quantize(half) for half in one.chunk(2)] for one in gate_up]
    numbers = torch.stack([torch.cat([number for number, _ in one]) for one in halves])
    if kind == "blocks":
        scale = torch.stack([torch.stack([scale for _, scale in one]) for one in halves])
    else:
        scale = torch.stack([torch.cat([scale for _, scale in one]) for one in halves])
    downs = [quantize(one) for one in down]
    return ExpertWeights(
        numbers, torch.stack([number for number, _ in downs]), scale, torch.stack([scale for _, scale in downs])
    )


def routed_to(tokens: int, experts: int, top_k: int, seed: int = 3) -> Routed:
    """Uneven: some experts get many tokens, some none."""
    logits = random(tokens, experts, seed=seed) + 2 * random(1, experts, seed=seed + 1)
    return REFERENCE.route(logits, None, Routing(experts=experts, top_k=top_k, normalised=True))


SHAPES = [(2048, 1408), (1024, 768), (576, 200)] if GPU else [(48, 40), (160, 136)]
KINDS = ["plain", "blocks", "rows"]
# Interpreted, a large shape takes seconds: the one in blocks, of which it has parts.
TASKS = (
    list(itertools.product(KINDS, SHAPES)) if GPU else [("plain", (48, 40)), ("blocks", (160, 136)), ("rows", (48, 40))]
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    size, inner = shape
    weights = matrices(7, size, inner, kind, dtype)
    rows, columns = (4, 512) if GPU else (32, 64)  # loops are unrolled: fewer columns would take long to compile
    for tokens in (1, 3) if GPU else (2,):
        hidden, routed = random(tokens, size, dtype=dtype), routed_to(tokens, 7, 3)
        base = random(tokens, size, dtype=dtype, seed=9) if tokens > 1 else None
        wanted = REFERENCE.experts(hidden, routed, weights, base)
        made = vector_up(hidden, weights.gate_up, weights.gate_up_scale, routed.experts, rows, columns)
        got = vector_down(made, weights.down, weights.down_scale, routed.experts, routed.weights, base, rows, columns)
        assert_near(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "shape"), TASKS, ids=str)
def test_tasks(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    size, inner = shape
    weights = matrices(7, size, inner, kind, dtype)
    for tokens, together, depth in ((1, 1, 32), (29, 4, 256), (300, 2, 64)) if GPU else ((29, 4, 32), (5, 4, 256)):
        cut = Cut(16, 32, depth, together, 4, 2)
        hidden, routed = random(tokens, size, dtype=dtype), routed_to(tokens, 7, 3)
        routed = routed._replace(order=order_reference(routed.experts, 7, cut.rows))
        base = random(tokens, size, dtype=dtype, seed=9) if together == 4 else None
        got = TRITON.by_task(hidden, routed, weights, base, cut, cut)
        assert_near(got, REFERENCE.experts(hidden, routed, weights, base), TOLERANCE[dtype])


def test_the_results_of_choices_find_their_tokens_from_the_order() -> None:
    made, routed = random(15, 24), routed_to(5, 4, 3)
    order = order_reference(routed.experts, 4, 16)
    places = torch.empty_like(order.choices)
    places[order.choices.long()] = torch.arange(15, dtype=torch.int32, device=DEVICE)
    sorted_made = made[order.choices.long()]
    wanted = (made.view(5, 3, 24) * routed.weights[:, :, None]).sum(1)
    torch.testing.assert_close(combine(sorted_made, routed.weights, places, None), wanted)
    torch.testing.assert_close(combine(made, routed.weights, None, wanted), 2 * wanted)


# ── FP8 activations ──────────────────────────────────────────────────────────────────────────


def exact_pair(hidden: Tensor, routed: Routed, weights: ExpertWeights, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 and by choice, [T * k, ...]: the gated products of `hidden`, these as FP8 with a scale for `each` so
    many numbers and back, and the products of those by down."""
    made, back, lines = [], [], []
    tokens = hidden.float().repeat_interleave(routed.experts.shape[1], 0)
    for token, expert in zip(tokens, routed.experts.flatten().tolist(), strict=True):
        gate_up, down = weights.matrices(expert, torch.float32)
        gate, up = (gate_up @ token).chunk(2)
        one = torch.nn.functional.silu(gate) * up
        parts = one.view(-1, each)
        scale = parts.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
        rounded = ((parts / scale).to(E4M3).float() * scale).flatten()
        made.append(one), back.append(rounded), lines.append(down @ rounded)
    return torch.stack(made), torch.stack(back), torch.stack(lines)


@pytest.mark.parametrize("kind", ["blocks", "rows"])
@pytest.mark.parametrize(
    ("rows", "each", "ordered"), [(16, BLOCK, True), (16, 64, False), (32, 64, True), (64, BLOCK, True)]
)
def test_tasks_with_fp8_activations(rows: int, each: int, ordered: bool, kind: str) -> None:
    """Gate and up by exact activations; then down by those that they are quantized to. Tasks of fewer than 64 choices
    have the matrix's lines for the matrix units' own; without an order each choice is a task."""
    dtype = torch.bfloat16 if GPU else torch.float32
    size, inner, tokens, top_k = (2048, 1408, 300 if ordered else 4, 3) if GPU else (256, 128, 7, 2)
    weights = matrices(5, size, inner, kind, dtype)
    hidden, routed = exact(tokens, size, dtype) / 64, routed_to(tokens, 5, top_k)
    up, down = Cut(rows, each, BLOCK, 4, 4, 2), Cut(rows, 64, each, 2, 4, 3)
    tasks = order_reference(routed.experts, 5, rows) if ordered else routed.experts
    inputs, scales = triton_quantize_tokens(hidden)
    choices = tokens * top_k
    made = torch.empty(choices, inner, dtype=E4M3, device=DEVICE)
    made_scales = torch.empty(inner // each, choices, device=DEVICE).t()
    multiply_fp8(inputs, scales, weights.gate_up, weights.gate_up_scale, tasks, up, top_k, made, made_scales)
    place = tasks.choices.long() if ordered else torch.arange(choices, device=DEVICE)
    plain, rounded, wanted = exact_pair(hidden, routed, weights, each)
    torch.testing.assert_close(made_scales, plain[place].view(choices, -1, each).abs().amax(2) / 448, rtol=0.02, atol=0)
    back = made.float() * made_scales.repeat_interleave(each, 1)
    assert_near(back, rounded[place], FP8_TOLERANCE)
    lines = multiply_pair(hidden, tasks, weights, top_k, up, down)
    assert_near(lines, wanted.to(dtype), FP8_TOLERANCE)
    again = torch.empty_like(lines)
    multiply_fp8(made, made_scales, weights.down, weights.down_scale, tasks, down, 0, again)
    assert torch.equal(lines, again)
    chosen = routed.experts.flatten()[place].tolist()
    sums = [weights.matrices(expert, torch.float32)[1] @ row for expert, row in zip(chosen, back, strict=True)]
    assert_near(again[place], torch.stack(sums).to(dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["blocks", "rows"])
@pytest.mark.parametrize("rows", [16, 64], ids=["flipped", "as they are"])
def test_fp8_operands_of_one_sign(rows: int, kind: str) -> None:
    """Sums of thousands of positive products are not cut off (as in triton_fp8.py): gate times up is what it should be,
    in the mean, as its silu is the gate itself."""
    size, inner, top_k = (4096, 256, 2) if GPU else (256, 128, 2)
    dtype = torch.bfloat16 if GPU else torch.float32
    weights = matrices(3, size, inner, "plain", torch.float32)
    halves = [[(quantize_blocks if kind == "blocks" else quantize_rows)(half.abs()) for half in one.chunk(2)]
              for one in weights.gate_up]  # fmt: skip
    gate_up = torch.stack([torch.cat([number for number, _ in one]) for one in halves])
    join = torch.stack if kind == "blocks" else torch.cat
    scale = torch.stack([join([scale for _, scale in one]) for one in halves])
    hidden, routed = exact(40, size, dtype).abs() / 64, routed_to(40, 3, top_k)
    order = order_reference(routed.experts, 3, rows)
    out = torch.empty(40 * top_k, inner, dtype=dtype, device=DEVICE)
    numbers, scales = triton_quantize_tokens(hidden)
    multiply_fp8(numbers, scales, gate_up, scale, order, Cut(rows, 64, BLOCK, 2, 4, 2), top_k, out)
    place = order.choices.long()
    stored = ExpertWeights(gate_up, weights.down.to(E4M3), scale, torch.ones(3, size, device=DEVICE))
    wanted = torch.empty(len(out), inner, dtype=torch.float64, device=DEVICE)
    for line, choice in enumerate(place.tolist()):
        both = both_of(stored, int(routed.experts.flatten()[choice])) @ hidden[choice // top_k].double()
        wanted[line] = torch.nn.functional.silu(both[:inner]) * both[inner:]
    assert abs(float((out.double() - wanted).mean() / wanted.mean())) < 4e-3


def both_of(weights: ExpertWeights, expert: int) -> Tensor:
    """Gate and up of an expert, in float64."""
    assert weights.gate_up_scale is not None
    scale = weights.gate_up_scale[expert]
    halves = zip(weights.gate_up[expert].chunk(2), scale if scale.dim() == 3 else scale.chunk(2), strict=True)
    return torch.cat([dequantize(*half) for half in halves]).double()


def test_a_choice_of_padding_is_no_task_by_itself() -> None:
    """Its lines are not written, and its hidden state may hold anything."""
    weights, hidden, routed = matrices(3, 256, 128, "blocks", torch.float32), random(2, 256), routed_to(2, 3, 2)
    hidden[1] = torch.nan
    experts = routed.experts.clone()
    experts[1] = -1
    numbers, scales = triton_quantize_tokens(hidden)
    out = torch.full((4, 128), 7.0, device=DEVICE)
    gate_up, scale = weights.gate_up, weights.gate_up_scale
    multiply_fp8(numbers, scales, gate_up, scale, experts, Cut(16, 64, 128, 1, 4, 2), 2, out)
    assert (out[2:] == 7).all() and out[:2].isfinite().all()


# ── the whole ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model calls it, through all regimes; FP8 activations show, where they are used."""
    dtype = torch.bfloat16 if GPU else torch.float32
    experts = 8 if GPU else 4
    routing = Routing(experts=experts, top_k=2, normalised=True)
    size, inner = (1024, 768) if GPU else (128, 128) if kind != "plain" else (64, 64)
    steps = (1, 4, 5, 40, 90, 1000) if GPU else (1, 5, 11)
    if not GPU:
        cut, wide = Cut(16, 32, 64, 1, 4, 2), Cut(16, 128, 128, 2, 4, 2)
        narrow = (Cut(16, 64, 128, 1, 4, 2), Cut(16, 64, 64, 1, 4, 2))
        regimes = (Regime(3.0, (cut, cut), narrow), Regime(float("inf"), (cut, cut), (wide, wide)))
        monkeypatch.setattr(triton_moe, "REGIMES", regimes)
    weights = matrices(experts, size, inner, kind, dtype)
    for tokens in steps:
        logits, hidden = random(tokens, experts, seed=tokens), exact(tokens, size, dtype) / 64
        routed = TRITON.route(logits, None, routing)
        assert (routed.order is None) == (tokens <= triton_moe.VECTOR_TOKENS)
        got = TRITON.experts(hidden, routed, weights)
        if GPU or tokens == 5:
            again = TRITON.experts(hidden, Routed(routed.weights, routed.experts), weights)
            assert torch.equal(got, again), "the order, made by who routes or afterwards, is the same"
        wanted = REFERENCE.experts(hidden, routed, weights)
        assert_near(got, wanted, TOLERANCE[dtype] if kind == "plain" else FP8_TOLERANCE)
        if kind != "plain":
            assert torch.equal(TRITON.by_fp8(hidden, routed, weights, None), got) == GPU, "by default for bfloat16"
            got = TRITON.by_fp8(hidden, routed, weights, hidden)
            assert_near(
                got - hidden, wanted, FP8_TOLERANCE if GPU else 2 * FP8_TOLERANCE
            )  # interpreted, FP8 is cut off
    assert TRITON.experts(hidden[:0], TRITON.route(logits[:0], None, routing), weights).shape == (0, size)


@pytest.mark.parametrize("kind", KINDS if GPU else KINDS[:1])
def test_parts_of_ranks_add_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank makes its experts' part of the sum, whatever takes how many tokens; those of an expert with copies are
    spread over them."""
    dtype = torch.bfloat16 if GPU else torch.float32
    routing, placement = Routing(experts=8, top_k=2, normalised=True), [[0, 1, 2, 3, 6], [4, 5, 6, 7, 0]]
    size, inner = (1024, 768) if GPU else (48, 32)
    if not GPU:
        cut = Cut(16, 32, 64, 1, 4, 2)
        monkeypatch.setattr(triton_moe, "REGIMES", (Regime(float("inf"), (cut, cut), (cut, cut)),))
    weights = matrices(8, size, inner, kind, dtype)
    for tokens in (3, 90, 1000) if GPU else (9,):
        logits, hidden = random(tokens, 8, seed=tokens), exact(tokens, size, dtype) / 64
        wanted = REFERENCE.experts(hidden, REFERENCE.route(logits, None, routing), weights)
        total = torch.zeros_like(wanted, dtype=torch.float32)
        for rank, line in enumerate(placement):
            routed = TRITON.route(logits, None, routing, places=placed(8, placement, rank))
            held = ExpertWeights(*(None if each is None else each[line] for each in weights))
            total += TRITON.experts(hidden, routed, held, among=8)
        assert_near(total, wanted, TOLERANCE[dtype] if kind == "plain" else FP8_TOLERANCE)


if GPU:

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tokens", [1, 8, 64, 300])
    def test_a_captured_step_follows_its_routing(kind: str, tokens: int) -> None:
        routing = Routing(experts=64, top_k=6)
        weights = matrices(64, 1024, 768, kind, torch.bfloat16)
        gate = random(64, 1024, dtype=torch.bfloat16, seed=5)
        hidden = random(tokens, 1024, dtype=torch.bfloat16)

        def step() -> Tensor:
            return TRITON.experts(hidden, TRITON.route(TRITON.gate(hidden, gate), None, routing), weights)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for seed in range(4):
            hidden.copy_(random(tokens, 1024, dtype=torch.bfloat16, seed=seed + 7))
            graph.replay()
            assert torch.equal(out, step())

    @pytest.mark.parametrize("tokens", [100, 5000])
    def test_torchs_grouped_product(tokens: int) -> None:
        weights, hidden = matrices(8, 1024, 768, "plain", torch.bfloat16), random(tokens, 1024, dtype=torch.bfloat16)
        routed = routed_to(tokens, 8, 2)
        routed = routed._replace(order=order_reference(routed.experts, 8, 64))
        got = TRITON.by_library(hidden, routed, weights, None)
        assert_near(got, REFERENCE.experts(hidden, routed, weights), TOLERANCE[torch.bfloat16])

    @pytest.mark.parametrize(("seed", "kind"), itertools.product(range(12), KINDS))
    def test_random_shapes(seed: int, kind: str) -> None:
        numbers = torch.Generator().manual_seed(seed)

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=numbers))

        experts, tokens = between(2, 70), between(1, 900)
        top_k, size, inner = between(1, min(8, experts)), 8 * between(4, 150), 8 * between(4, 150)
        weights, hidden = matrices(experts, size, inner, kind, torch.bfloat16), random(tokens, size).bfloat16()
        routed = routed_to(tokens, experts, top_k, seed)
        got = TRITON.experts(hidden, routed, weights)
        tolerance = TOLERANCE[torch.bfloat16] if kind == "plain" else FP8_TOLERANCE
        assert_near(got, REFERENCE.experts(hidden, routed, weights), tolerance)
