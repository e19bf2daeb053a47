"""Routing on a GPU: each token's experts, and all choices in the order of their experts, without asking the host.

    hidden ── gate ──> logits [T, E]
              route ─> weights, experts [T, k];  for each chunk of tokens, how many chose each expert
              order ─> choices sorted by expert, and tasks: up to `rows` successive choices of one expert

A token chooses an expert once at most, so a chunk's choices are a matrix of 0 and 1 over tokens and experts. Its sums
over tokens are the experts' counts, and its running sums tell each choice its place in the order: no sort, no atomic
counter, and the same order every time. Few tokens are one chunk, and then one kernel does both. Where a rank holds some
experts alone, the matrix is over those: choices of others have no place in the order.

A task is a line of matrix products with one expert's weights. There are as many places for tasks as there could be
tasks; the kernels that take them stop at `count`. What is here has the same shapes whatever is chosen.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.experts.reference import Places, Routed, Routing
from engine.kernels.launch import launch_dependents, wait_for_previous

TILE = 4096  # tokens times experts that one program looks at
GATE_TILE = 8192  # tokens times their numbers that one program of `gate` multiplies


@dataclass(frozen=True, slots=True)
class Order:
    """T * k choices by their expert. `tasks` of at most `rows` choices each: their expert, where they begin in
    `choices`, how many they are. Where there is padding, the last `choices` are anything."""

    choices: Tensor  # [T * k] int32: token * k + slot
    ends: Tensor  # [experts] int32: where each expert's choices end
    tasks: Tensor  # [3, places] int32
    count: Tensor  # [1] int32: tasks that there are
    rows: int

    @property
    def places(self) -> int:
        return self.tasks.shape[1]


def task_places(choices: int, experts: int, rows: int) -> int:
    """The most tasks of at most `rows` that so many choices can make."""
    return (choices + min(experts, choices) * (rows - 1)) // rows


def order_reference(experts: Tensor, count: int, rows: int) -> Order:
    """The definition: the order of the choices `experts` [T, k] of `count` experts, for tasks of at most `rows`."""
    chosen = experts.flatten()
    chosen = torch.where(chosen < 0, count, chosen)  # padding comes last
    choices = chosen.argsort(stable=True).to(torch.int32)
    totals = torch.zeros(count + 1, dtype=torch.int64, device=experts.device)
    totals = totals.scatter_add_(0, chosen, torch.ones_like(chosen))[:-1]
    ends, need = totals.cumsum(0), -(-totals // rows)
    task_ends = need.cumsum(0)
    task = torch.arange(task_places(len(chosen), count, rows), device=experts.device)
    expert = torch.searchsorted(task_ends, task, right=True).clamp(max=count - 1)
    step = (task - (task_ends - need)[expert]) * rows
    begin = (ends - totals)[expert] + step
    tasks = torch.stack((expert, begin, (totals[expert] - step).clamp(max=rows)))
    return Order(choices, ends.to(torch.int32), tasks.to(torch.int32), task_ends[-1:].to(torch.int32), rows)


@triton.jit(do_not_specialize=["tokens"])
def gate_kernel(
    hidden, weight, logits, tokens, EXPERTS: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """The logits of one expert for TOKENS tokens; its weight comes while the kernel before still runs."""
    expert, t = tl.program_id(0), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, COLUMNS)
    w = tl.load(weight + expert * SIZE + k, mask=k < SIZE, other=0.0)
    wait_for_previous(DEPENDS)
    at = t[:, None].to(tl.int64) * SIZE + k[None, :]
    x = tl.load(hidden + at, mask=(t < tokens)[:, None] & (k < SIZE)[None, :], other=0.0)
    total = tl.sum(x.to(tl.float32) * w.to(tl.float32)[None, :], 1)
    tl.store(logits + t * EXPERTS + expert, total, mask=t < tokens)


def gate(hidden: Tensor, weight: Tensor) -> Tensor:
    """As `MoeOps.gate`, of few tokens."""
    (tokens, size), experts = hidden.shape, len(weight)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=hidden.device)
    columns = triton.next_power_of_2(size)
    together = max(1, min(triton.next_power_of_2(tokens), GATE_TILE // columns))
    gate_kernel[(experts, triton.cdiv(tokens, together))](
        hidden.contiguous(), weight, logits, tokens, EXPERTS=experts, SIZE=size, TOKENS=together, COLUMNS=columns,
        num_warps=max(1, min(8, together * columns // 1024)), **launch_dependents(hidden),
    )  # fmt: skip
    return logits


@triton.jit
def best_of(scores, ids, NONE: tl.constexpr):
    """The largest of each line of `scores`, and its place: the first of equals."""
    best = tl.max(scores, 1)
    return best, tl.min(tl.where(scores == best[:, None], ids[None, :], NONE), 1)


@triton.jit
def keep_groups(choice, ids, GROUPS: tl.constexpr, EACH: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
                EXPERTS: tl.constexpr):  # fmt: skip
    """`choice` with the scores of all but the best groups' experts at -inf; a group's score is the sum of its BEST
    best."""
    group = ids // EACH
    scores = tl.full(choice.shape, float("-inf"), tl.float32)  # of the group that each expert is of
    for g in tl.static_range(GROUPS):
        mine = (group == g)[None, :]
        rest = tl.where(mine, choice, float("-inf"))
        total = tl.zeros([choice.shape[0]], tl.float32)
        for _ in tl.static_range(BEST):
            best, place = best_of(rest, ids, EXPERTS)
            total += best
            rest = tl.where(ids[None, :] == place[:, None], float("-inf"), rest)
        scores = tl.where(mine, total[:, None], scores)
    kept = tl.zeros(choice.shape, tl.int32)
    for _ in tl.static_range(KEPT):
        _, place = best_of(scores, ids, EXPERTS)
        mine = group[None, :] == (place // EACH)[:, None]
        kept = tl.where(mine, 1, kept)
        scores = tl.where(mine, float("-inf"), scores)
    return tl.where(kept == 1, choice, float("-inf"))


@triton.jit
def place_choices(slot, token, totals, before, ids, order, ends, tasks, count, places, ROWS: tl.constexpr,
                  TOP_K: tl.constexpr, EXPERTS: tl.constexpr):  # fmt: skip
    """Puts a chunk's choices in their places. `slot` [tokens, experts] is the slot in which a token chose an expert, or
    -1; `totals` are the experts' counts of all chunks, `before` of those before this."""
    chosen = (slot >= 0).to(tl.int32)
    first = tl.cumsum(totals, 0) - totals  # where each expert's choices begin
    place = (first + before)[None, :] + tl.cumsum(chosen, 0) - 1
    tl.store(order + place, token[:, None] * TOP_K + slot, mask=slot >= 0)
    need = tl.cdiv(totals, ROWS)  # tasks of each expert
    task = tl.cumsum(need, 0) - need
    if tl.program_id(0) == 0:
        tl.store(ends + ids, first + totals, mask=ids < EXPERTS)
        tl.store(count, tl.sum(need))
    for step in range(tl.program_id(0), tl.max(need), tl.num_programs(0)):
        there = step < need
        tl.store(tasks + task + step, ids, mask=there)
        tl.store(tasks + places + task + step, first + step * ROWS, mask=there)
        tl.store(tasks + 2 * places + task + step, tl.minimum(totals - step * ROWS, ROWS), mask=there)


