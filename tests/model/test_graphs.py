"""Steps as CUDA graphs, without a GPU: a stand-in for a graph computes anew from what the replay put in place."""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from oracle import tiny
from plain_attention import PlainAttention, captured
from torch import Tensor

from engine.layers.attention import Prefix
from engine.layers.batch import Mirror
from engine.messages.questions import CountAction
from engine.params.sampling import Sampling
from engine.plugin.testing import ModelHarness
from engine.worker.experts import ExpertWatch, routers_of
from engine.worker.steps import graphs
from engine.worker.steps.graphs import (
    FEW_ROWS_TOKENS,
    DecodeGraphs,
    PromptGraphs,
    Tables,
    most_prompt_tokens,
    prompt_graphs,
    shared_ladder,
)
from engine.worker.steps.rows import Rows
from engine_plugins.models.llama import Llama
from engine_plugins.models.qwen3_moe import Qwen3Moe

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


@pytest.fixture(params=["dense", "mixture"])
def harness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModelHarness:
    """Three prompts on a device whose last page is the scratch page."""
    monkeypatch.setattr(graphs, "captured", captured)
    built = dense() if request.param == "dense" else mixture()
    built.order = built.order[built.order != built.each * built.slots - 1][: built.each * 3]
    built.order = np.concatenate((built.order, built.order[: built.each]))  # slot 3 is not used
    prompts = [np.random.default_rng(slot).integers(0, 40, 30).tolist() for slot in range(3)]
    built.runner.apply(built.admit(prompts))
    built.runner.page_table[-1] = built.each * built.slots - 1
    return built


def mixture() -> ModelHarness:
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
    config, tensors, _ = tiny("Qwen3Moe", **experts, num_attention_heads=4)
    return ModelHarness(Qwen3Moe, config, tensors, attention=PlainAttention)


def dense() -> ModelHarness:
    generator = torch.Generator().manual_seed(0)
    names = {f"{part}_proj.weight" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")}
    shapes = dict.fromkeys(names, (32, 32)) | dict.fromkeys(
        ("self_attn.k_proj.weight", "self_attn.v_proj.weight"), (16, 32)
    )
    shapes |= {"mlp.gate_proj.weight": (48, 32), "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48)}
    shapes |= dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (32,))
    whole = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    whole |= {"model.embed_tokens.weight": (40, 32), "lm_head.weight": (40, 32), "model.norm.weight": (32,)}
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in whole.items()}
    return ModelHarness(Llama, CONFIG, tensors, attention=PlainAttention)


def tables(harness: ModelHarness) -> Tables:
    runner = harness.runner
    real = bool(routers_of(runner.model))
    return Tables(runner.model, runner.caches, runner.tokens, runner.page_table, runner.page_size, counts_real=real)


def test_numbers_that_were_sent_stay_while_the_next_are_written() -> None:
    mirror = Mirror(3, torch.device("cpu"))
    mirror.host()[:] = 5
    mirror.send()
    mirror.host()[1] = 7
    assert mirror.device.tolist() == [5, 5, 5]
    mirror.send()
    assert mirror.device.tolist() == [5, 7, 5]


@torch.inference_mode()
def test_a_replayed_decode_step_is_the_step(harness: ModelHarness) -> None:
    decode = DecodeGraphs(tables(harness))
    assert not decode.fits(Rows.of(np.array([[0, 9, 1, 1]])))
    assert decode.capture(4, pool=None)
    harness.logits([(slot, 0, 30) for slot in range(3)])
    for step in ([(1, 9)], [(2, 29), (0, 4)], [(0, 17), (2, 0), (1, 28)]):
        rows = Rows.of(np.array([(slot, position, 1, 1) for slot, position in step]))
        assert decode.fits(rows)
        hidden, on_device = decode.replay(rows)
        assert on_device.T.tolist() == [list(each) for each in step]
        expected, _ = harness.runner.compute(rows)
        assert torch.allclose(hidden, expected, atol=1e-5)
    assert not decode.draws
    assert not decode.fits(Rows.of(np.array([[0, 9, 2, 1]]))) and not decode.fits(Rows.of(np.zeros((5, 4), np.int64)))


@torch.inference_mode()
def test_tokens_are_drawn_by_a_second_graph(harness: ModelHarness) -> None:
    drawn: list[list[int]] = []

    def draw(hidden: Tensor, on_device: Tensor, lines: Tensor | None) -> Tensor:
        drawn.append(on_device.T.tolist())
        return harness.runner.model.logits(hidden).argmax(-1) + (0 if lines is None else 100 * lines)

    decode = DecodeGraphs(dataclasses.replace(tables(harness), draw=draw, masks=True))
    assert decode.capture(4, pool=None)
    harness.logits([(slot, 0, 30) for slot in range(3)])
    rows = Rows.of(np.array([(2, 29, 1, 1), (0, 4, 1, 1), (1, 11, 1, 1)]))
    hidden, _ = decode.replay(rows)
    tokens = harness.runner.model.logits(hidden).argmax(-1)
    assert decode.draws and torch.equal(decode.draw(3, None), tokens)
    assert torch.equal(decode.draw(3, np.array([4, 1, 2])), tokens + 100 * torch.tensor([4, 1, 2]))
    scratch = len(harness.runner.tokens) - 1
    assert drawn[-1] == [[2, 29], [0, 4], [1, 11], [scratch, 0]]


