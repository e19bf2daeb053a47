"""The FlashInfer backend where there is no GPU: what it hands to FlashInfer's kernels, and what it refuses.

`Definition` stands for a compiled module. It computes attention in torch from the very lists that the kernels read.
"""

import threading
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.layers import AttentionShape, Batch
from engine.plugin import kernels
from engine.plugin.testing import ATTENTION_CASES, AttentionCase, check_attention
from engine_plugins.attention.flashinfer import mha as flashinfer
from engine_plugins.attention.flashinfer import modules as installed
from engine_plugins.attention.flashinfer.mha import FlashInferAttention

pytest.importorskip("triton")
from engine.kernels.attention.reference import list_pages

CPU = torch.device("cpu")
MIXED = AttentionCase(page_size=4, heads=(8, 2), head_dim=64, rows=((9, 1), (30, 1), (0, 300), (7, 1), (5, 140)))


class Definition:
    """FlashInfer's plan and paged_run, by their documentation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.plans: list[dict[str, Any]] = []

    def plan(self, floats: Tensor, numbers: Tensor, pinned: Tensor, *rest: Any) -> dict[str, Any]:
        names = ("queries", "pages", "ends", "most", "rows", "query_heads", "kv_heads", "page_size", "captured")
        names += ("head_dim", "value_dim", "causal", "window_left")
        terms = dict(zip(names, rest, strict=False))
        assert len(rest) == len(names) + 3 * (self.name == "fa2")
        for name in ("queries", "pages", "ends"):
            assert terms[name].dtype == torch.int32 and len(terms[name]) == terms["rows"] + (name != "ends")
            terms[name] = terms[name].clone()
        assert terms["queries"][-1] <= terms["most"]
        self.plans.append(terms)
        return terms

    def paged_run(self, **given: Any) -> None:
        terms, out = given["plan_info_vec"], given["o"]
        queries, pages, ends = (terms[name].tolist() for name in ("queries", "pages", "ends"))
        assert given["qo_indptr"].tolist() == queries and given["paged_kv_indptr"].tolist() == pages
        assert given["mask_mode"] == terms["causal"] and given["window_left"] == terms["window_left"]
        for row in range(terms["rows"]):
            query = given["q"][queries[row] : queries[row + 1]]
            if not len(query):
                continue
            listed = given["paged_kv_indices"][pages[row] : pages[row + 1]].long()
            length = (len(listed) - 1) * terms["page_size"] + int(given["paged_kv_last_page_len"][row])
            assert length == ends[row]
            position = torch.arange(length - len(query), length) if terms["causal"] else torch.full((len(query),), 1e9)
            first = torch.arange(length - len(query), length) - terms["window_left"]
            seen = torch.arange(length) <= position[:, None]
            if terms["window_left"] >= 0:
                seen &= torch.arange(length) >= first[:, None]
            group = terms["query_heads"] // terms["kv_heads"]
            key, value = (
                given[part][listed].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
                for part in ("paged_k_cache", "paged_v_cache")
            )
            scores = torch.einsum("qhd,khd->hqk", query, key) * given["sm_scale"]
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[queries[row] : queries[row + 1]] = torch.einsum("hqk,khd->qhd", weights, value)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Definition]:
    return stand_in(monkeypatch)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Definition]:
    """Makes the backend run on a CPU, as on a GPU of Hopper's kind with `Definition`s for kernels."""
    made = {name: Definition(name) for name in ("fa2", "fa3")}

    def load(names: list[str], *terms: Any, **others: Any) -> dict[str, flashinfer.Kernel]:
        return {name: flashinfer.Kernel(name, made[name]) for name in names}

    monkeypatch.setattr(flashinfer, "check_served", lambda *_: None)
    monkeypatch.setattr(flashinfer, "check_installed", lambda: None)
    monkeypatch.setattr(flashinfer, "hardware", lambda _: ((9, 0), 12))
    monkeypatch.setattr(flashinfer, "load_kernels", load)
    monkeypatch.setitem(vars(kernels), "list_pages", list_pages)
    for name in ("PLAN_BYTES", "FLOAT_BYTES"):
        monkeypatch.setattr(flashinfer, name, 1024)
    return made


@pytest.mark.parametrize("case", [*ATTENTION_CASES, MIXED], ids=str)
def test_attention_is_that_of_the_definition(modules: dict[str, Definition], case: AttentionCase) -> None:
    check_attention(FlashInferAttention, case)


def test_decode_rows_and_prompts_get_the_kernels_that_suit_them(modules: dict[str, Definition]) -> None:
    check_attention(FlashInferAttention, MIXED)
    step = [(plan["rows"], plan["causal"]) for plan in modules["fa2"].plans]
    assert (2, False) in step and (3, True) not in step  # two decode rows; the rest has enough tiles for FA3
    assert [plan["queries"].tolist() for plan in modules["fa3"].plans if plan["rows"] == 3] == 2 * [[0, 300, 301, 441]]
    small = AttentionCase(page_size=4, heads=(8, 2), head_dim=64, rows=((9, 5),))
    before = len(modules["fa3"].plans)
    check_attention(FlashInferAttention, small)
    assert len(modules["fa3"].plans) == before


