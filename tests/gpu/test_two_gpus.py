"""Two GPUs of one host: NCCL groups, sums by a kernel of our own, and engines whose ranks reply as one worker does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if torch.cuda.device_count() < 2:
    pytest.skip(f"needs two GPUs, and torch sees {torch.cuda.device_count()}", allow_module_level=True)

from oracle import tiny_model
from tiny_checkpoint import save_checkpoint

from engine import Engine, EngineError, SamplingParams
from engine.kernels import choose
from engine.kernels.collectives.reference import sum_add_norm
from engine.parallel import collectives
from engine.parallel.groups import Groups
from engine.parallel.peers import PeerMemory, join_peers
from engine.testing.ranks import Ranks, open_ranks

WIDTH, ROWS, MANY = 4096, (1, 3, 64, 256), 2048
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # about two roundings, relative


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("ranks"), tp=2, gpus=True) as opened:
        yield opened


def random(*shape: int, dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def opened(groups: Groups, dtype: torch.dtype) -> PeerMemory:
    made = join_peers(groups.along("tp"), groups.device, width=WIDTH, rows=MANY, dtype=dtype)
    assert made is not None
    made.started(seconds=16)
    return made


# ── NCCL ─────────────────────────────────────────────────────────────────────────────────────


def by_nccl(groups: Groups) -> list[Tensor]:
    group, rank = groups.along("tp"), groups.mesh.rank
    mine = (torch.arange(8, device=groups.device).view(4, 2) + 10 * rank).float()
    made = [
        collectives.all_reduce(mine.clone(), group),
        collectives.all_gather(mine, group),
        collectives.all_gather(mine.t(), group, dim=1),
        collectives.reduce_scatter(mine, group),
        collectives.broadcast(mine.clone(), group, source=1),
    ]
    assert groups.least(7 - rank) == 6
    return [each.cpu() for each in made]


def test_collectives_over_nccl(ranks: Ranks) -> None:
    zero, one = ((torch.arange(8).view(4, 2) + 10 * rank).float() for rank in range(2))
    for rank, got in enumerate(ranks.run(by_nccl)):
        wanted = [zero + one, torch.cat((zero, one)), torch.cat((zero.t(), one.t()), dim=1)]
        wanted += [(zero + one)[2 * rank : 2 * rank + 2], one]
        assert all(torch.equal(mine, expected) for mine, expected in zip(got, wanted, strict=True))


# ── sums by our kernel ───────────────────────────────────────────────────────────────────────


def sums(groups: Groups, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """By each way and by NCCL: sums, norms and streams of several sizes, on the host."""
    group, device, rank = groups.along("tp"), groups.device, groups.mesh.rank
    peers, ops = opened(groups, dtype), choose(device, dtype).dense
    made: dict[str, list[Tensor]] = {"NCCL": [], "words": [], "rows": []}
    for turn, rows in enumerate((*ROWS, 1, MANY, 5)):
        parts = [random(rows, WIDTH, dtype=dtype, seed=10 * turn + other, device=device) for other in range(2)]
        stream = random(rows, WIDTH, dtype=dtype, seed=70 + turn, device=device)
        weight = random(WIDTH, dtype=dtype, seed=90, device=device)
        total = collectives.all_reduce(parts[rank].clone(), group)
        normed, added = ops.add_rms_norm(total.clone(), stream.clone(), weight, 1e-6)
        made["NCCL"] += [total, added, normed]
        for name, way in zip(("words", "rows"), peers.ways, strict=True):
            own, old, plain = parts[rank].clone(), stream.clone(), parts[rank].clone()
            if way.takes(own):
                way.exchange(plain)
                way.exchange(own, old, weight, 1e-6)
                made[name] += [plain, old, own]
            elif name == "words":
                made[name] += [total, added, normed]
        definition = sum_add_norm(parts, stream, weight, 1e-6)
        torch.testing.assert_close(own, definition[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.cuda.synchronize()
    peers.check(group.ranks)
    return {name: [each.cpu() for each in tensors] for name, tensors in made.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_nccl_and_the_same_bits_on_both(dtype: torch.dtype, ranks: Ranks) -> None:
    zero, one = ranks.run(sums, dtype)
    for name in ("words", "rows"):
        assert len(zero[name]) == len(zero["NCCL"])
        for mine, other, nccl in zip(zero[name], one[name], zero["NCCL"], strict=True):
            assert torch.equal(mine, other)
            torch.testing.assert_close(mine, nccl, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert all(torch.equal(zero[name][place], zero["NCCL"][place]) for place in range(0, len(zero[name]), 3))


def replayed(groups: Groups, replays: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of numbers that change with each replay of a graph of NCCL's and our own exchanges, of several sizes."""
    group, device, rank = groups.along("tp"), groups.device, groups.mesh.rank
    peers = opened(groups, torch.float32)
    numbers = torch.arange(64 * WIDTH, device=device, dtype=torch.float32).view(64, WIDTH) % 97 + rank
    totals = torch.zeros(3, 64, WIDTH, device=device)

    def step() -> None:
        numbers.add_(1.0)
        for place, way in enumerate(peers.ways):
            for rows in (64, 5, 1):
                part = numbers[:rows].clone()
                way.exchange(part)
                totals[place, :rows] += part
        for rows in (64, 5, 1):
            totals[2, :rows] += collectives.all_reduce(numbers[:rows].clone(), group)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    peers.check(group.ranks)
    words, rows, nccl = totals.cpu()
    return words, rows, nccl