@triton.jit
def score_experts(x, inside, SIGMOID: tl.constexpr):
    """Scores of logits `x` [tokens, experts]: each by itself, or as shares of one."""
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        x = tl.where(inside, x, float("-inf"))
        powers = tl.exp(x - tl.max(tl.where(inside, x, -3.0e38), 1)[:, None])
        scores = powers / tl.maximum(tl.sum(powers, 1), 1e-37)[:, None]
    return scores


@triton.jit
def choose_best(choice, ids, token, table, TOP_K: tl.constexpr, LINE: tl.constexpr, EXPERTS: tl.constexpr):
    """The TOP_K best of each line of `choice` [tokens, experts]: the slot in which a token chose an expert, or -1; the
    number of that expert on this rank, or -1; and the slot by those numbers. `table` has lines of LINE numbers, as
    Places says; LINE is 0 where all experts are here."""
    slot = tl.full(choice.shape, -1, tl.int32)
    number = tl.zeros(choice.shape, tl.int32) + ids[None, :]
    held = tl.full(choice.shape, -1, tl.int32)
    for k in tl.static_range(TOP_K):
        _, place = best_of(choice, ids, EXPERTS)
        mine = ids[None, :] == place[:, None]
        slot = tl.where(mine, k, slot)
        if LINE:
            line = table + place * LINE
            own = tl.load(line + 1 + token % tl.load(line))
            number = tl.where(mine, own[:, None], number)
            held = tl.where(ids[None, :] == own[:, None], k, held)
        choice = tl.where(mine, float("-inf"), choice)
    return slot, number, held


