"""Attention in copies behind one server: it replies as one worker does, whichever copy a request is in, and outlives
the death of a rank of any copy."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from oracle import tiny_model
from smollm2 import COUNTING, COUNTING_IDS, LETTERS, LETTERS_IDS
from smollm2 import GREEDY as GREEDY_TEXT
from test_processes import children
from test_served_pipeline import GREEDY, PROMPTS, assert_it_goes_on, said
from tiny_checkpoint import assert_same, save_checkpoint

from engine import AsyncEngine, Engine, EngineError, Reply, SamplingParams
from engine.messages.questions import CountExperts, Profile

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc"),
]
OPTIONS: dict[str, Any] = {
    **{"device": "cpu", "threads": 1, "max_running": 12, "max_step_tokens": 48, "kv_tokens": 2048, "page_size": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
    changes = {"num_attention_heads": 4, "vocab_size": 128, "eos_token_id": 127, "max_position_embeddings": 256}
    save_checkpoint(tiny_model("Qwen3Moe", **experts, **changes), folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Reply]:
    """What one worker replies."""
    with Engine(model=str(folder), **OPTIONS) as engine:
        assert engine.stats().pages * 4 == 2048
        return said(engine)


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_whatever_is_asked_copies_reply_as_one(tp: int, folder: Path, alone: list[Reply]) -> None:
    with Engine(model=str(folder), tp=tp, dp_attention=2, **OPTIONS) as engine:
        ours = said(engine)
        stats = engine.stats()
    assert_same(ours, alone)
    assert ours[-1].cached_tokens == alone[-1].cached_tokens > 190  # where the copy is that has the prefix
    assert stats.pages * 4 == 2 * 2048  # each copy has as many as one worker
    assert [copy.pages * 4 for copy in stats.copies] == [2048, 2048]
    assert all(copy.tokens_total > 100 for copy in stats.copies)
    assert max(copy.tokens_total for copy in stats.copies) < stats.most_tokens_total


@pytest.mark.anyio
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.matrix)])
async def test_copies_go_on_after_clients_have_left_and_are_started_again(
    rank: int, folder: Path, alone: list[Reply]
) -> None:
    wanted = [reply.ids for reply in alone[: len(PROMPTS)]]
    before = set(children(os.getpid()))
    async with AsyncEngine(model=str(folder), dp_attention=2, **OPTIONS) as engine:
        await assert_it_goes_on(engine, rank, before, wanted)
        with anyio.fail_after(60):
            assert (await engine.front.flush()).in_use == 0
    assert set(children(os.getpid())) == before


@pytest.mark.matrix
def test_whatever_is_asked_copies_on_two_stages_reply_as_one(folder: Path, alone: list[Reply]) -> None:
    with Engine(model=str(folder), pp=2, dp_attention=2, **OPTIONS) as engine:
        ours = said(engine)
        assert all(copy.tokens_total > 100 for copy in engine.stats().copies)
    assert_same(ours, alone)


@pytest.mark.matrix
def test_copies_reply_as_one_when_pages_run_out(folder: Path) -> None:
    asked = [PROMPTS[index % 3 * 2][: 4 + index] for index in range(12)]
    few = {**OPTIONS, "kv_tokens": 256, "max_model_len": 200}
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=90, ignore_eos=True)
    said = []
    for copies in (1, 2):
        with Engine(model=str(folder), dp_attention=copies, **few) as engine:
            said.append([reply.ids for reply in engine.generate(asked, params)])
            assert engine.stats().retractions_total > 2
    assert said[0] == said[1] and all(len(ids) == 90 for ids in said[0])


def traces(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def steps_of(file: Path) -> list[str]:
    """The spans of steps in a trace, as they are named, in their order."""
    with gzip.open(file) as trace:
        events = json.load(trace)["traceEvents"]
    found = [event for event in events if str(event["name"]).startswith("step ") and "tokens" in event["name"]]
    return [event["name"] for event in sorted(found, key=lambda event: float(event["ts"]))]


@pytest.mark.anyio
@pytest.mark.matrix
async def test_each_copy_writes_a_trace_of_the_same_steps(folder: Path, alone: list[Reply], tmp_path: Path) -> None:
    wanted = [reply.ids for reply in alone[: len(PROMPTS)]]
    async with AsyncEngine(model=str(folder), dp_attention=2, **OPTIONS) as engine:
        await engine.front.ask(CountExperts("start"))
        await engine.front.ask(Profile(str(tmp_path), 8))
        assert [reply.ids for reply in await engine.generate(PROMPTS, GREEDY)] == wanted
        path = await engine.front.ask(Profile())
        counted = await engine.front.ask(CountExperts("stop"))
    traced = {str(file): steps_of(file) for file in traces(tmp_path)}
    assert len(traced) == 2 and len(traced[path]) >= 8
    assert {tuple(steps[:8]) for steps in traced.values()} == {tuple(traced[path][:8])}
    # All ranks count the choices of all copies: three of each token of each prompt, and of each reply but its last.
    tokens = sum(len(ids) + GREEDY.max_tokens - 1 for ids in PROMPTS)
    chosen = sum(np.frombuffer(counted.counts, "<i8").tolist())
    assert 3 * len(counted.layers) * (tokens - 120) <= chosen <= 3 * len(counted.layers) * tokens  # of 120 cached


def test_copies_that_do_not_divide_ranks_are_refused_before_any_is_started(folder: Path) -> None:
    before = set(children(os.getpid()))
    with (
        pytest.raises(EngineError, match=r"--dp-attention 2 does not divide --tp 3"),
        Engine(model=str(folder), tp=3, dp_attention=2, **OPTIONS),
    ):
        pass
    assert set(children(os.getpid())) == before


@pytest.mark.matrix
def test_smollm2_whose_heads_two_ranks_cannot_divide_runs_in_two_copies() -> None:
    with Engine(model="smollm2-135m", dp_attention=2, device="cpu", max_model_len=512, max_running=8) as engine:
        assert [reply.ids for reply in engine.generate([COUNTING, LETTERS], GREEDY_TEXT)] == [COUNTING_IDS, LETTERS_IDS]