def test_a_graph_is_replayed_a_thousand_times(ranks: Ranks) -> None:
    zero, one = ranks.run(replayed, 1000)
    for way in range(2):
        assert torch.equal(zero[way], one[way]) and torch.equal(zero[way], zero[2])
    assert zero[2][7].max() > 1e5


def abandoned(groups: Groups) -> str:
    """Rank 1 does not send, and rank 0 waits for a while."""
    peers = opened(groups, torch.float32)
    print(peers.measure(groups.along("tp"), WIDTH, 64, torch.float32, choose(groups.device, torch.float32).dense))
    peers.started(seconds=0.5)
    if groups.mesh.rank == 0:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(3):  # only the first waits
            peers.ways[0].exchange(torch.ones(2, WIDTH, device=groups.device))
        ended.record()
        ended.synchronize()
        print(f"waits of half a second took {began.elapsed_time(ended):.1f} ms", flush=True)
    torch.cuda.synchronize()
    collectives.all_reduce(torch.ones(1, device=groups.device), groups.along("tp"))
    try:
        peers.check(groups.along("tp").ranks)
    except EngineError as error:
        return str(error)
    return ""


def test_who_waits_in_vain_says_for_whom(ranks: Ranks) -> None:
    zero, one = ranks.run(abandoned)
    assert "rank 0 waited in vain for rank 1" in zero and one == ""


# ── engines ──────────────────────────────────────────────────────────────────────────────────

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4}
SIZES |= {"vocab_size": 257, "max_position_embeddings": 512}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "head_dim": 32}
LATENT: dict[str, Any] = {
    **{"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "q_lora_rank": 128},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 8, "num_experts_per_tok": 3},
    **{"moe_intermediate_size": 64, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 32, "tie_word_embeddings": False}),
    "mixture": ("Qwen3Moe", EXPERTS),
    "latent": ("DeepseekV3", LATENT),
}
COMMON: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True}
ASKED = {
    "greedy": SamplingParams(temperature=0, **COMMON),
    "drawn": SamplingParams(temperature=0.8, seed=11, **COMMON),
    "scored": SamplingParams(temperature=0, logprobs=3, **COMMON),
    "filtered": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=12, **COMMON),
}
PROMPTS = [[3 + (7 * place + length) % 250 for place in range(length)] for length in (3, 17, 40, 150, 5, 40)]


@pytest.mark.timeout(400)  # the first time kernels in float32 are compiled, by each rank
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_reply_as_one(family: str, tmp_path: Path) -> None:
    name, changes = FAMILIES[family]
    model = tiny_model(name, **{**SIZES, **changes})
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.16)
    save_checkpoint(model, tmp_path)
    options: dict[str, Any] = {"model": str(tmp_path), "device": "cuda", "dtype": "float32", "kv_tokens": 8192}
    said: list[dict[str, list[list[int]]]] = []
    scores: list[list[list[float]]] = []
    for tp in (1, 2):
        with Engine(tp=tp, max_step_tokens=512, max_running=32, **options) as engine:
            replies = {kind: engine.generate(PROMPTS, params) for kind, params in ASKED.items()}
            replies["alone"] = [engine.generate(prompt, ASKED["greedy"]) for prompt in PROMPTS]
        said.append({kind: [reply.ids for reply in each] for kind, each in replies.items()})
        scores.append([[step.logprob for step in reply.logprobs] for reply in replies["scored"]])
    assert len({token for reply in said[0]["greedy"] for token in reply}) > 4  # decided, and not all alike
    for kind, wanted in said[0].items():
        assert said[1][kind] == wanted, f"{kind}: {said[1][kind]}, not {wanted}"
    torch.testing.assert_close(torch.tensor(scores[1]), torch.tensor(scores[0]), atol=1e-3, rtol=0)
