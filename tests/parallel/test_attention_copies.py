"""Attention in copies, each on ranks of its own: the greedy ids of one rank in float32, wherever requests are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import tiny
from rank_replies import again, choices, replies, vectors, written
from test_tensor_parallel import DELTA, EXPERTS, LATENT, MODELS, save_bert
from torch.nn import functional

from engine.config import resolve as resolve_options
from engine.errors import ConfigError
from engine.layers.batch import Spread
from engine.layers.delta import MEMORY, WINDOW
from engine.parallel.groups import CPU, Groups
from engine.parallel.mesh import Mesh
from engine.plugin.testing import ModelHarness
from engine.runtime.copies import check_copies
from engine.testing.ranks import Ranks, open_ranks
from engine_plugins.models.echo import Echo
from engine_plugins.models.llama import Llama

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense, biases": (f"{MODELS}.llama:Llama", "Llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 95}),
    "mixture": (f"{MODELS}.qwen3_moe:Qwen3Moe", "Qwen3Moe", EXPERTS),
    "latent attention, shared experts": (f"{MODELS}.deepseek:Deepseek", "DeepseekV3", {**LATENT, "q_lora_rank": 20}),
    "norms after the MLP": (f"{MODELS}.gemma:Gemma3", "Gemma3", {"head_dim": 8, "sliding_window": 7}),
    "states, a mixture": (f"{MODELS}.qwen3_5:Qwen35", "Qwen3_5Moe", {**EXPERTS, **DELTA}),
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
@pytest.mark.parametrize("case", ["dense, biases", "mixture", "states, a mixture"])
def test_captured_steps_have_one_size_on_all_copies(case: str, place: str, ranks: Ranks, tmp_path: Path) -> None:
    model, file = saved(case, tmp_path)
    said, slots = replies(None, model, file, None), PLACES[place]
    assert ranks.run(replies, model, file, slots, True) == of_copies(slots, said)


def test_an_idle_copy_writes_to_its_scratch_page_alone(ranks: Ranks, tmp_path: Path) -> None:
    idle, busy = ranks.run(written, *saved("mixture", tmp_path), PLACES["one is idle"])
    scratch = 16 * SLOTS  # a sequence has up to 16 pages
    assert idle == [scratch]
    assert len(busy) > 10 and scratch not in busy


@pytest.mark.parametrize("place", PLACES)
def test_each_copy_keeps_states_of_its_own_requests(place: str, ranks: Ranks, tmp_path: Path) -> None:
    """Slots that had other requests begin anew, and a copy without requests changes its scratch line alone."""
    (model, file), slots = saved("states, a mixture", tmp_path), PLACES[place]
    wanted = of_copies(slots, replies(None, model, file, None)[::-1])
    for copy, (own, lines) in enumerate(ranks.run(again, model, file, slots)):
        assert own == wanted[copy]
        held = [slot % SLOTS for slot in slots if slot // SLOTS == copy]
        assert lines == dict.fromkeys((WINDOW, MEMORY), held or [SLOTS])


def test_padding_of_copies_chooses_no_expert(ranks: Ranks, tmp_path: Path) -> None:
    model, file = saved("mixture", tmp_path)
    alone = choices(None, model, file, None)
    assert sum(alone) > 0
    for slots in PLACES.values():  # all ranks route the tokens of all copies
        assert ranks.run(choices, model, file, slots) == [alone, alone]


@pytest.mark.parametrize("slots", PLACES.values(), ids=PLACES)
def test_copies_embed_as_one_rank(slots: tuple[int, ...], ranks: Ranks, tmp_path: Path) -> None:
    save_bert(tmp_path / "model")
    whole = vectors(None, tmp_path / "model")
    for copy, own in enumerate(ranks.run(vectors, tmp_path / "model", slots)):
        np.testing.assert_allclose(own, whole[[slot // SLOTS == copy for slot in slots]], atol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("case", ["mixture", "norms after the MLP", "states, a mixture"])
def test_each_copy_may_have_several_ranks(case: str, four: Ranks, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if "mixture" in case else {}
    model, file = saved(case, tmp_path, **heads)
    said, slots = replies(None, model, file, None), PLACES["both"]
    first, second = of_copies(slots, said)
    assert four.run(replies, model, file, slots) == [first, first, second, second]


@given(counts=st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any), most=st.integers(5, 7))
def test_tokens_of_copies_lie_together_and_come_back(counts: list[int], most: int) -> None:
    for spread in (Spread.of(counts, CPU), Spread.captured(torch.tensor(counts), most)):
        numbers = [torch.arange(count) + 100 * copy for copy, count in enumerate(counts)]
        padded = [functional.pad(each, (0, spread.most - len(each)), value=-1) for each in numbers]
        gathered = torch.cat(padded)
        together = gathered if spread.order is None else gathered[spread.order]
        assert torch.equal(together[: sum(counts)], torch.cat(numbers))
        assert len(together) == (len(counts) * most if not spread.counts else sum(counts))
        back = together if spread.back is None else together[spread.back]
        for copy, each in enumerate(back.view(len(counts), -1)):
            assert torch.equal(each[: counts[copy]], numbers[copy])


def test_what_does_not_run_in_copies_is_refused_in_words() -> None:
    config, tensors, _ = tiny("Llama")
    assert config["num_attention_heads"] == 6
    groups = Groups.apart(Mesh(0, tp=8, dp=2))
    with pytest.raises(ConfigError, match=r"6 query heads do not divide over 4 ranks .*--tp over --dp-attention"):
        ModelHarness(Llama, config, tensors, groups=groups)
    with pytest.raises(ConfigError, match=r"Echo runs with one copy of attention, and there are 2"):
        ModelHarness(Echo, {}, {}, groups=Groups.apart(Mesh(0, tp=2, dp=2)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dp_attention": 4, "max_running": 3}, "--max-running 3 leaves no requests for some of the 4 copies"),
        ({"dp_attention": 4, "max_step_tokens": 3}, "--max-step-tokens 3 leaves no tokens for some of the 4 copies"),
    ],
)
def test_options_of_copies_that_do_not_go_together_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_copies(resolve_options(options))


def test_copies_alone_say_how_many_ranks_there_are() -> None:
    found = resolve_options({"dp_attention": 4}).parallel
    assert (found.tp, found.ranks, list(found.reporters)) == (4, 4, [0, 1, 2, 3])
    found = resolve_options({"dp_attention": 2, "tp": 4, "pp": 2})
    assert (found.parallel.ranks, list(found.parallel.reporters)) == (8, [4, 6])
    check_copies(found)
