"""Two ranks, two processes: a model divided between them gives the greedy ids of the whole one, in float32."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import tiny
from ranks import Ranks, open_ranks

from engine.parallel.groups import Groups
from engine.plugin.registry import resolve
from engine.plugin.testing import ModelHarness

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
MODELS = "engine_plugins.models"
CASES = {
    "llama": (f"{MODELS}.llama:Llama", "Llama", {}),
    "tied, one key-value head for both, a vocabulary that does not divide": (
        f"{MODELS}.llama:Llama",
        "Llama",
        {"num_key_value_heads": 1, "vocab_size": 97, "tie_word_embeddings": True},
    ),
    "biases, a vocabulary that does not divide": (
        f"{MODELS}.llama:Llama",
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "vocab_size": 95},
    ),
    "mixture": (f"{MODELS}.qwen3_moe:Qwen3Moe", "Qwen3Moe", EXPERTS),
}
COUNT = 24


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("ranks"), tp=2) as opened:
        yield opened


def prompts(vocab_size: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab_size, length).tolist() for length in (21, 9, 14)]


def replies(groups: Groups | None, model: str, file: Path) -> tuple[list[list[int]], NDArray[np.float32]]:
    """What the model of `file` says to each prompt, and its logits at each token of the first."""
    config, tensors = pickle.loads(file.read_bytes())
    harness = ModelHarness(resolve(model), config, tensors, groups=groups)
    asked = prompts(config["vocab_size"])
    said = harness.greedy(asked, COUNT)
    (logits,) = harness.logits([(0, 0, len(asked[0]))])
    return said, logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_reply_as_one(case: str, ranks: Ranks, tmp_path: Path) -> None:
    model, family, changes = CASES[case]
    file = tmp_path / "model"
    config, tensors, _ = tiny(family, **changes)
    for name, tensor in tensors.items():
        if name.endswith("_proj.bias"):
            tensor.sub_(0.5)  # around zero, or one token would be all replies
    file.write_bytes(pickle.dumps((config, tensors)))
    said, logits = replies(None, model, file)
    assert len({token for reply in said for token in reply}) > 3
    one, two = ranks.run(replies, model, file)
    assert one[0] == two[0] == said
    assert np.array_equal(one[1], two[1])
    np.testing.assert_allclose(one[1], logits, atol=1e-4)
