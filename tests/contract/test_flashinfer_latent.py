"""The FlashInfer backend of latent attention where there is no GPU: what it hands to FlashInfer's kernels, and what it
refuses.

`Absorbed` and `Ragged` stand for compiled modules. They compute attention in torch from the very lists that kernels
read.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.dense.reference import write_latents
from engine.layers import Batch, LatentShape
from engine.plugin import kernels
from engine.plugin.testing import LATENT_CASES, LatentCase, check_latent_attention, latent_reference
from engine_plugins.attention.flashinfer import mla as flashinfer
from engine_plugins.attention.flashinfer.mla import FlashInferLatentAttention
from engine_plugins.attention.triton import mla as triton_latent

pytest.importorskip("triton")
from engine.kernels.attention.reference import join_keys, list_pages

CPU = torch.device("cpu")
PROCESSORS = 12
MIXED = LatentCase(
    page_size=4, heads=2, rows=((9, 1), (0, 192), (40, 3), (300, 210), (5, 1), (0, 200), (30, 9)), dims=(64, 16, 16, 32)
)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(attention, logarithm to base 2) of one row, [n, heads, …] each."""
    scores = torch.einsum("nhd,mhd->nhm", query, key) * scale
    if causal:
        unseen = torch.ones(len(query), len(key), dtype=torch.bool).triu(len(key) - len(query) + 1)
        scores.masked_fill_(unseen[:, None], -torch.inf)
    return torch.einsum("nhm,mhd->nhd", scores.softmax(-1), value), scores.logsumexp(-1) / flashinfer.LN2


class Absorbed:
    """FlashInfer's plan and run of MLA, by their documentation."""

    def __init__(self) -> None:
        self.plans: list[dict[str, Any]] = []

    def plan(
        self, floats: Tensor, numbers: Tensor, pinned: Tensor, queries: Tensor, pages: Tensor, ends: Tensor,
        heads: int, dim: int, causal: bool,
    ) -> list[int]:  # fmt: skip
        assert len(queries) == len(pages) == len(ends) + 1 > 1
        assert {part.dtype for part in (queries, pages, ends)} == {torch.int32}
        pairs = int(queries[-1]) * heads // len(ends) > 64
        terms = {"queries": queries.clone(), "pages": pages.clone(), "ends": ends.clone(), "causal": causal}
        self.plans.append({**terms, "pairs": pairs, "heads": heads, "pinned": pinned.data_ptr()})
        pinned.view(torch.int64)[0] = len(self.plans) - 1
        numbers[: len(pinned)].copy_(pinned)
        return [1 + pairs, PROCESSORS // (1 + pairs)]

    def run(
        self, floats: Tensor, numbers: Tensor, info: list[int], query: Tensor, rotated: Tensor, latent: Tensor,
        rope: Tensor, pages: Tensor, out: Tensor, sums: None, mask: int, heads: int, page_size: int, scale: float,
        natural: bool, latent_scale: float, rope_scale: float,
    ) -> None:  # fmt: skip
        terms = self.plans[int(numbers.view(torch.int64)[0])]
        assert (mask, heads) == (terms["causal"], terms["heads"]) and info[0] == 1 + terms["pairs"]
        assert pages.dtype == torch.int32 and (latent_scale, rope_scale) == (1.0, 1.0)
        for row, end in enumerate(terms["ends"].tolist()):
            part = slice(*terms["queries"][row : row + 2].tolist())
            listed = pages[slice(*terms["pages"][row : row + 2].tolist())].long()
            if part.start == part.stop or not end:
                continue
            own = torch.cat((query[part], rotated[part]), dim=2)
            context = torch.cat((latent[listed], rope[listed]), dim=2).flatten(0, 1)[:end, None]
            key, value = (each.expand(-1, heads, -1) for each in (context, context[..., : latent.shape[2]]))
            out[part] = attend(own, key, value, scale, terms["causal"])[0]


class Ragged:
    """FlashInfer's plan and ragged_run of FA3."""

    def __init__(self) -> None:
        self.plans: list[tuple[bool, list[int], list[int]]] = []

    def plan(self, floats: Tensor, numbers: Tensor, pinned: Tensor, *terms: Any) -> Any:
        queries, keys, ends, total, rows, heads, kv_heads, page_size, captured, *_, causal, window = terms
        assert total == queries[-1] and rows == len(ends) and heads == kv_heads and torch.equal(keys.diff(), ends)
        assert (page_size, captured, window) == (1, False, -1) and len(numbers) == len(pinned)
        assert {part.dtype for part in (queries, keys, ends)} == {torch.int32}
        self.plans.append((causal, queries.tolist(), keys.tolist()))
        return queries.clone(), keys.clone(), causal

    def ragged_run(self, **given: Any) -> None:
        queries, keys, causal = given["plan_info_vec"]
        assert torch.equal(queries, given["qo_indptr"]) and torch.equal(keys, given["kv_indptr"])
        assert given["mask_mode"] == causal and given["k"].shape[0] == keys[-1] and given["q"].shape[0] == queries[-1]
        for row in range(len(queries) - 1):
            part, context = slice(*queries[row : row + 2].tolist()), slice(*keys[row : row + 2].tolist())
            given["o"][part], given["maybe_lse"][part] = attend(
                given["q"][part], given["k"][context], given["v"][context], given["sm_scale"], causal
            )


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Absorbed, Ragged]:
    """Makes the backend run on a CPU, as on a GPU of Hopper's kind with stand-ins for kernels."""
    made = (Absorbed(), Ragged())
    for name in ("check_dims", "check_installed"):
        monkeypatch.setattr(flashinfer, name, lambda *_: None)
    monkeypatch.setattr(triton_latent, "check_served", lambda *_, **__: None)
    monkeypatch.setattr(flashinfer, "hardware", lambda _: ((9, 0), PROCESSORS))
    monkeypatch.setattr(flashinfer, "kernel_name", lambda *_: "fa3")
    monkeypatch.setattr(flashinfer, "load_mla", lambda *_: made[0])
    monkeypatch.setattr(flashinfer, "load_ragged", lambda *_: made[1])
    monkeypatch.setitem(vars(kernels), "list_pages", list_pages)
    monkeypatch.setitem(vars(kernels), "join_keys", join_keys)
    monkeypatch.setattr(flashinfer, "PLAN_BYTES", 1024)
    monkeypatch.setattr(FlashInferLatentAttention, "few_rows", 0)
    return made


