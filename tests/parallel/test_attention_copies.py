"""Attention in copies, each on ranks of its own: the greedy ids of one rank in float32, wherever requests are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import tiny
from test_graphs import PlainAttention, captured
from test_tensor_parallel import COUNT, EXPERTS, LATENT, MODELS, prompts

from engine.errors import ConfigError
from engine.layers.batch import Spread
from engine.layers.spread import gather, scatter
from engine.messages.step import TOKEN
from engine.parallel.groups import Groups
from engine.parallel.mesh import Mesh
from engine.plugin.registry import resolve
from engine.plugin.testing import ModelHarness
from engine.testing.ranks import Ranks, open_ranks
from engine.testing.steps import step_plan
from engine.worker.experts import count_experts, routers_of
from engine.worker.steps import graphs
from engine.worker.steps.graphs import DecodeGraphs, PromptGraphs
from engine_plugins.models.bert import Bert

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense, biases": (f"{MODELS}.llama:Llama", "Llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 95}),
    "mixture": (f"{MODELS}.qwen3_moe:Qwen3Moe", "Qwen3Moe", EXPERTS),
    "latent attention, shared experts": (f"{MODELS}.deepseek:Deepseek", "DeepseekV3", {**LATENT, "q_lora_rank": 20}),
    "norms after the MLP": (f"{MODELS}.gemma:Gemma3", "Gemma3", {"head_dim": 8, "sliding_window": 7}),
}
SLOTS = ModelHarness.slots  # of each copy
PLACES = {"both": (1, SLOTS, SLOTS + 3), "one is idle": (SLOTS, SLOTS + 1, SLOTS + 2)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("ranks"), tp=2, dp=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("ranks"), tp=4, dp=2) as opened:
        yield opened


def saved(case: str, folder: Path, **changes: Any) -> tuple[str, Path]:
    """The model of `case`, and the file with its weights."""
    model, family, differences = CASES[case]
    config, tensors, _ = tiny(family, **{**differences, **changes})
    for name, tensor in tensors.items():
        if name.endswith("_proj.bias"):
            tensor.sub_(0.5)
    torch.save((config, tensors), folder / "model")
    return model, folder / "model"


def replies(
    groups: Groups | None, model: str, file: Path, slots: tuple[int, ...] | None, captures: bool = False
) -> list[list[int]]:
    """What the model of `file` says to the prompts in `slots`; of several copies, this rank's."""
    config, tensors = torch.load(file, weights_only=False)
    attention = PlainAttention if captures else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "captured", captured)
        harness = ModelHarness(resolve(model), config, tensors, groups=groups, attention=attention)
        if captures:
            replaying(harness)
        said = harness.greedy(prompts(config["vocab_size"]), COUNT, slots=slots)
    if captures:
        assert harness.runner.decode_graphs._last is not None  # they were replayed
    return said


def replaying(harness: ModelHarness) -> None:
    """Makes graphs of decode steps and of steps with prompts, and has the runner replay them."""
    runner = harness.runner
    tables = runner.shared_graphs._tables
    decode, some = DecodeGraphs(tables), PromptGraphs(tables, 4, (16, 32, 64))
    assert decode.capture(SLOTS, pool=None) and some.capture(64, pool=None)
    runner.decode_graphs, runner.prompt_graphs = decode, (some, some)
    runner.compute = not_captured  # type: ignore[method-assign]


def not_captured(*_: object) -> Any:
    raise AssertionError("a step is computed as it is")


def of_copies(slots: tuple[int, ...], said: list[list[int]]) -> list[list[list[int]]]:
    """What each copy says, where one rank says so to the prompts in `slots`."""
    return [[reply for slot, reply in zip(slots, said, strict=True) if slot // SLOTS == copy] for copy in range(2)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_copies_reply_as_one_rank(case: str, place: str, ranks: Ranks, tmp_path: Path) -> None:
    model, file = saved(case, tmp_path)
    said, slots = replies(None, model, file, None), PLACES[place]
    assert len({token for reply in said for token in reply}) > 2  # decided, and not all alike
    assert ranks.run(replies, model, file, slots) == of_copies(slots, said)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", ["dense, biases", "mixture"])
def test_captured_steps_have_one_size_on_all_copies(case: str, place: str, ranks: Ranks, tmp_path: Path) -> None:
    model, file = saved(case, tmp_path)
    said, slots = replies(None, model, file, None), PLACES[place]
    assert ranks.run(replies, model, file, slots, True) == of_copies(slots, said)


@pytest.mark.parametrize("case", ["mixture", "norms after the MLP"])
def test_each_copy_may_have_several_ranks(case: str, four: Ranks, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if case == "mixture" else {}
    model, file = saved(case, tmp_path, **heads)
    said, slots = replies(None, model, file, None), PLACES["both"]
    first, second = of_copies(slots, said)
    assert four.run(replies, model, file, slots) == [first, first, second, second]
