"""Models of every kind behind servers of one rank and of several, whatever is asked of them, in float32.

`make test-parallel` runs all of these; `make test` those of the real model that do not need one rank beside three, and
one case of each kind elsewhere in this folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import tiny_model
from smollm2 import COUNTING, COUNTING_IDS, FRANCE, FRANCE_LOGITS, GREEDY, LETTERS, LETTERS_IDS
from tiny_checkpoint import ASKED, assert_same, save_checkpoint

from engine import Engine, EngineError, SamplingParams

pytestmark = pytest.mark.timeout(600)
OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 1, "max_running": 16, "kv_tokens": 2048, "page_size": 4}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [1, 6, 1, 8] * 9]
SIZES = {"vocab_size": 128, "eos_token_id": 127, "num_attention_heads": 4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
LATENT = {
    **{"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "num_key_value_heads": 4},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 20},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "key-value heads repeated": ("Llama", {"num_key_value_heads": 1}),
    "gemma": ("Gemma3", {"head_dim": 8, "sliding_window": 7}),
    "mixture": ("Qwen3Moe", EXPERTS),
    "latent attention": ("DeepseekV3", LATENT),
}


@pytest.mark.matrix
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_reply_as_one(family: str, tp: int, tmp_path: Path) -> None:
    name, changes = FAMILIES[family]
    save_checkpoint(tiny_model(name, **{**SIZES, **changes}), tmp_path)
    said = []
    for ranks in (1, tp):
        with Engine(model=str(tmp_path), tp=ranks, **OPTIONS) as engine:
            said.append(engine.generate([PROMPTS[0]] * len(ASKED), list(ASKED.values())))
            said[-1] += engine.generate(PROMPTS, ASKED["scored"])
    assert len({token for reply in said[0] for token in reply.ids}) > 8
    assert_same(said[1], said[0])


def test_smollm2_on_three_ranks() -> None:
    """It has 9 query heads and 3 of keys and values."""
    with Engine(model="smollm2-135m", tp=3, device="cpu", max_model_len=512, max_running=8) as engine:
        said = engine.generate([COUNTING, LETTERS], GREEDY)
        (scored,) = engine.generate(FRANCE, SamplingParams(temperature=0, max_tokens=1, logprobs=5)).logprobs
    assert [reply.ids for reply in said] == [COUNTING_IDS, LETTERS_IDS]
    known = torch.tensor(list(FRANCE_LOGITS.values()))
    assert [top.id for top in scored.top] == list(FRANCE_LOGITS)
    ours = torch.tensor([top.logprob for top in scored.top])
    torch.testing.assert_close(ours - ours[0], known - known[0], atol=2e-4, rtol=0)


@pytest.mark.matrix
def test_smollm2_scores_on_three_ranks_as_on_one() -> None:
    prompts, scored = [COUNTING, LETTERS, FRANCE], SamplingParams(temperature=0, max_tokens=8, logprobs=5)
    said = []
    for tp in (1, 3):
        with Engine(model="smollm2-135m", tp=tp, device="cpu", max_model_len=512, max_running=8) as engine:
            assert [reply.ids for reply in engine.generate(prompts[:2], GREEDY)] == [COUNTING_IDS, LETTERS_IDS]
            said.append(engine.generate(prompts, scored))
    assert_same(said[1], said[0])


def test_smollm2_on_two_ranks_is_refused_in_words() -> None:
    with (
        pytest.raises(EngineError, match=r"9 query heads do not divide over 2 ranks .*--tp"),
        Engine(model="smollm2-135m", tp=2, device="cpu"),
    ):
        pass
