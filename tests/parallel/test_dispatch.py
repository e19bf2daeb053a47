"""Tokens are sent to the ranks of their experts in a model's layers: greedy ids of one rank, in float32, by any way."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatched import MIXED, measured_here, mixture_by, replies, sent_as_fp8
from oracle import tiny

from engine.errors import ConfigError
from engine.options.parallel import ParallelOptions
from engine.parallel.ways import WAYS, Ways
from engine.plugin.testing import ModelHarness
from engine.testing.ranks import Ranks, open_ranks
from engine.worker.ways import decided

MODELS = "engine_plugins.models"
SIZES = {"num_attention_heads": 4, "hidden_size": 48}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
LATENT = {
    **{"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "num_key_value_heads": 4},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 20},
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": (f"{MODELS}.qwen3_moe:Qwen3Moe", "Qwen3Moe", EXPERTS),
    "deepseek": (f"{MODELS}.deepseek:Deepseek", "DeepseekV3", LATENT),  # groups, shared experts
}
SLOTS = ModelHarness.slots  # of each copy of attention
PLACES = {"both": (1, SLOTS, SLOTS + 3), "one is idle": (SLOTS, SLOTS + 1, SLOTS + 2)}
SENT = {"places": Ways.always("places"), "counts": Ways.always("counts"), "mixed": MIXED}
ANY: dict[str, Ways | None] = {"gathered": None, **SENT}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("ranks"), tp=2, dp=2, ep=2) as opened:
        yield opened


def saved(case: str, folder: Path, skewed: bool = False) -> tuple[str, Path]:
    """The model of `case` and the file with its weights; `skewed`: each token chooses from the first four experts."""
    model, family, changes = CASES[case]
    config, tensors, _ = tiny(family, **SIZES | changes)
    for name, tensor in tensors.items():
        if skewed and name.endswith("correction_bias"):
            tensor[:4] += 10.0
    torch.save((config, tensors), folder / "model")
    return model, folder / "model"


def assert_as_one(case: str, opened: Ranks, folder: Path, ways: Ways | None, copies: int = 1, **options: Any) -> None:
    """Ranks of `copies` of attention reply as one rank does, and know what all of them have chosen."""
    model, file = saved(case, folder, options.pop("skewed", False))
    said, counts = replies(None, model, file, None, {})
    assert len({token for reply in said for token in reply}) > 4, "decided, and not all alike"
    parts = opened.run(replies, model, file, ways, options)
    slots = options.get("slots") or range(len(said))
    for rank, (own, own_counts) in enumerate(parts):
        copy = rank * copies // len(parts)
        assert own == [reply for slot, reply in zip(slots, said, strict=True) if copies == 1 or slot // SLOTS == copy]
        assert own_counts == counts


@pytest.mark.parametrize("place", [pytest.param("both", marks=pytest.mark.matrix), "one is idle"])
@pytest.mark.parametrize("way", ["places", pytest.param("mixed", marks=pytest.mark.matrix)])
def test_captured_steps_send_to_fixed_places(way: str, place: str, ranks: Ranks, tmp_path: Path) -> None:
    assert_as_one("qwen3", ranks, tmp_path, SENT[way], 2, slots=PLACES[place], captures=True)


@pytest.mark.parametrize("way", ["places", pytest.param("counts", marks=pytest.mark.matrix)])
def test_all_tokens_may_go_to_one_rank(way: str, ranks: Ranks, tmp_path: Path) -> None:
    _, counts = replies(None, *saved("deepseek", tmp_path, skewed=True), None, {})
    assert all(sum(line[:4]) == sum(line) for line in counts), "the first rank has these experts"
    assert_as_one("deepseek", ranks, tmp_path, SENT[way], 2, slots=PLACES["both"], skewed=True)


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.matrix] * (way != "mixed")) for way in SENT])
def test_experts_move_amid_replies(way: str, ranks: Ranks, tmp_path: Path) -> None:
    assert_as_one("deepseek", ranks, tmp_path, SENT[way], 2, slots=PLACES["both"], redundant=4, moves=True)


QUICK = {("qwen3", "both", "mixed"), ("deepseek", "one is idle", "counts")}
COMBINED = [
    pytest.param(*each, marks=[pytest.mark.matrix] * (each not in QUICK and each[2] != "gathered"))
    for each in itertools.product(CASES, PLACES, ANY)
]


@pytest.mark.parametrize(("case", "place", "way"), COMBINED)
def test_copies_reply_as_one_rank(case: str, place: str, way: str, ranks: Ranks, tmp_path: Path) -> None:
    assert_as_one(case, ranks, tmp_path, ANY[way], 2, slots=PLACES[place])


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("size", "copies"), [(2, 1), (4, 1), (4, 2), (4, 4)], ids=["two", "four", "two of two", "four copies"]
)
def test_ranks_with_the_same_tokens_send_a_part_each(
    size: int, copies: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    slots = None if copies == 1 else (0, SLOTS, (copies - 1) * SLOTS + 1)
    with open_ranks(folder, tp=size, dp=copies, ep=size) as opened:
        for case in CASES:
            for ways in SENT.values():
                assert_as_one(case, opened, folder, ways, copies, slots=slots)
        assert_as_one("deepseek", opened, folder, MIXED, copies, slots=slots, redundant=size, moves=True)
        assert_as_one("deepseek", opened, folder, MIXED, copies, slots=slots, skewed=True)
        assert_as_one("qwen3", opened, folder, MIXED, copies, slots=slots, captures=True)


def test_hidden_states_travel_as_fp8_where_experts_would_round_them(ranks: Ranks, tmp_path: Path) -> None:
    """By 1/16 at most, hence results by a few percent."""
    for error, kinds in ranks.run(sent_as_fp8, *saved("deepseek", tmp_path)):
        assert kinds == [["torch.float32"], ["torch.float8_e4m3fn", "torch.float32"]]
        assert 1e-3 < error < 0.05


MIXTURE = {
    **{"model_type": "deepseek_v3", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 64},
    **{**LATENT, "moe_intermediate_size": 128, "norm_topk_prob": True, "hidden_act": "silu"},
    **{"routed_scaling_factor": 2.5, "rope_theta": 10000.0},
}


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "FP8"])
def test_a_mixture_is_the_same_by_each_way(fp8: bool, ranks: Ranks) -> None:
    for gathered, *others in ranks.run(mixture_by, MIXTURE, list(map(Ways.always, WAYS)), 7, fp8, False):
        assert gathered.abs().mean() > 0
        for sent in others:
            torch.testing.assert_close(sent, gathered, atol=1e-6, rtol=1e-4)


# ── which way ────────────────────────────────────────────────────────────────────────────────


def test_ranks_measure_each_way_and_agree(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.run(measured_here, *saved("deepseek", tmp_path), [1, 8])
    assert found[0] == found[1]
    times, told, ran = found[0]
    assert len(times) == 2 and all(len(line) == 4 and min(line) > 0 for line in times)
    assert told == ("gather", str(MIXED))
    ways = ("_by_gathering", "_by_sending True", "_by_sending False")
    assert list(dict.fromkeys(ran)) == [f"{size} {way}" for size in (1, 8) for way in ways]


GATHER = [10.0, 10.0, 20.0, 30.0]  # us by gathering, by gathering with the shared expert whole, places, counts
PLACED = [20.0, 20.0, 16.0, 30.0]
COUNTED = [90.0, 91.0, 50.0, 30.0]


def test_each_size_goes_by_its_fastest_way() -> None:
    ways = decided([1, 64, 4096], [GATHER, PLACED, COUNTED])
    assert ways == Ways((1, 64, 4096), ("gather", "places", "places"), ("gather", "places", "counts"))
    assert [ways.choose(tokens, captured=True) for tokens in (1, 2, 64, 65)] == ["gather", *["places"] * 3]
    assert [ways.choose(tokens, captured=False) for tokens in (0, 64, 65, 9999)] == [
        "gather",
        "places",
        *["counts"] * 2,
    ]
    captured = "gather up to 1 tokens a rank, places beyond"
    others = "gather up to 1 tokens a rank, places up to 64 tokens a rank, counts beyond"
    assert str(ways) == f"{captured}; steps that are not captured: {others}"
    assert str(Ways.always("places")) == "places"
    assert str(Ways.always("counts")) == "places; steps that are not captured: counts"


def test_what_gains_little_over_all_sizes_is_not_had() -> None:
    """A whole shared expert costs small steps what large ones gain."""
    assert decided([1, 64], [GATHER, [10.0, 12.0, 9.9, 9.9]]) is None
    assert decided([1, 64], [[10.0, 14.0, 20.0, 30.0], PLACED]) is None


@pytest.mark.parametrize(("tp", "ep"), [(4, 2), (2, 1), (1, 1)])
def test_ranks_without_whole_experts_of_their_own_are_refused(tp: int, ep: int) -> None:
    with pytest.raises(ConfigError, match=f"--ep {ep} of --tp {tp} leaves none; say --ep {max(tp, 2)}, or"):
        ParallelOptions(tp=tp, ep=ep, ep_exchange="all-to-all").mesh()
    assert ParallelOptions(tp=2, ep=2, ep_exchange="all-to-all").mesh().ep == 2