class Captured:
    """A backend of 3 slots over random pages, and one static batch of `rows` rows in `tokens` tokens."""

    def __init__(self, rows: int, tokens: int) -> None:
        self.shape = AttentionShape(layers=1, query_heads=4, kv_heads=2, head_dim=64, scale=0.125)
        self.backend = FlashInferAttention(self.shape, 4, CPU, torch.float32)
        generator = torch.Generator().manual_seed(rows)
        self.cache = torch.randn(60, 2, 4, 2, 64, generator=generator)
        self.query = torch.randn(tokens, 4, 64, generator=generator)
        self.table = torch.randperm(60, generator=generator).to(torch.int32).view(3, 20)
        self.slots = torch.zeros(rows, dtype=torch.int64)
        nothing, empty = torch.zeros(0, dtype=torch.int64), np.empty(0, np.int64)
        self.batch = Batch(
            ids=torch.zeros(tokens, dtype=torch.int64), positions=nothing, places=nothing, page_table=self.table,
            slots=self.slots, row_starts=nothing, row_offsets=nothing, starts=empty, lengths=empty,
            offsets=empty, caches=(),
        )  # fmt: skip

    def wanted(self, token: int, slot: int, position: int) -> Tensor:
        key, value = self.cache[self.table[slot].long()].transpose(0, 1).flatten(1, 2)[:, : position + 1]
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        scores = torch.einsum("hd,khd->hk", self.query[token], key) * self.shape.scale
        return torch.einsum("hk,khd->hd", scores.softmax(-1), value).flatten()


def test_a_captured_decode_step_follows_its_numbers(modules: dict[str, Definition]) -> None:
    step = Captured(3, 3)
    plan = step.backend.capture(step.batch)
    assert plan is not None
    lists = plan.launch.lists
    tensors = (plan.launch.pages, plan.launch.numbers, lists.queries, lists.pages, lists.last)
    addresses = [tensor.data_ptr() for tensor in tensors]
    for slots, starts in (((0, 1, 2), (0, 0, 0)), ((2, 0, 1), (79, 3, 4)), ((1, 2, 2), (5, 0, 0))):
        step.slots.copy_(torch.tensor(slots))
        step.backend.refill(plan, np.array(slots), np.array(starts))
        out = step.backend.attend(step.query, step.cache, plan)
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            assert (out[row] - step.wanted(row, slot, start)).abs().max() < 1e-5
    lists = plan.launch.lists
    tensors = (plan.launch.pages, plan.launch.numbers, lists.queries, lists.pages, lists.last)
    assert addresses == [tensor.data_ptr() for tensor in tensors]
    assert all(terms["captured"] and terms["most"] == 3 for terms in modules["fa2"].plans)


def test_a_captured_step_with_prompts_leaves_its_empty_rows_out(modules: dict[str, Definition]) -> None:
    step = Captured(3, 12)
    plan = step.backend.capture_prompts(step.batch)
    assert plan is not None
    step.backend.refill_prompts(plan, *2 * [np.empty(0, np.int64)], np.zeros(1, np.int64))
    step.backend.attend(step.query, step.cache, plan)
    step.slots.copy_(torch.tensor((2, 0, 0)))
    step.backend.refill_prompts(plan, np.array((3, 10)), np.array((6, 1)), np.array((0, 6, 7)))
    out = step.backend.attend(step.query, step.cache, plan)
    for token, slot, position in ((0, 2, 3), (5, 2, 8), (6, 0, 10)):
        assert (out[token] - step.wanted(token, slot, position)).abs().max() < 1e-5