@pytest.mark.parametrize("case", [*LATENT_CASES, MIXED], ids=str)
def test_latent_attention_is_that_of_the_definition(modules: tuple[Absorbed, Ragged], case: LatentCase) -> None:
    check_latent_attention(FlashInferLatentAttention, case)


def test_a_launch_has_no_more_tiles_than_a_plan_has_room_for(
    modules: tuple[Absorbed, Ragged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashinfer, "TILES", 3)
    check_latent_attention(FlashInferLatentAttention, LATENT_CASES[3])
    assert [plan["queries"].tolist() for plan in modules[0].plans[-2:]] == [[0, 9, 10], [0, 5, 6, 7]]


def test_expanded_rows_are_planned_with_what_is_cached_before_them(
    modules: tuple[Absorbed, Ragged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlashInferLatentAttention, "chunk_tokens", 200)
    check_latent_attention(FlashInferLatentAttention, MIXED)
    own, *prefixes = modules[1].plans[-3:]
    assert own == (True, [0, 192, 402, 602], [0, 192, 402, 602])
    assert prefixes == [(False, [0, 210], [0, 200]), (False, [0, 210], [0, 100])]


class Captured:
    """A backend of 3 slots over random pages, and one static batch of `rows` rows in `tokens` tokens."""

    def __init__(self, rows: int, tokens: int, heads: int) -> None:
        self.shape = LatentShape(
            layers=1, query_heads=heads, latent_dim=32, rope_dim=16, key_dim=16, value_dim=16, scale=0.2
        )
        self.backend = FlashInferLatentAttention(self.shape, 4, CPU, torch.float32)
        generator = torch.Generator().manual_seed(rows)
        self.contexts = torch.randn(3, 80, 48, generator=generator)
        self.query = torch.randn(tokens, heads, 32, generator=generator)
        self.up = torch.randn(heads, 32, 32, generator=generator) * 32**-0.5
        self.table = torch.randperm(60, generator=generator).to(torch.int32).view(3, 20)
        self.cache = torch.empty(60, 4, 48)
        places = (self.table.long()[..., None] * 4 + torch.arange(4)).flatten()
        write_latents(self.contexts.flatten(0, 1), self.cache, places)
        self.slots = torch.zeros(rows, dtype=torch.int64)
        nothing, empty = torch.zeros(0, dtype=torch.int64), np.empty(0, np.int64)
        self.batch = Batch(
            ids=torch.zeros(tokens, dtype=torch.int64), positions=nothing, places=nothing, page_table=self.table,
            slots=self.slots, row_starts=nothing, row_offsets=nothing, starts=empty, lengths=empty,
            offsets=empty, caches=(),
        )  # fmt: skip

    def check(self, plan: Any, rows: list[tuple[int, int, int]]) -> None:
        """`rows` are (slot, start, length)."""
        out = self.backend.forward(self.query, self.contexts[0, :0], self.up, self.cache, plan)
        first = 0
        for slot, start, length in rows:
            part = slice(first, first + length)
            wanted = latent_reference(self.query[part], self.contexts[slot, : start + length], self.up, self.shape)
            assert (out[part] - wanted).abs().max() < 1e-5
            first += length


@pytest.mark.parametrize("heads", [16, 80])
def test_a_captured_decode_step_follows_its_numbers(modules: tuple[Absorbed, Ragged], heads: int) -> None:
    step = Captured(3, 3, heads)
    plan = step.backend.capture(step.batch)
    addresses = [tensor.data_ptr() for tensor in (plan.launch.pages, plan.launch.numbers, plan.offsets.device)]
    for slots, starts in (((0, 1, 2), (0, 0, 0)), ((2, 0, 1), (79, 3, 4)), ((1, 2, 2), (5, 0, 0))):
        step.slots.copy_(torch.tensor(slots))
        step.backend.refill(plan, np.array(slots), np.array(starts))
        step.check(plan, [(slot, start, 1) for slot, start in zip(slots, starts, strict=True)])
    tensors = (plan.launch.pages, plan.launch.numbers, plan.offsets.device)
    assert addresses == [tensor.data_ptr() for tensor in tensors]
    assert {plan["pairs"] for plan in modules[0].plans} == {heads > 64}


def test_captured_decode_steps_of_a_few_rows_are_tritons(
    modules: tuple[Absorbed, Ragged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlashInferLatentAttention, "few_rows", 2)
    for rows, few in ((2, True), (3, False)):
        step = Captured(rows, rows, 16)
        plan = step.backend.capture(step.batch)
        assert isinstance(plan, triton_latent.Plan) is few
        step.backend.refill(plan, np.zeros(rows, np.int64), np.zeros(rows, np.int64))
        assert len(modules[0].plans) == (not few)
        assert not isinstance(step.backend.capture_prompts(step.batch), triton_latent.Plan)


@pytest.mark.parametrize("heads", [16, 80])
def test_a_captured_step_with_prompts_leaves_its_empty_rows_out_and_its_grid_as_it_is(
    modules: tuple[Absorbed, Ragged], heads: int
) -> None:
    step = Captured(3, 12, heads)
    plan = step.backend.capture_prompts(step.batch)
    nothing = np.empty(0, np.int64)
    step.backend.refill_prompts(plan, nothing, nothing, np.zeros(1, np.int64))
    step.check(plan, [])
    for rows in ([(2, 3, 6), (0, 10, 1)], [(1, 0, 12)], [(0, 79, 1), (2, 0, 1)]):
        slots, starts, lengths = (np.array(part) for part in zip(*rows, strict=True))
        step.slots[: len(rows)] = torch.from_numpy(slots)
        step.backend.refill_prompts(plan, starts, lengths, np.concatenate(([0], np.cumsum(lengths))))
        step.check(plan, rows)
    assert {plan["pairs"] for plan in modules[0].plans} == {heads > 64}


@pytest.mark.parametrize("steps", [2, 5])
def test_plans_of_steps_under_way_do_not_share_pinned_memory(
    modules: tuple[Absorbed, Ragged], monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(FlashInferLatentAttention, "steps_in_flight", steps)
    step = Captured(1, 1, 16)
    plan = step.backend.capture(step.batch)
    for start in range(steps):
        step.backend.refill(plan, np.zeros(1, np.int64), np.array([start]))
    assert len({plan["pinned"] for plan in modules[0].plans}) == steps


@pytest.mark.parametrize(
    ("terms", "device", "dtype", "said"),
    [
        ({}, "cpu", torch.bfloat16, "runs on GPUs, not on cpu"),
        ({"latent_dim": 256}, "cuda", torch.bfloat16, r"latents of 512 \+ 64 numbers, not 256 \+ 64"),
        ({}, "cuda", torch.float32, "bfloat16 or float16.*not torch.float32"),
        ({"kv_dtype": torch.float8_e5m2}, "cuda", torch.bfloat16, "not torch.float8_e5m2 for torch.bfloat16"),
    ],
)
def test_what_it_cannot_serve_is_refused(terms: dict, device: str, dtype: torch.dtype, said: str) -> None:
    usual = {"layers": 1, "query_heads": 4, "latent_dim": 512, "rope_dim": 64, "key_dim": 128, "value_dim": 128}
    with pytest.raises(ConfigError, match=said):
        FlashInferLatentAttention(LatentShape(**{**usual, "scale": 1.0, **terms}), 16, torch.device(device), dtype)


def test_gpus_and_caches_that_the_kernels_are_not_for_are_refused() -> None:
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    assert flashinfer.kernel_name((9, 0), bf16, fp8) == "fa3"
    assert flashinfer.kernel_name((8, 0), bf16, bf16) == flashinfer.kernel_name((10, 0), bf16, bf16) == "fa2"
    for capability, dtype, kv_dtype in (((7, 5), bf16, bf16), ((8, 9), bf16, fp8), ((9, 0), torch.float16, fp8)):
        with pytest.raises(ConfigError, match="latent attention flashinfer"):
            flashinfer.kernel_name(capability, dtype, kv_dtype)
