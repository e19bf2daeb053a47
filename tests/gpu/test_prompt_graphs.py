"""Steps with prompts on a GPU: a graph of them leaves what the same step leaves without one."""

from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


from oracle import tiny

from engine.errors import ConfigError
from engine.plugin.testing import ModelHarness
from engine.worker.steps.rows import Rows
from engine_plugins.attention.hybrid import HybridAttention
from engine_plugins.attention.triton.mha import TritonAttention
from engine_plugins.models.qwen import Qwen

LONGEST = 2048
WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}


@pytest.fixture(scope="module", params=[TritonAttention, HybridAttention])
def made(request: pytest.FixtureRequest) -> ModelHarness:
    """70 requests of up to 2,048 positions, all with prompts, and graphs of all steps."""
    config, tensors, _ = tiny("Qwen3", **WIDE, max_position_embeddings=LONGEST)
    tensors = {name: each * (each.shape[-1] ** -0.5 * 5 if each.dim() > 1 else 1) for name, each in tensors.items()}

    class Harness(ModelHarness):
        page_size, slots = 16, 70

    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "max_model_len": LONGEST}
    try:
        made = Harness(Qwen, config, tensors, attention=request.param, **options)
    except ConfigError as error:
        pytest.skip(str(error))
    made.slots -= 1
    made.order = made.order[made.order != made.each * 70 - 1][: made.each * 69]  # the last page is for padding
    prompts = [np.random.default_rng(slot).integers(0, 90, LONGEST).tolist() for slot in range(69)]
    made.runner.apply(made.admit(prompts))
    for slot in range(0, 69, 3):  # so that there is something in the cache to be seen
        made.logits([(slot + more, 0, LONGEST) for more in range(3)])
    assert made.runner.capture(made.each * 70 - 1)
    return made


STEPS = {
    "a few prompts": [(slot, 100 * slot, 50 + slot) for slot in range(9)],
    "one long prompt": [(3, 0, 2048)],
    "many decode rows and a prompt": [*((slot, 300 + slot, 1) for slot in range(68)), (68, 0, 400)],
    "many decode rows and long prompts": [
        *((slot, 20 * slot, 1) for slot in range(60)),
        *((slot, 128 * (slot - 60), 700) for slot in range(60, 69)),
    ],
    "many prompts": [(slot, 0, 118) for slot in range(69)],
}


@pytest.mark.parametrize("step", STEPS)
@torch.inference_mode()
def test_a_replayed_step_is_the_step(made: ModelHarness, step: str) -> None:
    runner, rows = made.runner, Rows.of(np.array([(*row, 1) for row in STEPS[step]]))
    chosen = [graphs for graphs in runner.prompt_graphs if graphs.fits(rows)]
    assert chosen, "there is a graph for it"
    wanted, batch = runner.compute(rows)
    hidden, offsets = chosen[0].replay(rows)
    assert offsets.tolist() == batch.offsets.tolist()
    assert torch.isfinite(hidden).all()
    assert (hidden.float() - wanted.float()).abs().mean() < 0.02 * wanted.float().std()
    worst = (hidden.float() - wanted.float()).abs().amax(1)
    assert (worst < wanted.float().abs().amax()).all(), "no token is another"
