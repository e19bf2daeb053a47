"""Experts divided by number over ranks that are processes: greedy ids of one rank, in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import tiny
from torch import Tensor

from engine.layers.model import Model
from engine.layers.moe import Experts
from engine.messages.questions import ExpertMap
from engine.options.parallel import ParallelOptions
from engine.parallel.groups import Groups
from engine.parallel.placement import first_placement
from engine.plugin.kernels import dequantize, quantize_blocks
from engine.plugin.registry import resolve
from engine.plugin.testing import ModelHarness
from engine.testing.ranks import Ranks, open_ranks
from engine.worker import rebalance
from engine.worker.experts import ExpertWatch, balance, experts_of, routers_of
from engine_plugins.quantization import fp8
from engine_plugins.quantization.fp8 import Fp8

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
SIZES = {"num_attention_heads": 4, "hidden_size": 48}
LATENT = {
    **{"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "num_key_value_heads": 4},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 20},
}
FP8 = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 2}
MODELS = "engine_plugins.models"
CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {  # the last is how many redundant experts
    "qwen3": (f"{MODELS}.qwen3_moe:Qwen3Moe", "Qwen3Moe", EXPERTS, 0),
    "mixtral, copies": (f"{MODELS}.mixtral:Mixtral", "Mixtral", {"num_local_experts": 6}, 2),
    "deepseek, groups, shared experts, copies": (f"{MODELS}.deepseek:Deepseek", "DeepseekV3", LATENT, 4),
    "FP8": (f"{MODELS}.qwen3_moe:Qwen3Moe", "Qwen3Moe", {**EXPERTS, **FP8, "moe_intermediate_size": 256}, 4),
}
PROMPTS = [[(7 * i + 3 * j) % 89 for i in range(length)] for j, length in enumerate((21, 9, 14))]
COUNT = 20


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("four"), tp=4, ep=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def two_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("two_of_two"), tp=4, ep=2) as opened:
        yield opened


def saved(case: str, folder: Path) -> Path:
    _, family, changes, _ = CASES[case]
    config, tensors, _ = tiny(family, **SIZES | changes)
    if case == "FP8":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensors[name])
    for name, tensor in tensors.items():
        if name.endswith("correction_bias"):
            tensor[2:4] += 0.3  # all of a group, and more often chosen than others
    torch.save((config, tensors), folder / "model")
    return folder / "model"


def harness_of(groups: Groups | None, case: str, file: Path) -> ModelHarness:
    config, tensors = torch.load(file, weights_only=False)
    scheme = Fp8(config["quantization_config"]) if "quantization_config" in config else None
    model, redundant = resolve(CASES[case][0]), CASES[case][3] if groups is not None else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "dense_instead", lambda build: False)  # as on a GPU, weights stay FP8
        return ModelHarness(model, config, tensors, quantization=scheme, groups=groups, redundant_experts=redundant)


def replies(groups: Groups | None, case: str, file: Path) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """What the model of `file` says to each prompt, how often each expert was chosen in each layer, and how many tokens
    the layers' experts on this rank were given in a further step, by the layer's and this rank's number of them."""
    harness = harness_of(groups, case, file)
    said = harness.greedy(PROMPTS, COUNT)
    routers = list(routers_of(harness.runner.model).values())
    counts = torch.stack([router.counts for router in routers]).tolist()
    given: list[list[int]] = []
    for layer in harness.runner.model.modules():
        if isinstance(layer, Experts):
            layer.register_forward_pre_hook(lambda layer, inputs: given.append(_given(layer, inputs[2])))
    harness.runner.apply(harness.admit([PROMPTS[0]]))
    harness.logits([(0, 0, len(PROMPTS[0]))])
    return said, counts, given


def rebalanced(
    groups: Groups, case: str, file: Path, slots: tuple[int, ...] | None = None
) -> tuple[list[list[int]], ExpertMap, int]:
    """What the model of `file` says to each prompt while experts move, because they are uneven or because that was
    asked for; where they lie then, and how many slots have the weights that belong there. The prompts have `slots`; of
    several copies of attention, what this one says."""
    harness = harness_of(groups, case, file)
    runner, model = harness.runner, harness.runner.model
    before = [layer.placement.copy() for layer in experts_of(model)]
    options = ParallelOptions(rebalance_threshold=1.0, rebalance_tokens=1, redundant_experts=CASES[case][3])
    watch, launch = ExpertWatch(model, parallel=options, window=3), runner.launch

    def launched(*arguments: Any) -> Any:
        watch.step()
        if watch.look(now=False).windows and not watch.rebalancer.waiting and not asked:
            asked.append(watch.rebalance())
        return launch(*arguments)

    asked: list[int] = []
    runner.launch = launched  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebalance, "LEAST_GAIN", -1.0)  # whatever is counted, they move
        said = harness.greedy(PROMPTS, COUNT, slots=slots)
    assert asked == [len(before)]
    changed = [not np.array_equal(layer.placement, old) for layer, old in zip(experts_of(model), before, strict=True)]
    assert all(changed) and watch.rebalancer.moved >= len(before)
    return said, watch.look(), _right_slots(model, file)


