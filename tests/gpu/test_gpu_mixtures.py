"""Mixtures of experts and FP8 models on a GPU: against transformers in float32, and in bfloat16 against themselves."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from oracle import described, tiny, tiny_model
from test_fp8 import BLOCKS, TENSORS, quantized, through_fp8

from engine.kernels.fp8.reference import E4M3
from engine.plugin.testing import MODEL_SCENARIOS, ModelHarness, check_model
from engine.testing.steps import step_plan
from engine.worker.experts import ExpertWatch
from engine.worker.steps.rows import Rows
from engine_plugins.attention.triton.mha import TritonAttention
from engine_plugins.models.llama import Llama
from engine_plugins.models.mixtral import Mixtral
from engine_plugins.models.qwen3_moe import Qwen3Moe
from engine_plugins.quantization.fp8 import Fp8

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "head_dim": 16}
FAMILIES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "qwen3": (Qwen3Moe, "Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "mixtral": (Mixtral, "Mixtral", {"num_local_experts": 4, "hidden_size": 96}),
    "llama": (Llama, "Llama", {"hidden_size": 96, "head_dim": 16}),
}
ON_A_GPU: dict[str, Any] = {"device": "cuda", "attention": TritonAttention}


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_mixtures_are_transformers(family: str, scenario: str) -> None:
    model, name, changes = FAMILIES[family]
    check_model(model, *tiny(name, **changes), scenario, tolerance=2e-3, **ON_A_GPU)


@pytest.mark.parametrize("way", ["blocks", "tensors"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scenario", ["whole", "greedy"])
def test_fp8_models_are_what_they_stand_for(family: str, way: str, scenario: str) -> None:
    """In float32 activations stay as they are."""
    model, name, changes = FAMILIES[family]
    config, tensors, reference = described(through_fp8(tiny_model(name, **changes), way))
    terms, end = (BLOCKS, "weight_scale_inv") if way == "blocks" else (TENSORS, "weight_scale")
    stored = quantized(tensors, way, end)
    check_model(model, config, stored, reference, scenario, tolerance=2e-3, quantization=Fp8(terms), **ON_A_GPU)


def harness(quantization: Fp8 | None) -> ModelHarness:
    """Of sizes at which FP8 activations and torch's products are used, on weights that a trained model might have."""
    changes = {**EXPERTS, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}
    config, tensors, _ = tiny("Qwen3Moe", **changes, max_position_embeddings=512, mlp_only_layers=[1])
    tensors = {name: each * (each.shape[-1] ** -0.5 * 5 if each.dim() > 1 else 1) for name, each in tensors.items()}
    made = ModelHarness(
        Qwen3Moe, config, tensors, quantization=quantization, dtype=torch.bfloat16, max_model_len=512, **ON_A_GPU
    )
    made.slots = 3
    made.order = made.order[made.order != made.each * 4 - 1][: made.each * 3]  # the last page is for padding
    return made


def whole(made: ModelHarness, ids: list[int]) -> Tensor:
    made.runner.apply(made.admit([ids]))
    return made.logits([(0, 0, len(ids))])[0].float()


@pytest.mark.parametrize("length", [3, 40, 400])
def test_fp8_in_bfloat16(length: int) -> None:
    """With FP8 activations from some tokens on: off by a few hundredths of the logits' spread."""
    ids = np.random.default_rng(0).integers(0, 96, length).tolist()
    plain, made = harness(None), harness(Fp8(None))
    kinds = {parameter.dtype for path, parameter in made.runner.model.named_parameters() if "proj" in path}
    assert E4M3 in kinds
    wanted, got = whole(plain, ids), whole(made, ids)
    error = (got - wanted).square().mean().sqrt() / wanted.std()
    assert 1e-4 < error < 0.25, f"off by {error:.3f} of the logits' spread"


@pytest.mark.parametrize("quantization", [None, Fp8(None)], ids=["bf16", "fp8"])
def test_graphs_route_anew_and_leave_padding_out(quantization: Fp8 | None) -> None:
    made = harness(quantization)
    runner = made.runner
    prompts = [np.random.default_rng(slot).integers(0, 96, length).tolist() for slot, length in enumerate((150, 70, 9))]
    runner.apply(made.admit(prompts))
    assert runner.capture(made.each * 4 - 1, False)
    rows = Rows.of(np.array([(slot, 0, len(ids), 1) for slot, ids in enumerate(prompts)]))
    steps = Rows.of(np.array([(slot, len(ids) - 1, 1, 1) for slot, ids in enumerate(prompts)]))
    watch = ExpertWatch(runner.model)
    watch.count("start")
    with torch.inference_mode():
        hidden, _ = runner.prompt_graphs[0].replay(rows)
        wanted, _ = runner.compute(rows)
        assert (hidden.float() - wanted.float()).abs().mean() < 0.02 * wanted.float().std()
        hidden, _ = runner.decode_graphs.replay(steps)
        wanted, _ = runner.compute(steps)
        assert (hidden.float() - wanted.float()).abs().mean() < 0.02 * wanted.float().std()
    counted = watch.count("stop")
    counts = np.frombuffer(counted.counts, "<i8").reshape(2, 8)
    assert counted.layers == (0, 2) and (counts.sum(axis=1) == 2 * (229 + 3) * 3).all()


@pytest.mark.parametrize("quantization", [None, Fp8(None)], ids=["bf16", "fp8"])
def test_launching_a_step_waits_for_nothing(quantization: Fp8 | None) -> None:
    made = harness(quantization)
    runner = made.runner
    admitted = made.admit([list(range(90)) * 4, list(range(70)), [5, 6, 7]])
    steps = [[(0, 0, 150, 0), (1, 0, 40, 0)], [(2, 0, 3, 1), (0, 150, 210, 1)], [(0, 360, 1, 1), (2, 3, 1, 1)]]
    packed = [step_plan(number, rows) for number, rows in enumerate(steps)]
    runner.apply(admitted)
    for plan in packed:
        runner.finish(runner.launch(plan))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [runner.launch(plan) for plan in packed]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(runner.finish(step).tokens) // 4 for step in launched] == [0, 2, 2]
