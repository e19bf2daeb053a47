"""Copies of states on a GPU: exact, without waiting for it; and conversations that go on from them, from all tiers."""

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
from engine.plugin.specs import KVGroup, KVSpec, StateGroup
from engine.worker.memory import States, allocate

CUDA = torch.device("cuda")
SIZES = {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
SIZES |= {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 257, "max_position_embeddings": 2048}
SIZES |= {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
CONVERSATIONS, TURNS = 10, 4
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_copies_are_exact_and_nobody_waits_for_them() -> None:
    groups = (StateGroup("a", 3, (5, 700), "float32"), StateGroup("b", 3, (77,), "bfloat16"))
    spec = KVSpec(16, (KVGroup(4, (2, 16, 64), "bfloat16"), KVGroup(1, (16, 9), "uint8")), groups)
    caches, pages = allocate(spec, 50, CUDA), np.random.default_rng(0).permutation(50)[: spec.state_pages + 2]
    states = States(spec, 4, CUDA, caches)
    for layers in states.layers.values():
        for layer in layers:
            layer.normal_()
    wanted = {name: [layer[3].clone() for layer in layers] for name, layers in states.layers.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        states.keep(3, pages.astype(np.int32))
        states.restore(1, pages.astype(np.int32))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, layers in states.layers.items():
        assert all(torch.equal(layer[1], kept) for layer, kept in zip(layers, wanted[name], strict=True))


def test_conversations_go_on_from_states_of_all_tiers(tmp_path: Path) -> None:
    """The device has room for three of them, the host for about as many more, and a disk for all."""
    save_checkpoint(tiny_model("Qwen3_5", **SIZES), tmp_path)
    draw = np.random.default_rng(0)
    texts = [draw.integers(1, 250, 1000).tolist() for _ in range(CONVERSATIONS)]
    options: dict[str, Any] = {"model": str(tmp_path), "device": "cuda", "dtype": "float32", "kv_tokens": 4 * 1300}
    options |= {"max_running": 4, "max_step_tokens": 1024, "spare_worker": False}
    rounds: list[tuple[list[list[int]], list[list[int]]]] = []
    with Engine(**options, prefix_cache=False) as engine:
        for _ in range(TURNS):
            asked = [texts[number] for number in draw.permutation(CONVERSATIONS)]
            replies = [reply.ids for reply in engine.generate(asked, GREEDY)]
            rounds.append((asked, replies))
            texts = [
                [*text, *ids, *draw.integers(1, 250, 80).tolist()] for text, ids in zip(asked, replies, strict=True)
            ]
    assert len({tuple(ids) for _, replies in rounds for ids in replies}) > 2 * CONVERSATIONS
    with Engine(**options) as engine:
        found = [[reply.cached_tokens for reply in engine.generate(asked, GREEDY)] for asked, _ in rounds]
        assert sum(map(sum, found)) > 0
    with Engine(**options, kv_host="40MiB", kv_disk=f"{tmp_path}/kv:2GiB", kv_fetch="always") as engine:
        cached, same = 0, 0
        for asked, wanted in rounds:
            replies = engine.generate(asked, GREEDY)
            cached += sum(reply.cached_tokens for reply in replies)
            same += sum(reply.ids == ids for reply, ids in zip(replies, wanted, strict=True))
        engine.generate([5], GREEDY)  # whose end brings the figures up to date
        moved = engine.stats().tiers
    # A chunk that ends elsewhere rounds otherwise, so where two tokens are as likely a reply may be another.
    assert same >= TURNS * CONVERSATIONS - 2 and cached > 10_000
    assert moved is not None and moved.from_host > 500 and moved.failed == 0