@torch.inference_mode()
def test_a_replayed_step_with_prompts_is_the_step(harness: ModelHarness) -> None:
    prompts = PromptGraphs(tables(harness), 5, FEW_ROWS_TOKENS)
    assert prompts.capture(64, pool=None)
    for step in ([(0, 0, 11)], [(1, 0, 7), (0, 11, 1), (2, 0, 20)], [(1, 7, 3), (2, 20, 2)], [(0, 0, 30), (1, 0, 30)]):
        rows = Rows.of(np.array([(*row, 1) for row in step]))
        assert prompts.fits(rows)
        hidden, offsets = prompts.replay(rows)
        expected, batch = harness.runner.compute(rows)
        assert offsets.tolist() == batch.offsets.tolist()
        assert torch.allclose(hidden, expected, atol=1e-5)
    assert not prompts.fits(Rows.of(np.array([(0, 0, 65, 1)]))), "too many tokens"
    assert not prompts.fits(Rows.of(np.array([(0, 0, 1, 1)] * 5))), "no row is left to be the empty one"


@torch.inference_mode()
@pytest.mark.parametrize("harness", ["dense"], indirect=True)
def test_sizes_that_a_backend_cannot_capture_are_left_to_larger_ones(
    harness: ModelHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where none is larger, to the way without a graph."""
    capture = PlainAttention.capture_prompts
    refused = {32, 64}
    monkeypatch.setattr(
        PlainAttention,
        "capture_prompts",
        lambda self, batch: None if len(batch.ids) in refused else capture(self, batch),
    )
    prompts = PromptGraphs(tables(harness), 5, (16, 32, 48, 64))
    assert prompts.capture(64, pool=None)
    rows = Rows.of(np.array([(0, 0, 20, 1), (1, 0, 5, 1)]))
    hidden, _ = prompts.replay(rows)
    assert torch.allclose(hidden, harness.runner.compute(rows)[0], atol=1e-5)
    assert prompts.fits(Rows.of(np.array([(0, 0, 48, 1)]))) and not prompts.fits(Rows.of(np.array([(0, 0, 49, 1)])))
    assert prompts.capture(40, pool=None), "steps have no more tokens: that is the last size"
    assert prompts.fits(Rows.of(np.array([(0, 0, 40, 1)]))) and not prompts.fits(Rows.of(np.array([(0, 0, 41, 1)])))
    assert not prompts.capture(15, pool=None), "too few for any"
    refused |= {16, 48}
    assert not PromptGraphs(tables(harness), 5, (16, 32, 48, 64)).capture(64, pool=None)


@pytest.mark.parametrize("harness", ["dense"], indirect=True)
def test_small_models_have_graphs_of_larger_prompts(harness: ModelHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bytes_of_a_layer = harness.runner.model, 42_600_000  # Qwen3-0.6B
    monkeypatch.setattr(graphs, "weight_bytes", lambda _: 2 * bytes_of_a_layer)
    assert 8192 < most_prompt_tokens(model) < 10_000
    bytes_of_a_layer = 502_000_000  # Llama-3.1-8B
    assert most_prompt_tokens(model) == 1024
    monkeypatch.setattr(PlainAttention, "most_graph_tokens", 512)
    assert most_prompt_tokens(model) == 512


@torch.inference_mode()
@pytest.mark.parametrize("harness", ["dense"], indirect=True)
def test_a_runner_captures_what_its_steps_can_be(harness: ModelHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 slots of 64 positions: no more tokens than those, nor than a step has."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("engine.worker.runner.LEAST_ROWS", 2)
    runner = harness.runner
    runner.decode_graphs = DecodeGraphs(tables(harness))
    assert runner.capture(harness.each * harness.slots - 1)
    few, others = runner.prompt_graphs
    assert (few.most, others.most, runner.decode_graphs.most) == (256, 0, 4), "few rows have graphs of so many tokens"
    assert runner.prefixes is not None
    assert runner.capture(harness.each * harness.slots - 1, shares=False, step_tokens=100)
    rows = Rows.of(np.array([(slot, 0, 30, 1) for slot in range(3)]))
    assert few.most == 100 and few.fits(rows) and not others.fits(rows)
    hidden = runner.forward(rows).hidden
    assert torch.allclose(hidden, runner.compute(rows)[0], atol=1e-5)


@pytest.mark.parametrize("harness", ["dense"], indirect=True)
def test_many_slots_have_graphs_for_all_of_them(harness: ModelHarness) -> None:
    """Fewer have those of larger steps alone, which they share with few rows."""
    made = tables(harness)
    wide = dataclasses.replace(made, tokens=made.tokens[:1].expand(graphs.FEW_ROWS + 1, -1))
    for each, first in ((made, 1280), (wide, 256)):
        few, others = prompt_graphs(each)
        assert few._tokens[0] == 32 and others._tokens[0] == first and others._rows == each.scratch + 1


@torch.inference_mode()
def test_prompts_of_many_requests_are_written_at_once(harness: ModelHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each where it belongs, an empty one nowhere, a long one by itself; what lies beyond a shorter one stays."""
    runner, before = harness.runner, harness.runner.tokens.clone()
    monkeypatch.setattr("engine.worker.steps.admits.SHORT_PROMPT", 3)
    runner.apply(harness.admit([[7, 8, 9], [], [5], [1, 2, 3, 4]]))
    before[0, :3], before[2, 0], before[3, :4] = torch.tensor([7, 8, 9]), 5, torch.tensor([1, 2, 3, 4])
    assert torch.equal(runner.tokens, before)


@pytest.mark.parametrize("harness", ["dense"], indirect=True)
@pytest.mark.parametrize("rows", [0, 1])
def test_how_tokens_are_drawn_is_told_once_the_model_is_on_its_way(
    harness: ModelHarness, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Of a plan without rows too, and before anybody asks."""
    runner, order = harness.runner, []

    def watched(name: str) -> Callable[..., Any]:
        inner = getattr(runner, name)

        def call(*given: Any) -> Any:
            order.append(name)
            return inner(*given)

        return call

    for name in ("apply", "forward", "admit", "head"):
        monkeypatch.setattr(runner, name, watched(name))
    plan = harness.admit([[7, 8, 9]])
    (admit,) = plan.admits
    hot = msgspec.structs.replace(admit, sampling=Sampling(0.5, 3, 1.0, 0.0, 7))
    numbers = (np.full(rows, number, "<i4").tobytes() for number in (0, 0, 3, 1))
    columns = dict(zip(("slots", "starts", "lengths", "yields"), numbers, strict=True))
    step = runner.launch(msgspec.structs.replace(plan, admits=(hot,), **columns))
    assert order == (["apply", "forward", "admit", "head"] if rows else ["apply", "admit"])
    assert len(step.result.tokens) == rows
    assert (runner.sampler.columns.temperature[0], runner.sampler.columns.top_k[0]) == (0.5, 3)


@torch.inference_mode()
@pytest.mark.parametrize("harness", ["mixture"], indirect=True)
def test_padding_chooses_no_experts(harness: ModelHarness) -> None:
    """Neither that of rows nor that of tokens, and what is not replayed has none."""
    watch = ExpertWatch(harness.runner.model)

    def chosen(action: CountAction) -> list[int]:
        counts = watch.count(action).counts
        return np.frombuffer(counts, "<i8").reshape(3, 8).sum(axis=1).tolist()

    decode, prompts = DecodeGraphs(tables(harness)), PromptGraphs(tables(harness), 5, FEW_ROWS_TOKENS)
    assert decode.capture(4, pool=None) and prompts.capture(64, pool=None)
    assert chosen("start") == [0, 0, 0]
    decode.replay(Rows.of(np.array([[0, 9, 1, 1], [1, 9, 1, 1], [2, 9, 1, 1]])))
    assert chosen("look") == [3 * 3] * 3
    prompts.replay(Rows.of(np.array([[0, 0, 11, 1], [1, 0, 7, 1]])))
    assert chosen("look") == [(3 + 18) * 3] * 3
    harness.runner.compute(Rows.of(np.array([[0, 0, 11, 1]])))
    assert chosen("stop") == [(3 + 18 + 11) * 3] * 3


@torch.inference_mode()
def test_a_step_with_shared_prefixes_has_a_graph_that_is_told_of_them(harness: ModelHarness) -> None:
    shared = DecodeGraphs(tables(harness), shared=True)
    assert shared.capture(4, pool=None) and shared_ladder(256) == [16, 32, 64, 128, 192, 256]
    harness.logits([(slot, 0, 30) for slot in range(3)])
    rows, prefixes = Rows.of(np.array([(0, 17, 1, 1), (2, 9, 1, 1)])), (Prefix(np.array([0, 1]), 8),)
    hidden, _ = shared.replay(rows, prefixes)
    assert torch.allclose(hidden, harness.runner.compute(rows)[0], atol=1e-5)
    assert [plan["prefixes"] for plan in shared._graphs[4].plans] == [prefixes]


def test_nothing_is_collected_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """To free another graph meanwhile, an earlier runner's, would end the capture."""
    capturing = False
    seen = []

    @contextmanager
    def capture(graph: Any, **terms: Any) -> Iterator[None]:
        nonlocal capturing
        capturing = True
        yield
        capturing = False

    def run() -> Tensor:
        seen.append((capturing, gc.isenabled()))
        if failing and capturing:
            raise ValueError
        return torch.ones(1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    failing = False
    graphs.captured(run, None)
    assert seen == [(False, True), (True, False)] and gc.isenabled()
    failing = True
    with pytest.raises(ValueError):
        graphs.captured(run, None)
    assert gc.isenabled(), "after a capture that failed too"
