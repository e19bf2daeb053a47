"""DeepSeek on a GPU against itself on a CPU in float32, on a tiny configuration with DeepSeek's latents: every way to
attend, whole and cached, and decode steps and prompts as CUDA graphs.

Tolerance: on a CPU bfloat16 is off by 0.018 of the logits' deviation, on average, from float32.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.layers import Build
from engine.plugin.registry import Plugins, resolve
from engine.plugin.testing import ModelHarness
from engine.testing.steps import step_plan
from engine.worker.steps.rows import Rows
from engine_plugins.attention.torch.mla import TorchLatentAttention
from engine_plugins.models.deepseek import Deepseek

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 96, "hidden_size": 256, "intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 128,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip
BACKENDS = [entry.name for entry in Plugins.load().latent_attention.values() if "cuda" in entry.devices]
LENGTH = 1024
LIMIT = 0.04  # of the logits' deviation, on average: a chosen expert may differ where two are about as good


def weights() -> dict[str, Tensor]:
    """Seeded, rounded to bfloat16, so that both devices have the same."""
    build = Build(
        dtype=torch.float32, device=torch.device("cpu"), page_size=16, max_model_len=LENGTH,
        attention_backend=TorchLatentAttention,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, layer in Deepseek(CONFIG, build).named_modules():
        for parameter, _ in layer.named_parameters(recurse=False):
            for name, shape in shapes(layer, path, parameter):
                scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
                tensors[name] = (torch.randn(shape, generator=generator) * scale + (len(shape) == 1)).bfloat16().float()
    return tensors


def shapes(layer: Any, path: str, parameter: str) -> list[tuple[str, tuple[int, ...]]]:
    weight, found = layer.get_parameter(parameter), []
    for name, part in layer.names(path, parameter):
        if hasattr(layer, "sizes") and part in layer.sizes:
            found.append((name, (layer.sizes[part], *weight.shape[1:])))
        elif parameter == "gate_up":
            found.append((name, (weight.shape[1] // 2, weight.shape[2])))
        else:
            found.append((name, tuple(weight.shape[1:] if parameter == "down" else weight.shape)))
    return found


class Harness(ModelHarness):
    page_size = 16
    slots = 4


def harness(name: str, tensors: dict[str, Tensor], **attributes: Any) -> ModelHarness:
    backend = type("Changed", (resolve(Plugins.load().latent_attention[name].target),), attributes)
    try:
        return Harness(
            Deepseek, CONFIG, tensors, attention=backend, device="cuda", dtype=torch.bfloat16, max_model_len=LENGTH
        )
    except ConfigError as error:
        pytest.skip(str(error))


def reference(tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    made = Harness(Deepseek, CONFIG, tensors, attention=TorchLatentAttention, max_model_len=LENGTH)
    made.runner.apply(made.admit([ids]))
    return made.logits([(0, 0, len(ids))])[0]


def at_least(least: int, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return lengths >= least


def assert_near(got: Tensor, wanted: Tensor) -> None:
    off = float((got.float().cpu() - wanted).abs().mean() / wanted.std())
    assert off < LIMIT, f"logits are off by {off:.3f} of their deviation on average"


@pytest.mark.parametrize("name", BACKENDS)
def test_absorbed_and_expanded_steps(name: str) -> None:
    tensors = weights()
    ids = np.random.default_rng(0).integers(0, 96, 700).tolist()
    wanted = reference(tensors, ids)
    for least, chunk in ((10_000, 10_000), (2, 10_000), (2, 100), (192, 300)):
        expands = partial(at_least, least)
        made = harness(name, tensors, expands=lambda _, *row, expands=expands: expands(*row), chunk_tokens=chunk)
        made.runner.apply(made.admit([ids, ids[:40]], cached=None))
        got = [made.logits([(0, 0, 300), (1, 0, 39)])[0], *(made.logits([(1, 39, 1), (0, 300, 399)])[1:])]
        got += made.logits([(0, 699, 1)])
        assert_near(torch.cat(got), wanted)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "torch"])
def test_graphs_replay_what_steps_do(name: str) -> None:
    tensors = weights()
    made = harness(name, tensors)
    runner = made.runner
    prompts = [np.random.default_rng(slot).integers(0, 96, length).tolist() for slot, length in enumerate((150, 70, 9))]
    made.slots = 3
    made.order = made.order[made.order != made.each * 4 - 1][: made.each * 3]
    runner.apply(made.admit(prompts))
    assert runner.capture(scratch_page=made.each * 4 - 1)
    rows = Rows.of(np.array([(slot, 0, len(ids), 1) for slot, ids in enumerate(prompts)]))
    with torch.inference_mode():
        assert runner.prompt_graphs[0].fits(rows)
        hidden, offsets = runner.prompt_graphs[0].replay(rows)
        logits = runner.model.logits(hidden).clone().split(np.diff(offsets).tolist())
        for got, ids in zip(logits, prompts, strict=True):
            assert_near(got, reference(tensors, ids))
        steps = [(slot, len(ids) - 1, 1, 1) for slot, ids in enumerate(prompts)]
        decodes = Rows.of(np.array(steps))
        assert runner.decode_graphs.fits(decodes)
        hidden, _ = runner.decode_graphs.replay(decodes)
        for got, ids in zip(runner.model.logits(hidden), prompts, strict=True):
            assert_near(got, reference(tensors, ids)[-1])
    assert runner.finish(runner.launch(step_plan(0, steps))).counts


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "torch"])
def test_launching_a_step_waits_for_nothing(name: str) -> None:
    """Expanded rows with and without a cached part, beside absorbed ones, and decode steps."""
    made = harness(name, weights(), chunk_tokens=100)
    runner = made.runner
    admitted = made.admit([list(range(90)) * 4, list(range(70)), [5, 6, 7]])
    steps = [
        [(0, 0, 150, 0), (1, 0, 40, 0)],
        [(2, 0, 3, 1), (0, 150, 210, 1), (1, 40, 30, 1)],
        [(0, 360, 1, 1), (1, 70, 1, 1)],
    ]
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
    assert [len(runner.finish(step).tokens) // 4 for step in launched] == [0, 3, 2]
