"""Launching a step never waits for the GPU, whatever its rows ask for, and draws in a graph what it draws outside."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from engine.errors import ConfigError
from engine.messages.step import SlotAdmit, StepPlan
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.plugin.testing import ModelHarness
from engine.testing.steps import step_plan
from engine.worker.backends import Backends
from engine.worker.steps.graphs import DecodeGraphs
from engine.worker.steps.warmup import FILTERED, PLAIN, everything
from engine_plugins.models.llama import Llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

CONFIG = {
    "vocab_size": 5000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,  # that of FlashInfer's kernels that may have been compiled before
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def tensors() -> dict[str, torch.Tensor]:
    layer = {f"self_attn.{name}_proj.weight": (256, 256) for name in "kv"}
    layer |= {"self_attn.q_proj.weight": (512, 256), "self_attn.o_proj.weight": (256, 512)}
    layer |= {"mlp.gate_proj.weight": (512, 256), "mlp.up_proj.weight": (512, 256), "mlp.down_proj.weight": (256, 512)}
    layer |= {"input_layernorm.weight": (256,), "post_attention_layernorm.weight": (256,)}
    shapes = {f"model.layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (5000, 256), "lm_head.weight": (5000, 256), "model.norm.weight": (256,)}
    return {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}


BACKENDS = [name for name in ("triton", "flashinfer") if find_spec(name) is not None]


def built(backend: str, graphs: bool) -> ModelHarness:
    chosen = Backends(Plugins.load((backend,)), "cuda").build
    try:
        harness = ModelHarness(Llama, CONFIG, tensors(), attention=chosen, device="cuda", dtype=torch.bfloat16)  # type: ignore[arg-type]
    except ConfigError as error:
        pytest.skip(str(error))
    if graphs:
        harness.runner.capture(scratch_page=int(harness.order[-1]))
    return harness


def test_a_graph_draws_what_is_drawn_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = built("triton", graphs=True)
    runner = harness.runner
    ids = [np.arange(length, dtype="<i4") + 7 for length in (20, 9, 30)]
    plan = harness.admit([row.tolist() for row in ids])
    asked = [Sampling(temperature, 0, 1.0, 0.0, seed) for seed, temperature in enumerate((0.0, 0.7, 1.3))]
    admits = tuple(SlotAdmit(slot, ids[slot].tobytes(), asked[slot], len(ids[slot])) for slot in range(3))
    prompts = step_plan(0, [(slot, 0, len(ids[slot]), 1) for slot in range(3)])
    runner.finish(runner.launch(replace(prompts, admits=admits, pages=plan.pages)))
    drawn = []
    for _ in range(2):
        for step in range(4):
            rows = [(slot, len(ids[slot]) + step, 1, 1) for slot in range(3)]
            drawn.append(runner.finish(runner.launch(step_plan(0, rows))).tokens)
        monkeypatch.setattr(DecodeGraphs, "draws", False)
    assert drawn[:4] == drawn[4:] and len(set(drawn)) > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("plain", [False, True], ids=["everything", "plain"])
def test_launching_a_step_waits_for_nothing(backend: str, graphs: bool, plain: bool) -> None:
    harness = built(backend, graphs)
    runner = harness.runner
    asked = (PLAIN,) * 3 if plain else (everything(5000), FILTERED, PLAIN)

    def plans() -> list[StepPlan]:
        """Prompts, a mixture, and steps of one token a row."""
        ids = [np.arange(length, dtype="<i4") + 7 for length in (20, 9, 30)]
        pages = harness.admit([row.tolist() for row in ids]).pages
        admits = tuple(SlotAdmit(slot, ids[slot].tobytes(), asked[slot], len(ids[slot])) for slot in range(3))
        steps = [[(0, 0, 20, 1), (1, 0, 5, 0)], [(0, 20, 1, 1), (1, 5, 4, 1), (2, 0, 30, 1)]]
        steps += [[(0, 21 + step, 1, 1), (1, 9 + step, 1, 1), (2, 30 + step, 1, 1)] for step in range(3)]
        first, *rest = (step_plan(0, rows) for rows in steps)
        return [replace(first, admits=admits, pages=pages), *rest]

    for plan in plans():
        runner.finish(runner.launch(plan))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [runner.launch(plan) for plan in plans()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done = [runner.finish(step) for step in steps]
    assert [len(step.tokens) // 4 for step in done] == [1, 3, 3, 3, 3]
    if not plain:
        assert all(len(step.logprobs) == 1 for step in done) and done[0].prompt_logprobs
