"""Experts over two GPUs: all-to-all over NCCL, also in a CUDA graph, and engines whose experts move amid replies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip(f"needs two GPUs, and torch sees {torch.cuda.device_count()}", allow_module_level=True)

from dispatched import mixture_by
from exchanged import OPS, Own, case, exchanged
from oracle import tiny_model
from tiny_checkpoint import save_checkpoint

from engine import AsyncEngine, SamplingParams
from engine.kernels import choose
from engine.messages.questions import LookAtExperts, RebalanceExperts
from engine.parallel.groups import Groups
from engine.parallel.ways import CAPTURED, WAYS, Ways
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


MIXTURE = {
    **{"model_type": "deepseek_v3", "vocab_size": 256, "hidden_size": 512, "intermediate_size": 256},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 64},
    **{"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "q_lora_rank": None},
    **{"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "hidden_act": "silu"},
    **{"routed_scaling_factor": 2.5, "rope_theta": 10000.0},
}


@pytest.fixture(scope="module")
def copies_of_attention(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("copies"), tp=2, dp=2, ep=2, gpus=True) as opened:
        yield opened


@pytest.mark.parametrize("captures", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "FP8"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 300])
def test_a_mixture_is_the_same_by_each_way(tokens: int, fp8: bool, captures: bool, copies_of_attention: Ranks) -> None:
    """But for rounding: by gathering each rank rounds its part of the sum. In FP8 hidden states are rounded where they
    leave, and where they are multiplied once more."""
    ways = [Ways.always(way) for way in (CAPTURED if captures else WAYS)]
    for gathered, *others in copies_of_attention.run(mixture_by, MIXTURE, ways, tokens, fp8, captures):
        assert gathered.abs().mean() > 0
        for sent in others:
            assert (sent - gathered).norm() / gathered.norm() < (0.02 if fp8 else 0.01)


@pytest.mark.anyio
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("exchange", ["gather", "all-to-all", "auto"])
async def test_experts_move_amid_replies(exchange: str, copies: int, tmp_path: Path) -> None:
    """With CUDA graphs, in float32: the ids of one GPU before, while and after they move."""
    save_checkpoint(tiny_model("Qwen3Moe", **SIZES, **EXPERTS), tmp_path)
    options: dict[str, Any] = {"model": str(tmp_path), "device": "cuda", "dtype": "float32", "kv_tokens": 8192}
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8] * 2, [9] * 5]
    async with AsyncEngine(**options) as engine:
        alone = [reply.ids for reply in await engine.generate(prompts, greedy)]
    divided = {"ep": 2, "dp_attention": copies, "redundant_experts": 4, "ep_exchange": exchange}
    async with AsyncEngine(**divided, **options) as engine:
        told = (await engine.front.ready()).exchange
        assert told and (exchange == "auto" or told == {"gather": "gather", "all-to-all": "places"}[exchange])
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
