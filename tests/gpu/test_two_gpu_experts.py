"""Experts over two GPUs: all-to-all over NCCL, also in a CUDA graph, and engines whose experts move amid replies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip(f"needs two GPUs, and torch sees {torch.cuda.device_count()}", allow_module_level=True)

from exchanged import OPS, Own, case, exchanged
from oracle import tiny_model
from tiny_checkpoint import save_checkpoint

from engine import AsyncEngine, SamplingParams
from engine.kernels import choose
from engine.messages.questions import LookAtExperts, RebalanceExperts
from engine.parallel.groups import Groups
from engine.testing.ranks import Ranks, open_ranks

COUNTS = (9, 4)
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "head_dim": 64}
SIZES = {"vocab_size": 256, "eos_token_id": 255, "num_attention_heads": 4, "hidden_size": 256}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("ranks"), tp=2, ep=2, gpus=True) as opened:
        yield opened


@pytest.mark.parametrize("chosen", ["by chance", "all to one rank", "some are padding"])
@pytest.mark.parametrize("most", [None, 16], ids=["counts", "fixed places"])
def test_results_are_those_of_one_rank(most: int | None, chosen: str, ranks: Ranks) -> None:
    wanted = OPS.experts(*case(COUNTS, chosen)).split(COUNTS)
    for (got, _, _), expected in zip(ranks.run(exchanged, COUNTS, chosen, most, False), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def replayed(groups: Groups, kinds: list[str]) -> list[torch.Tensor]:
    """What a graph with fixed places gives, as hidden states and choices change under it."""
    ops = choose(groups.device, torch.float32).experts
    own = Own(groups, COUNTS, kinds[0])
    own.there_and_back(ops, 16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        back, _ = own.there_and_back(ops, 16)
    found = []
    for kind in kinds:
        other = Own(groups, COUNTS, kind)
        for name in ("hidden", "weights", "experts"):
            getattr(own, name).copy_(getattr(other, name))
        for mine, its in zip(own.held, other.held, strict=True):
            if mine is not None and its is not None:
                mine.copy_(its)
        graph.replay()
        found.append(back.cpu())
    return found


def test_a_graph_follows_what_is_chosen(ranks: Ranks) -> None:
    kinds = ["by chance", "all to one rank", "some are padding", "by chance"]
    parts = ranks.run(replayed, kinds)
    for place, kind in enumerate(kinds):
        for part, expected in zip(parts, OPS.experts(*case(COUNTS, kind)).split(COUNTS), strict=True):
            torch.testing.assert_close(part[place], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.anyio
async def test_experts_move_amid_replies(tmp_path: Path) -> None:
    """With CUDA graphs, in float32: the ids of one GPU before, while and after they move."""
    save_checkpoint(tiny_model("Qwen3Moe", **SIZES, **EXPERTS), tmp_path)
    options: dict[str, Any] = {"model": str(tmp_path), "device": "cuda", "dtype": "float32", "kv_tokens": 8192}
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8] * 2, [9] * 5]
    async with AsyncEngine(**options) as engine:
        alone = [reply.ids for reply in await engine.generate(prompts, greedy)]
    async with AsyncEngine(ep=2, redundant_experts=4, **options) as engine:
        assert [reply.ids for reply in await engine.generate(prompts, greedy)] == alone
        said: list[list[int]] = []

        async def generate() -> None:
            said.extend(reply.ids for reply in await engine.generate(prompts, greedy))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(generate)
            await engine.front.ask(RebalanceExperts())
        found = await engine.front.ask(LookAtExperts())
        assert said == alone and found.moved > 0 and not found.waiting
        assert [reply.ids for reply in await engine.generate(prompts, greedy)] == alone