@triton.jit(do_not_specialize=["tokens", "places"])
def route_kernel(
    logits, bias, weights, experts, chunks, recorded, real, table, order, ends, tasks, count, tokens, places, scale,
    EXPERTS: tl.constexpr, HELD: tl.constexpr, LINE: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr,
    SIGMOID: tl.constexpr, BIASED: tl.constexpr, NORMALISED: tl.constexpr, RECORDS: tl.constexpr, PADDED: tl.constexpr,
    ORDERS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens. Scores that are no numbers count as the worst, so that there are always TOP_K experts."""
    token, ids = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (ids < EXPERTS)[None, :]
    wait_for_previous(DEPENDS)
    last = tl.load(real) if PADDED else tokens
    at = token[:, None].to(tl.int64) * EXPERTS + ids[None, :]
    scores = score_experts(tl.load(logits + at, mask=inside, other=float("-inf")), inside, SIGMOID)
    choice = scores
    if BIASED:
        choice += tl.load(bias + ids, mask=ids < EXPERTS, other=0.0)[None, :]
    choice = tl.where(choice > -3.0e38, choice, -3.0e38)
    choice = tl.where((ids < EXPERTS)[None, :], choice, float("-inf"))
    if GROUPS > 1:
        choice = keep_groups(choice, ids, GROUPS, EXPERTS // GROUPS, KEPT, BEST, EXPERTS)
    slot, number, held = choose_best(choice, ids, token, table, TOP_K, LINE, EXPERTS)
    within = (slot >= 0) & (token < tokens)[:, None]
    target = token[:, None].to(tl.int64) * TOP_K + slot
    chosen = within & (token < last)[:, None]
    slot = tl.where(chosen, slot, -1)
    if NORMALISED:
        factor = scale / (tl.sum(tl.where(chosen, scores, 0.0), 1) + 1e-20)
        scores = scores * factor[:, None]
    else:
        scores = scores * scale
    here = chosen & (number >= 0)
    tl.store(weights + target, tl.where(here, scores, 0.0), mask=within)
    tl.store(experts + target, tl.where(here, number, -1).to(tl.int64), mask=within)
    totals = tl.sum(chosen.to(tl.int32), 0)
    if RECORDS:
        tl.atomic_add(recorded + ids, totals.to(tl.int64), mask=(ids < EXPERTS) & (totals > 0), sem="relaxed")
    if LINE:
        slot = tl.where((token < tl.minimum(last, tokens))[:, None], held, -1)
        totals = tl.sum((slot >= 0).to(tl.int32), 0)
    if ORDERS:
        place_choices(slot, token, totals, tl.zeros_like(totals), ids, order, ends, tasks, count, places, ROWS, TOP_K,
                      HELD)  # fmt: skip
    else:
        tl.store(chunks + tl.program_id(0) * HELD + ids, totals, mask=ids < HELD)


@triton.jit(do_not_specialize=["tokens", "places"])
def order_kernel(
    experts, chunks, order, ends, tasks, count, tokens, places,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    SOME: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """The chunk of route_kernel's program of the same number, in its place after those before."""
    wait_for_previous(DEPENDS)
    mine, chunk_count = tl.program_id(0), tl.num_programs(0)
    token, ids, c = mine * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS), tl.arange(0, SOME)
    totals = tl.zeros([COLUMNS], tl.int32)
    before = tl.zeros([COLUMNS], tl.int32)
    for begin in range(0, chunk_count, SOME):
        chunk = begin + c
        there = (chunk < chunk_count)[:, None] & (ids < EXPERTS)[None, :]
        counts = tl.load(chunks + chunk[:, None] * EXPERTS + ids[None, :], mask=there, other=0)
        totals += tl.sum(counts, 0)
        before += tl.sum(tl.where((chunk < mine)[:, None], counts, 0), 0)
    slot = tl.full([TOKENS, COLUMNS], -1, tl.int32)
    for k in tl.static_range(TOP_K):
        chosen = tl.load(experts + token.to(tl.int64) * TOP_K + k, mask=token < tokens, other=-1).to(tl.int32)
        slot = tl.where(ids[None, :] == chosen[:, None], k, slot)
    place_choices(slot, token, totals, before, ids, order, ends, tasks, count, places, ROWS, TOP_K, EXPERTS)


