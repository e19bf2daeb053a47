"""Which experts a token gets, and at what weight, against the modules of Hugging Face transformers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from engine.errors import ConfigError
from engine.kernels.experts.reference import MoeOps, Places, Routing
from engine.parallel.placement import table_of

SIZE, EXPERTS, TOP_K = 24, 16, 4
V2 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
V3 = {**V2, "norm_topk_prob": True, "corrected": True}
SIGMOID = {"scoring": "sigmoid", "groups": 4, "kept_groups": 2, "group_best": 2, "scale": 1.5}
CASES = {
    "mixtral": (MixtralTopKRouter, {}, {"normalised": True}),
    "qwen3": (Qwen3MoeTopKRouter, {"norm_topk_prob": False}, {}),
    "qwen3, normalised": (Qwen3MoeTopKRouter, {"norm_topk_prob": True}, {"normalised": True}),
    "v2, greedy": (DeepseekV2TopkRouter, {**V2, "topk_method": "greedy"}, {"scale": 1.5}),
    "v2, groups": (
        DeepseekV2TopkRouter,
        {**V2, "topk_method": "group_limited_greedy"},
        {"groups": 4, "kept_groups": 2, "scale": 1.5},
    ),
    "v3": (DeepseekV3TopkRouter, V3, {**SIGMOID, "normalised": True}),
    "v3, not normalised": (DeepseekV3TopkRouter, {**V3, "norm_topk_prob": False}, SIGMOID),
}


@pytest.mark.parametrize("case", CASES)
def test_choices_and_weights_are_those_of_transformers(case: str) -> None:
    kind, terms, fields = CASES[case]
    config = {"hidden_size": SIZE, "num_experts_per_tok": TOP_K, "num_experts": EXPERTS, "num_local_experts": EXPERTS}
    theirs = kind(SimpleNamespace(**config, **terms))
    generator = torch.Generator().manual_seed(0)
    theirs.weight.data = torch.randn(EXPERTS, SIZE, generator=generator) * 0.4
    bias = torch.rand(EXPERTS, generator=generator) if terms.get("corrected") else None
    if bias is not None:
        theirs.e_score_correction_bias = bias
    hidden = torch.randn(50, SIZE, generator=generator)
    with torch.inference_mode():
        _, weights, experts = theirs(hidden)
        ops = MoeOps()
        got = ops.route(ops.gate(hidden, theirs.weight), bias, Routing(experts=EXPERTS, top_k=TOP_K, **fields))
    wanted = torch.zeros(50, EXPERTS).scatter(1, experts, weights)
    assert got.weights.dtype == torch.float32 and got.experts.dtype == torch.int64
    assert all(len(set(row)) == TOP_K for row in got.experts.tolist())
    torch.testing.assert_close(torch.zeros(50, EXPERTS).scatter(1, got.experts, got.weights), wanted)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"experts": 6, "top_k": 7}, "cannot choose 7 of the 6 experts"),
        ({"experts": 6, "top_k": 1, "groups": 4}, "6 experts do not divide into 4 groups"),
        ({"experts": 8, "top_k": 5, "groups": 4, "kept_groups": 2}, "at most 4"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Routing(**fields)


def test_the_bias_changes_choices_but_not_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    routing = Routing(experts=4, top_k=1, scoring="sigmoid")
    assert MoeOps().route(logits, None, routing).experts.tolist() == [[0]]
    biased = MoeOps().route(logits, torch.tensor([0.0, 0.0, 0.0, 5.0]), routing)
    assert biased.experts.tolist() == [[3]]
    torch.testing.assert_close(biased.weights, torch.sigmoid(logits[:, 3:]))


def test_tokens_take_the_copies_of_an_expert_in_turn() -> None:
    """Of expert 0, which two of three ranks hold; what another rank holds is nobody's choice here, and padding too."""
    placement = np.array([[0, 1], [2, 0], [3, 4]], np.int32)
    logits = torch.tensor([[9.0, 8.0, 0.0, 0.0, 0.0]] * 5)
    routing, real = Routing(experts=5, top_k=2), torch.tensor([4])
    chosen = []
    for rank in range(3):
        places = Places(torch.from_numpy(table_of(placement, rank, 5, 2)), 2)
        counts = torch.zeros(5, dtype=torch.int64)
        routed = MoeOps().route(logits, None, routing, counts, real, places)
        assert counts.tolist() == [4, 4, 0, 0, 0], "what is chosen, wherever it lies"
        assert ((routed.weights > 0) == (routed.experts >= 0)).all()
        chosen.append(routed.experts.tolist())
    assert chosen[0] == [[0, 1], [-1, 1], [0, 1], [-1, 1], [-1, -1]]
    assert chosen[1] == [[-1, -1], [1, -1], [-1, -1], [1, -1], [-1, -1]]
    assert chosen[2] == [[-1, -1]] * 5
