"""Mixtures of experts against Hugging Face transformers on seeded tiny configurations, in float32."""

import numpy as np
import pytest
import torch
from oracle import tiny

from engine.errors import RequestError
from engine.messages.questions import ExpertMap, ExpertWindow
from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine.worker.experts import ExpertWatch, experts_of, joined, routers_of
from engine.worker.weights import fill_at_random
from engine_plugins.models.llama import Llama
from engine_plugins.models.mixtral import Mixtral
from engine_plugins.models.qwen3_moe import Qwen3Moe

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
CASES = {
    "qwen3": (Qwen3Moe, "Qwen3Moe", EXPERTS),
    "qwen3, weights that sum to one, some layers": (
        Qwen3Moe,
        "Qwen3Moe",
        {**EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ),
    "qwen3, one expert, dense layers": (
        Qwen3Moe,
        "Qwen3Moe",
        {**EXPERTS, "num_experts_per_tok": 1, "mlp_only_layers": [1]},
    ),
    "mixtral": (Mixtral, "Mixtral", {"num_local_experts": 4}),
    "mixtral, window": (Mixtral, "Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    model, family, changes = CASES[request.param]
    return model, *tiny(family, **changes)


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_mixtures_are_transformers(case, scenario):
    model, config, tensors, reference = case
    check_model(model, config, tensors, reference, scenario)


@pytest.mark.parametrize("name", ["experts.7.down_proj", "experts.5.up_proj", "experts.0.gate_proj", "gate"])
def test_each_expert_and_the_router_matter(name):
    config, tensors, reference = tiny("Qwen3Moe", **EXPERTS)
    name = f"model.layers.1.mlp.{name}.weight"
    tensors[name] = tensors[name] + 0.3 * torch.randn_like(tensors[name])
    with pytest.raises(AssertionError, match="off by"):
        check_model(Qwen3Moe, config, tensors, reference, "whole")


def test_choices_are_counted_while_they_are_asked_for():
    config, tensors, _ = tiny("Qwen3Moe", **EXPERTS, mlp_only_layers=[1])
    harness = ModelHarness(Qwen3Moe, config, tensors)
    model = harness.runner.model
    harness.runner.apply(harness.admit([list(range(20))]))
    watch = ExpertWatch(model)

    def count(action):
        counted = watch.count(action)
        assert counted.layers == (0, 2)
        return counted.counting, np.frombuffer(counted.counts, "<i8").reshape(2, 8)

    harness.logits([(0, 0, 4)])
    assert not count("look")[1].any()
    count("start")
    harness.logits([(0, 4, 6)])
    on, first = count("look")
    assert on and first.sum(axis=1).tolist() == [6 * 3, 6 * 3]
    harness.logits([(0, 10, 5)])
    on, second = count("stop")
    assert not on and second.sum(axis=1).tolist() == [11 * 3, 11 * 3] and (second >= first).all()
    harness.logits([(0, 15, 5)])
    assert (count("look")[1] == second).all()
    assert not count("start")[1].any()


def test_windows_tell_how_choices_change():
    """Balance and drift of two layers, whose experts lie as if on two ranks, are those counted by hand."""
    config, tensors, _ = tiny("Qwen3Moe", **EXPERTS, mlp_only_layers=[1])
    model = ModelHarness(Qwen3Moe, config, tensors).runner.model
    watch = ExpertWatch(model, window=4)
    routers, experts = list(routers_of(model).values()), experts_of(model)
    for layer in experts:
        layer.placement = np.arange(8, dtype=np.int32).reshape(2, 4)
    chosen = [  # in each window, of each layer
        ([8, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]),
        ([4, 0, 0, 0, 4, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]),
        ([0] * 8, [0] * 8),
        ([3, 0, 0, 0, 0, 0, 0, 1], [6, 0, 0, 0, 2, 0, 0, 0]),
    ]
    for counts in chosen:
        watch.step()
        for router, line in zip(routers, counts, strict=True):
            router.counts += torch.tensor(line)
        for _ in range(3):
            watch.step()
    for _ in range(8):
        watch.step()
    found = watch.look(now=False)
    assert found.layers == (0, 2) and found.ranks == 2
    assert np.frombuffer(found.counts, "<i8").reshape(2, 8).sum(axis=1).tolist() == [20, 24]
    assert np.frombuffer(found.loads, "<f8").tolist() == [15, 5, 8 + 6, 8 + 2]
    said = [(each.step, each.choices, each.balance, each.drift) for each in found.windows]
    assert said == [(4, 16, 1.5, 0.0), (8, 16, 1.0, 0.25), (16, 12, 1.5, (0.5 + 0.75) / 2)], (
        "a window without choices is none"
    )
    routers[0].counts += 1
    assert np.frombuffer(watch.look(now=True).counts, "<i8").sum() == 20 + 24 + 8


def test_maps_of_stages_join_by_the_windows_that_all_have():
    windows = [ExpertWindow(4, 10, 1.0, 0.0), ExpertWindow(8, 20, 3.0, 0.5)]
    numbers = {"placement": b"ab", "counts": b"c", "loads": b"d", "moved": 2}
    one = ExpertMap((0, 1, 2), 2, windows=tuple(windows), **numbers)
    two = ExpertMap((3,), 2, windows=(ExpertWindow(8, 5, 1.0, 0.1),), **numbers)
    found = joined([one, two])
    assert found.layers == (0, 1, 2, 3) and found.placement == b"abab" and found.moved == 4
    (window,) = found.windows
    assert (window.step, window.choices, window.balance) == (8, 25, 2.5) and abs(window.drift - 0.4) < 1e-9


def test_dummy_weights_with_ties_choose_the_same_experts_for_all_tokens():
    config, tensors, _ = tiny("Qwen3Moe", **EXPERTS)
    harness = ModelHarness(Qwen3Moe, config, tensors)
    model, tokens = harness.runner.model, list(range(20))
    chosen = []
    for ties in (False, True):
        fill_at_random(model, ties)
        watch = ExpertWatch(model)
        watch.count("start")
        harness.runner.apply(harness.admit([tokens]))
        harness.logits([(0, 0, len(tokens))])
        counts = np.frombuffer(watch.count("stop").counts, "<i8").reshape(-1, 8)
        chosen.append((counts > 0).sum(axis=1))
    even, tied = chosen
    assert (even > 3).all() and (tied == 3).all()


def test_a_model_without_experts_says_so():
    model = ModelHarness(Llama, *tiny("Llama")[:2]).runner.model
    with pytest.raises(RequestError, match="no experts"):
        ExpertWatch(model).count("start")
