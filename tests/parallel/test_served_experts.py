"""Experts over ranks behind an engine: `--ep 2` replies as one device, whatever is asked; what cannot be is refused."""

import os
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest
from oracle import tiny_model
from restarts import restarted
from test_processes import children
from test_served_pipeline import workers
from tiny_checkpoint import ASKED, assert_same, save_checkpoint

from engine import AsyncEngine, Engine, EngineError, SamplingParams
from engine.config import resolve
from engine.errors import ConfigError, RequestError
from engine.messages.questions import LookAtExperts, RebalanceExperts

OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 1, "max_running": 16, "kv_tokens": 2048, "page_size": 4}
SIZES = {"vocab_size": 128, "eos_token_id": 127, "num_attention_heads": 4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [1, 6, 1, 8] * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    save_checkpoint(tiny_model("Qwen3Moe", **SIZES, **EXPERTS), folder)
    return folder


def test_ep_alone_says_how_many_devices() -> None:
    assert resolve({"ep": 4}).parallel.ranks == resolve({}, {"ENGINE_EP": "4"}).parallel.ranks == 4
    assert resolve({"ep": 2, "tp": 4}).parallel.ranks == 4
    with pytest.raises(ConfigError, match="--ep 2 does not divide --tp 3"):
        resolve({"ep": 2, "tp": 3}).parallel.mesh()


COPIES = {"ep": 2, "dp_attention": 2}
SENT = {"ep_exchange": "all-to-all"}


@pytest.mark.matrix
@pytest.mark.parametrize(
    "divided",
    [{"ep": 2, "redundant_experts": 2}, {"ep": 2, **SENT}, {**COPIES, **SENT, "redundant_experts": 2}, COPIES],
    ids=["gathered", "sent", "copies, sent", "copies, as measured"],
)
def test_two_ranks_with_half_of_the_experts_reply_as_one(divided: dict[str, Any], folder: Path) -> None:
    said = []
    for parts in ({}, divided):
        with Engine(model=str(folder), **parts, **OPTIONS) as engine:
            said.append(engine.generate([PROMPTS[0]] * len(ASKED), list(ASKED.values())))
            said[-1] += engine.generate(PROMPTS, ASKED["scored"])
    assert len({token for reply in said[0] for token in reply.ids}) > 8
    assert_same(said[1], said[0])


@pytest.mark.matrix
@pytest.mark.parametrize("divided", [{"ep": 2}, {**COPIES, **SENT}], ids=["gathered", "copies, sent"])
def test_stages_of_ranks_with_half_of_the_experts_reply_as_one(divided: dict[str, Any], folder: Path) -> None:
    said = []
    for parts in ({}, {**divided, "pp": 2}):
        with Engine(model=str(folder), **parts, **OPTIONS) as engine:
            said.append(engine.generate(PROMPTS * 3, ASKED["greedy"]))
    assert_same(said[1], said[0])


def test_sizes_that_do_not_divide_are_refused_with_both_numbers(folder: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"8 experts and 1 copy do not divide over 2 ranks \(ep\)"),
        Engine(model=str(folder), ep=2, redundant_experts=1, **OPTIONS),
    ):
        pass


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tiny_model("Llama", **SIZES), tmp_path)
    with (
        pytest.raises(EngineError, match=r"--ep 2 divides .* Llama has none"),
        Engine(model=str(tmp_path), ep=2, **OPTIONS),
    ):
        pass


@pytest.mark.anyio
@pytest.mark.parametrize("exchange", ["gather", pytest.param("all-to-all", marks=pytest.mark.matrix)])
async def test_experts_move_when_that_is_asked_for(exchange: str, folder: Path) -> None:
    """Amid replies, between steps, on all ranks alike; those replies, and those after it, are those of one device."""
    greedy = SamplingParams(temperature=0, max_tokens=28, ignore_eos=True)
    async with AsyncEngine(model=str(folder), **OPTIONS) as engine:
        alone = [reply.ids for reply in await engine.generate(PROMPTS, greedy)]
        with pytest.raises(RequestError, match="start the server with --ep 2"):
            await engine.front.ask(RebalanceExperts())
    options = {"ep": 2, "redundant_experts": 4, "ep_exchange": exchange, **OPTIONS}
    async with AsyncEngine(model=str(folder), **options) as engine:
        front = engine.front
        assert (await front.ready()).exchange == {"gather": "gather", "all-to-all": "places"}[exchange]
        with pytest.raises(RequestError, match="no token has chosen an expert"):
            await front.ask(RebalanceExperts())
        assert [reply.ids for reply in await engine.generate(PROMPTS, greedy)] == alone
        before = await front.ask(LookAtExperts())
        async with anyio.create_task_group() as tasks:
            said: list[list[int]] = []

            async def generate() -> None:
                said.extend(reply.ids for reply in await engine.generate(PROMPTS, greedy))

            tasks.start_soon(generate)
            assert await front.ask(RebalanceExperts()) == len(before.layers)
            with pytest.raises(RequestError, match=r"a rebalance is under way: . layers"):
                await front.ask(RebalanceExperts())
        after = await front.ask(LookAtExperts())
        assert said == alone and after.waiting == 0 and after.moved > 0 and after.placement != before.placement
        assert [reply.ids for reply in await engine.generate(PROMPTS, greedy)] == alone


@pytest.mark.anyio
@pytest.mark.matrix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
@pytest.mark.parametrize("copies", [1, 2])
async def test_a_rank_that_is_killed_while_experts_move_is_started_again(copies: int, folder: Path) -> None:
    """And clients that leave meanwhile take nothing along. Experts lie as at first then, and can move again."""
    greedy = SamplingParams(temperature=0, max_tokens=28, ignore_eos=True)
    async with AsyncEngine(model=str(folder), **OPTIONS) as engine:
        alone = [reply.ids for reply in await engine.generate(PROMPTS, greedy)]
    before = set(children(os.getpid()))
    options = {**OPTIONS, "ep": 2, "redundant_experts": 4, "dp_attention": copies}
    async with AsyncEngine(model=str(folder), **options) as engine:
        front = engine.front
        with anyio.fail_after(120):
            first = (await front.ask(LookAtExperts())).placement
            for rank in (1, 0):
                assert [reply.ids for reply in await engine.generate(PROMPTS, greedy)] == alone
                layers = await front.ask(RebalanceExperts())
                assert (await front.ask(LookAtExperts(now=False))).waiting == layers > 1  # they move with steps
                stream = engine.stream(PROMPTS[1], greedy)
                async for _ in stream:  # its prompt and a step: the first layer is on its way, others wait
                    break
                await stream.aclose()
                os.kill(workers(before)[rank], signal.SIGKILL)
                assert (await restarted(engine, PROMPTS[0], greedy)).ids == alone[0]
                found = await front.ask(LookAtExperts())
                assert found.placement == first and (found.moved, found.waiting) == (0, 0)
            assert [reply.ids for reply in await engine.generate(PROMPTS, greedy)] == alone
            assert await front.ask(RebalanceExperts()) == layers
            for _ in range(2):  # a client leaves amid its reply, and one amid its prompt, as experts move
                stream = engine.stream(PROMPTS[1], greedy)
                async for _ in stream:
                    break
                await stream.aclose()
                with anyio.move_on_after(0.005):
                    await engine.generate(PROMPTS[1][::-1], greedy)
            assert [reply.ids for reply in await engine.generate(PROMPTS, greedy)] == alone
            found = await front.ask(LookAtExperts())
            assert found.moved > 0 and not found.waiting and found.placement != first
            assert (await front.flush()).in_use == 0
