"""Pages of each kind come up from the host and from a disk as they went down: latents, numbers in FP8 with the scales
that layers hold, states of recurrent layers, and those behind pictures, which ids alone do not tell apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from oracle import tiny_model
from seeing import IMAGE, START, ask, filled, picture, qwen2_5_vl, saved
from test_qwen3_5 import DELTA
from tiny_checkpoint import assert_same, save_checkpoint
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from engine import Engine, Reply
from engine.messages.control import TierStats

TEXTS = 4
LENGTH = 280
OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 1, "page_size": 4, "max_model_len": 320, "max_running": 2}
OPTIONS |= {"kv_tokens": 420, "spare_worker": False}  # the device has room for one text and a half
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 512}
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
LATENT |= {"moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4}


def latents(folder: Path) -> dict[str, Any]:
    config = transformers.DeepseekV3Config(**SIZES, **LATENT)
    save_checkpoint(filled(transformers.DeepseekV3ForCausalLM(config)), folder)
    return {}


def latents_in_fp8(folder: Path) -> dict[str, Any]:
    return {**latents(folder), "kv_dtype": "fp8"}


def states(folder: Path) -> dict[str, Any]:
    sizes = {**DELTA, "num_hidden_layers": 8, "max_position_embeddings": 512}
    save_checkpoint(tiny_model("Qwen3_5", **sizes), folder)
    return {}


def pictures(folder: Path) -> dict[str, Any]:
    size = {"size": {"shortest_edge": 64, "longest_edge": 2048}}
    saved(qwen2_5_vl(), folder, image_processor=Qwen2VLImageProcessorPil(**size, patch_size=4).to_dict())
    return {"media_processes": 1}


def asked(engine: Engine, sees: bool, times: int = 1) -> list[Reply]:
    """The last replies to texts that are asked for so many `times` in a row. They differ in ids, or in a picture."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(1, 90, LENGTH - 20 * sees).tolist() for _ in range(TEXTS)]
    shown = [[picture(number, 32, 40)] for number in range(TEXTS)] if sees else [[]] * TEXTS
    if sees:
        texts = [[5, 6, START, IMAGE, *texts[0]]] * TEXTS
    wanted = {"max_tokens": 6, "logprobs": 4}
    told = [[ask(engine, ids, media, **wanted) for _ in range(times)] for ids, media in zip(texts, shown, strict=True)]
    return [replies[-1] for replies in told]


@pytest.mark.parametrize("kind", [latents, latents_in_fp8, states, pictures])
def test_replies_are_the_same_wherever_pages_have_been(kind: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    model, sees = tmp_path / "model", kind is pictures
    options = {**OPTIONS, "model": str(model), **kind(model), "kv_host": "1MiB", "kv_disk": f"{tmp_path}/kv:64MiB"}
    with Engine(**options) as engine:
        # With pages of the device; of a short prompt a state is kept the second time.
        wanted = asked(engine, sees, times=3 if kind is states else 2)
        before = figures(engine)
        assert before.from_host == 0 and len({tuple(reply.ids) for reply in wanted}) == TEXTS
        for _ in range(2):
            again = asked(engine, sees)
            assert_same(again, wanted, 0.0)
            assert [reply.cached_tokens for reply in again] == [reply.cached_tokens for reply in wanted]
        while (after := figures(engine)).to_keep:
            pass
        assert after.from_host >= 2 * TEXTS * 64 and after.failed == 0
    with Engine(**options, kv_fetch="always") as engine:
        assert_same(asked(engine, sees), wanted, 0.0)
        after = figures(engine)
        assert after.from_store >= TEXTS * 64 and after.failed == 0


def figures(engine: Engine) -> TierStats:
    """By now: the end of a reply brings them up to date."""
    ask(engine, [7], [], max_tokens=1)
    tiers = engine.stats().tiers
    assert tiers is not None
    return tiers
