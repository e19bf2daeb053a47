"""Pages that move on streams of a GPU while steps run beside: the same ids as without tiers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from oracle import tiny_model
from tiny_checkpoint import save_checkpoint

from engine import Engine, SamplingParams

# A page is a MiB: a conversation of 64 pages is more than a stream is given at once.
SIZES = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
SIZES |= {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 257, "max_position_embeddings": 2048}
CONVERSATIONS, ROUNDS = 12, 4
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("policy", ["write-through", "write-back"])
def test_whatever_moves_beside_steps_replies_are_the_same(policy: str, tmp_path: Path) -> None:
    """The device has room for five conversations, the host for six more, and a disk for all. Four run at a time."""
    model = tiny_model("Llama", **SIZES)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.16)
    save_checkpoint(model, tmp_path)
    draw = np.random.default_rng(0)
    texts = [draw.integers(1, 250, 1000).tolist() for _ in range(CONVERSATIONS)]
    options: dict[str, Any] = {"model": str(tmp_path), "device": "cuda", "dtype": "float32", "kv_tokens": 5 * 1100}
    options |= {"max_running": 4, "max_step_tokens": 1024, "spare_worker": False}
    rounds: list[tuple[list[list[int]], list[list[int]]]] = []
    with Engine(**options) as engine:
        for _ in range(ROUNDS):
            asked = [texts[number] for number in draw.permutation(CONVERSATIONS)]
            replies = [reply.ids for reply in engine.generate(asked, GREEDY)]
            rounds.append((asked, replies))
            texts = [
                [*text, *ids, *draw.integers(1, 250, 20).tolist()] for text, ids in zip(asked, replies, strict=True)
            ]
    assert len({tuple(ids) for _, replies in rounds for ids in replies}) > 3 * CONVERSATIONS
    tiers = {"kv_host": "420MiB", "kv_disk": f"{tmp_path}/kv:2GiB", "kv_policy": policy}
    with Engine(**options, **tiers) as engine:
        for asked, wanted in rounds:
            assert [reply.ids for reply in engine.generate(asked, GREEDY)] == wanted
        engine.generate([5], GREEDY)  # whose end brings the figures up to date
        moved = engine.stats().tiers
    assert moved is not None and moved.down > 8 * 64 and moved.from_host > 100 and moved.failed == 0