def _right_slots(model: Model, file: Path) -> int:
    """How many slots of the layers hold the expert that their placement says, to the last bit."""
    stored = torch.load(file, weights_only=False)[1]
    tensors = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in stored.items()}
    right = 0
    for path, layer in model.named_modules():
        if isinstance(layer, Experts):
            for slot, expert in enumerate(layer.own):
                name = f"{path}.{expert}.{layer._parts[2]}.weight"
                weight = tensors[name]
                if weight.dtype == torch.float8_e4m3fn:
                    weight = dequantize(weight, tensors[f"{name}_scale_inv"])
                right += torch.equal(layer.stored().matrices(slot, torch.float32)[1], weight[:, layer.share])
    return right


def _given(layer: Experts, chosen: Tensor) -> list[int]:
    return torch.bincount(chosen[chosen >= 0], minlength=layer.held).tolist()


def assert_as_one(case: str, ranks: Ranks, ep: int, tmp_path: Path) -> None:
    file = saved(case, tmp_path)
    said, counts, given = replies(None, case, file)
    assert len({token for reply in said for token in reply}) > 4, "decided, and not all alike"
    parts = ranks.run(replies, case, file)
    for own, own_counts, _ in parts:
        assert own == said and own_counts == counts
    each_group = parts[:: len(parts) // ep]  # ranks of one group compute parts of the same experts
    for layer, whole in enumerate(given):
        assert sum(sum(part[layer]) for _, _, part in each_group) == sum(whole)
        assert all(sum(part[layer]) < sum(whole) for _, _, part in each_group)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_half_of_the_experts_reply_as_one(case: str, two: Ranks, tmp_path: Path) -> None:
    assert_as_one(case, two, 2, tmp_path)


def assert_moves_change_nothing(case: str, ranks: Ranks, tmp_path: Path, slots: tuple[int, ...] | None = None) -> None:
    """Where prompts have `slots`, each rank has a copy of attention."""
    file = saved(case, tmp_path)
    said, _, _ = replies(None, case, file)
    for rank, (own, found, right) in enumerate(ranks.run(rebalanced, case, file, slots)):
        here = [True] * len(said) if slots is None else [slot // ModelHarness.slots == rank for slot in slots]
        assert own == [reply for reply, mine in zip(said, here, strict=True) if mine]
        placements = np.frombuffer(found.placement, "<i4").reshape(len(found.layers), found.ranks, -1)
        assert right == placements[:, 0].size, "each slot has the weights that the map says"
        counts = np.frombuffer(found.counts, "<i8").reshape(len(found.layers), -1)
        first = balance(counts, [first_placement(counts.shape[1], found.ranks, CASES[case][3])] * len(counts))
        assert balance(counts, placements) < max(first, 1.15), "uneven ones have become more even"


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][3]])
def test_experts_that_move_amid_replies_change_none(case: str, two: Ranks, tmp_path: Path) -> None:
    assert_moves_change_nothing(case, two, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][3]])
def test_experts_that_move_between_groups_of_ranks_change_none(case: str, two_of_two: Ranks, tmp_path: Path) -> None:
    assert_moves_change_nothing(case, two_of_two, tmp_path)


@pytest.mark.matrix
def test_experts_that_move_between_four_ranks_change_none(four: Ranks, tmp_path: Path) -> None:
    assert_moves_change_nothing("deepseek, groups, shared experts, copies", four, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("case", [case for case in CASES if case != "FP8"])
def test_four_ranks_with_a_quarter_of_the_experts_reply_as_one(case: str, four: Ranks, tmp_path: Path) -> None:
    assert_as_one(case, four, 4, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES)
def test_two_groups_of_two_ranks_reply_as_one(case: str, two_of_two: Ranks, tmp_path: Path) -> None:
    assert_as_one(case, two_of_two, 2, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][3]])
def test_experts_that_move_while_attention_is_in_copies_change_none(
    case: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of one copy and of both; counts are those of all copies' tokens, on all ranks."""
    folder, first = tmp_path_factory.mktemp("copies"), ModelHarness.slots
    with open_ranks(folder, tp=2, dp=2, ep=2) as opened:
        for slots in ((1, first, first + 3), (first, first + 1, first + 2)):
            assert_moves_change_nothing(case, opened, folder, slots)