def test_steps_with_many_rows_or_tokens_are_not_captured(
    modules: dict[str, Definition], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `prepare` gives rows of one token, or large prompts on Hopper, kernels of their own."""
    step = Captured(65, 128)
    assert step.backend.capture_prompts(step.batch) is None and step.backend.capture(step.batch) is not None
    assert step.backend.most_graph_tokens == 1024
    monkeypatch.setattr(flashinfer, "hardware", lambda _: ((8, 0), 12))
    assert FlashInferAttention(step.shape, 4, CPU, torch.float32).most_graph_tokens > 1 << 20


@pytest.mark.parametrize("steps", [2, 5])
def test_plans_of_steps_under_way_do_not_share_pinned_memory(
    modules: dict[str, Definition], monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(FlashInferAttention, "steps_in_flight", steps)
    step, seen, turns = Captured(1, 1), [], 2 * steps
    plan = step.backend.capture(step.batch)
    original = modules["fa2"].plan
    modules["fa2"].plan = lambda *given: (seen.append(given[2].data_ptr()), original(*given))[1]  # type: ignore[method-assign]
    for start in range(turns):
        step.backend.refill(plan, np.zeros(1, np.int64), np.array([start]))
    assert len(set(seen)) == turns


def test_the_workspace_holds_what_flashinfer_plans_for() -> None:
    shape = AttentionShape(layers=1, query_heads=32, kv_heads=8, head_dim=128, scale=1.0)
    assert flashinfer.tile_size(256, 256, shape) == 16 and flashinfer.tile_size(1088, 64, shape) == 128
    assert flashinfer.padded_tiles(1, 1, shape, 132) == 33  # two blocks a processor, for 8 key heads
    assert flashinfer.padded_tiles(256, 256, shape, 132) == 64 + 255
    assert flashinfer.float_bytes(256, 256, shape, 132) == 319 * 16 * 32 * 129 * 4 + 64


@pytest.mark.parametrize(
    ("terms", "device", "dtype", "said"),
    [
        ({}, "cpu", torch.bfloat16, "runs on GPUs, not on cpu"),
        ({"head_dim": 96}, "cuda", torch.bfloat16, "head sizes of 64, 128 and 256, not 96"),
        ({}, "cuda", torch.float32, "bfloat16 or float16.*not torch.float32"),
        ({"kv_dtype": torch.float8_e5m2}, "cuda", torch.bfloat16, "not torch.float8_e5m2 for torch.bfloat16"),
    ],
)
def test_what_it_cannot_serve_is_refused(terms: dict, device: str, dtype: torch.dtype, said: str) -> None:
    shape = AttentionShape(**{"layers": 1, "query_heads": 4, "kv_heads": 2, "head_dim": 64, "scale": 1.0, **terms})
    with pytest.raises(ConfigError, match=said):
        FlashInferAttention(shape, 16, torch.device(device), dtype)


def test_a_missing_or_other_version_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionShape(layers=1, query_heads=4, kv_heads=2, head_dim=64, scale=1.0)

    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    for version, said in ((missing, "needs the package"), (lambda _: "0.2.0", "not 0.2.0: pip install")):
        monkeypatch.setattr(metadata, "version", version)
        with pytest.raises(ConfigError, match=said):
            FlashInferAttention(shape, 16, torch.device("cuda"), torch.bfloat16)


def test_what_cannot_be_compiled_is_refused_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {"fa2": SimpleNamespace(name="batch_prefill")}
    monkeypatch.setattr(installed, "has_nvcc", lambda: False)
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    with pytest.raises(ConfigError, match="compile batch_prefill, and there is no nvcc"):
        installed.compile_modules(specs)
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    with pytest.raises(ConfigError, match="batch_prefill is not compiled, and FLASHINFER_DISABLE_JIT"):
        installed.compile_modules(specs)


def test_modules_compile_at_the_same_time_where_their_loads_look_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    together, built = threading.Barrier(2, timeout=30), []

    def spec(name: str) -> SimpleNamespace:
        def build(verbose: bool) -> None:
            together.wait()
            built.append(name)

        return SimpleNamespace(name=name, build=build)

    monkeypatch.setattr(installed, "has_nvcc", lambda: True)
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr(installed, "import_module", lambda _: SimpleNamespace(FLASHINFER_JIT_DIR="/cache"))
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    installed.compile_modules({name: spec(name) for name in ("fa2", "fa3")})
    assert sorted(built) == ["fa2", "fa3"]


def test_modules_that_are_missing_are_compiled_together_before_all_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def module(name: str, compiled: bool) -> installed.Module:
        def describe(*terms: Any) -> SimpleNamespace:
            assert terms == (name, 64)
            return SimpleNamespace(name=f"described {name}", is_compiled=compiled)

        return installed.Module(describe, lambda *terms: done.append(terms) or f"loaded {name}", (name, 64))

    monkeypatch.setattr(installed, "compile_modules", lambda specs: done.append([*specs]))
    wanted = {name: module(name, name == "there") for name in ("there", "fa2", "fa3")}
    assert installed.load_modules("b", wanted) == {name: f"loaded {name}" for name in wanted}
    assert done == [["fa2", "fa3"], ("there", 64), ("fa2", 64), ("fa3", 64)]
    done.clear()
    installed.load_modules("b", {"there": wanted["there"]})
    assert done == [("there", 64)]


def test_a_module_that_does_not_load_is_refused_in_the_name_of_its_backend() -> None:
    def broken(*_: Any) -> Any:
        raise OSError("undefined symbol")

    wanted = {"fa2": installed.Module(lambda *_: SimpleNamespace(is_compiled=True), broken, ())}
    with pytest.raises(ConfigError, match=r"^latent attention flashinfer: undefined symbol"):
        installed.load_modules("latent attention flashinfer", wanted)
