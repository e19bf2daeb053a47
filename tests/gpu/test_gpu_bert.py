"""A tiny seeded BERT on a GPU gives the vectors that it gives on a CPU, whatever rows are computed together."""

import numpy as np
import pytest
import torch

from engine.messages.step import VECTOR
from engine.plugin.testing import ModelHarness
from engine.testing.steps import step_plan
from engine_plugins.models.bert import Bert

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("lengths", [(21, 1, 64, 9), (16, 16, 16), (64,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_vectors_are_those_of_a_cpu(lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=96,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )
    config, tensors = model.config.to_dict(), dict(model.state_dict())
    prompts = [np.random.default_rng(length).integers(0, 96, length).tolist() for length in lengths]
    rows = [(slot, 0, length, VECTOR) for slot, length in enumerate(lengths)]
    made = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        harness = ModelHarness(Bert, config, tensors, device=device, dtype=kind)
        admits = harness.admit(prompts).admits
        done = harness.runner.finish(harness.runner.launch(step_plan(1, rows, admits)))
        made.append(np.frombuffer(done.vectors, "<f4").reshape(len(lengths), 256))
    assert np.abs(made[0] - made[1]).max() < tolerance
