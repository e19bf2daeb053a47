"""Two stages behind one server: `--pp 2` replies as one worker does, by the same actors, and outlives a stage's death.

A tiny seeded Llama is written to a directory first."""

import os
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest
from oracle import tiny_model
from restarts import restarted
from test_processes import children
from tiny_checkpoint import ASKED, assert_same, save_checkpoint

from engine import AsyncEngine, Engine, EngineError, Reply, SamplingParams

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc"),
]
OPTIONS: dict[str, Any] = {
    **{"device": "cpu", "threads": 1, "max_running": 8, "max_step_tokens": 24, "kv_tokens": 4096, "page_size": 4},
}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
STEM = [(7 * place) % 90 + 1 for place in range(200)]  # nine chunks of a step or more
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], STEM, [2, 7, 1, 8, 2, 8], [*STEM[:120], 5], [1, 6, 1, 8] * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    changes = {"num_attention_heads": 4, "vocab_size": 128, "eos_token_id": 127, "max_position_embeddings": 256}
    save_checkpoint(tiny_model("Llama", **changes), folder)
    return folder


def said(engine: Engine) -> list[Reply]:
    """All prompts and all kinds of wishes at a time; then each kind alone, and what the cache holds again."""
    asked = list(ASKED.values())
    together = engine.generate([*PROMPTS, *[PROMPTS[0]] * len(asked)], [*[GREEDY] * len(PROMPTS), *asked])
    alone = [engine.generate(PROMPTS[2], params) for params in asked]
    return [*together, *alone, engine.generate(PROMPTS[1], GREEDY)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Reply]:
    """What one worker replies."""
    with Engine(model=str(folder), **OPTIONS) as engine:
        return said(engine)


def workers(before: set[int]) -> list[int]:
    """Processes that were started as such since `before`, in the order of their ranks."""
    return sorted(pid for pid, name in children(os.getpid()).items() if name == "engine.worker" and pid not in before)


async def assert_it_goes_on(engine: AsyncEngine, rank: int, before: set[int], wanted: list[list[int]]) -> None:
    """After clients have left, and after its worker `rank` of two, started since `before`, was killed: PROMPTS get the
    ids that are `wanted`."""
    with anyio.fail_after(120):
        for _ in range(2):  # a client leaves amidst its reply, and one amidst its prompt
            stream = engine.stream(PROMPTS[2], GREEDY)
            async for _ in stream:
                break
            await stream.aclose()
            with anyio.move_on_after(0.005):
                await engine.generate(STEM[::-1], GREEDY)
            assert [reply.ids for reply in await engine.generate(PROMPTS, GREEDY)] == wanted
        pids = workers(before)
        assert len(pids) == 2
        os.kill(pids[rank], signal.SIGKILL)
        assert (await restarted(engine, PROMPTS[1], GREEDY)).ids == wanted[1]
        assert [reply.ids for reply in await engine.generate(PROMPTS, GREEDY)] == wanted


def test_whatever_is_asked_two_stages_reply_as_one(folder: Path, alone: list[Reply]) -> None:
    assert len({tuple(reply.ids) for reply in alone}) > len(ASKED)
    with Engine(model=str(folder), pp=2, **OPTIONS) as engine:
        ours = said(engine)
    assert_same(ours, alone)
    assert ours[-1].cached_tokens == alone[-1].cached_tokens > 190


@pytest.mark.matrix
def test_whatever_is_asked_two_stages_of_two_ranks_reply_as_one(folder: Path, alone: list[Reply]) -> None:
    with Engine(model=str(folder), tp=2, pp=2, **OPTIONS) as engine:
        assert_same(said(engine), alone)


@pytest.mark.matrix
def test_two_stages_reply_as_one_when_pages_run_out(folder: Path, alone: list[Reply]) -> None:
    """Requests are sent back to the queue while their tokens are on their way, and others take their slots."""
    asked = [PROMPTS[index % 3 * 2][: 4 + index] for index in range(12)]
    few = {**OPTIONS, "kv_tokens": 256, "max_model_len": 200}
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=90, ignore_eos=True)
    said = []
    for stages in (1, 2, 3):
        with Engine(model=str(folder), pp=stages, **few) as engine:
            said.append([reply.ids for reply in engine.generate(asked, params)])
            assert engine.stats().retractions_total > 2
    assert said[0] == said[1] == said[2] and all(len(ids) == 90 for ids in said[0])


@pytest.mark.anyio
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.matrix)])
async def test_two_stages_go_on_after_clients_have_left_and_are_started_again(
    stage: int, folder: Path, alone: list[Reply]
) -> None:
    wanted = [reply.ids for reply in alone[: len(PROMPTS)]]
    before = set(children(os.getpid()))
    async with AsyncEngine(model=str(folder), pp=2, **OPTIONS) as engine:
        await assert_it_goes_on(engine, stage, before, wanted)
    assert set(children(os.getpid())) == before


def test_more_stages_than_layers_are_refused_with_both_numbers(folder: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"3 layers do not reach for 4 stages"),
        Engine(model=str(folder), pp=4, **OPTIONS),
    ):
        pass