def tokens_together(tokens: int, columns: int) -> int:
    """How many tokens one program takes: with their experts a number for each thread of a warp at least, as Triton 3.6
    cannot compile sums over fewer ("operand #0 does not dominate this use")."""
    return max(1, 32 // columns, min(triton.next_power_of_2(tokens), TILE // columns))


def route(
    logits: Tensor, bias: Tensor | None, routing: Routing, rows: int, counted: Tensor | None = None,
    real: Tensor | None = None, where: Places | None = None,
) -> Routed:  # fmt: skip
    """As `MoeOps.route`; with an Order for tasks of `rows` choices, or none where `rows` is 0."""
    held = routing.experts if where is None else where.held
    assert held <= routing.experts, f"{held} experts on one rank, which are copies of {routing.experts}"
    tokens, top_k, device = len(logits), routing.top_k, logits.device
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    experts = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    columns = triton.next_power_of_2(routing.experts)
    together = tokens_together(tokens, columns)
    chunk_count = triton.cdiv(tokens, together)
    places = task_places(tokens * top_k, held, rows) if rows else 0
    counts = (tokens * top_k, held, 3 * places, 1, chunk_count * held)
    aligned = [triton.cdiv(each, 4) * 4 for each in counts]  # for another alignment kernels would be compiled anew
    numbers = torch.empty(sum(aligned), dtype=torch.int32, device=device)
    parts = zip(numbers.split(aligned), counts, strict=True)
    choices, ends, tasks, count, chunks = (part[:each] for part, each in parts)
    if not tokens:
        numbers.zero_()
        return Routed(weights, experts, Order(choices, ends, tasks.view(3, places), count, rows) if rows else None)
    ordered = bool(rows) and chunk_count == 1
    sizes = {"TOP_K": top_k, "ROWS": rows, "TOKENS": together, "COLUMNS": columns}
    warps = max(1, min(8, together * columns // 512))
    route_kernel[(chunk_count,)](
        logits.contiguous(), logits if bias is None else bias, weights, experts, chunks,
        chunks if counted is None else counted, chunks if real is None else real,
        chunks if where is None else where.table, choices, ends, tasks, count, tokens, places, routing.scale,
        EXPERTS=routing.experts, HELD=held, LINE=0 if where is None else where.table.shape[1],
        GROUPS=routing.groups, KEPT=routing.kept_groups, BEST=routing.group_best,
        SIGMOID=routing.scoring == "sigmoid", BIASED=bias is not None, NORMALISED=routing.normalised,
        RECORDS=counted is not None, PADDED=real is not None, ORDERS=ordered, num_warps=warps, **sizes,
        **launch_dependents(logits),
    )  # fmt: skip
    if rows and not ordered:
        order_kernel[(chunk_count,)](
            experts, chunks, choices, ends, tasks, count, tokens, places, EXPERTS=held,
            SOME=max(1, min(triton.next_power_of_2(chunk_count), TILE // columns)), num_warps=warps, **sizes,
            **launch_dependents(logits),
        )  # fmt: skip
    return Routed(weights, experts, Order(choices, ends, tasks.view(3, places), count, rows) if rows else None)
