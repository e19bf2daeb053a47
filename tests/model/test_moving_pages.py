"""The real model with a device cache of 64 pages, so that everything moves: the same ids as without tiers. And a tiny
one whose layers see a window, or all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tiny_checkpoint import assert_same
from tokenizers import Tokenizer, models

from engine import Engine, Reply, SamplingParams

ODD_STORE = str(Path(__file__).parents[1] / "lib" / "odd_store.py")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
OPTIONS: dict[str, Any] = {"model": "smollm2-135m", "max_model_len": 400, "kv_tokens": 1024, "max_running": 3}


def prompts() -> list[list[int]]:
    """Together more than the device has room for; the last two share their beginning."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(1000, 40_000, 262).tolist() for _ in range(5)]
    return [*texts, [*texts[-1][:220], *draw.integers(1000, 40_000, 45).tolist()]]


def test_whatever_moves_replies_are_the_same(tmp_path: Path) -> None:
    """Below a store that forgets half of the pages that it is given, and below a disk that an engine before has
    filled."""
    disk: dict[str, Any] = {"kv_host": "68MiB", "kv_disk": f"{tmp_path}:1GiB"}
    with Engine(**OPTIONS, **disk) as engine:
        wanted = [reply.ids for reply in engine.generate(prompts(), [GREEDY] * 6)]
        while (tiers := engine.stats().tiers) is None or tiers.kept < 5 * 16 + 3:
            engine.generate([5], GREEDY)  # whose end brings the figures up to date
        assert tiers.from_host == tiers.from_store == 0  # so that is what they are without tiers
    with Engine(**OPTIONS, kv_host="68MiB", kv_disk="odd:1GiB", plugins=(ODD_STORE,)) as engine:
        for _ in range(2):
            replies: list[Reply] = engine.generate(prompts(), [GREEDY] * 6)
            assert [reply.ids for reply in replies] == wanted
        assert sum(reply.cached_tokens for reply in replies) > 3 * 240
        engine.generate([5], GREEDY)
        tiers = engine.stats().tiers
    assert tiers is not None and tiers.down >= 75 and tiers.kept > 10
    assert tiers.from_host > 30 and tiers.failed > 10
    assert tiers.stores == {"pages_written": tiers.kept}
    with Engine(**OPTIONS, **disk) as engine:
        replies = [engine.generate(prompt, GREEDY) for prompt in prompts()]
        assert [reply.ids for reply in replies] == wanted
        assert [reply.cached_tokens for reply in replies] == [256] * 5 + [208]  # three pages are too few
        engine.generate([5], GREEDY)
        tiers = engine.stats().tiers
    assert tiers is not None and tiers.from_store == 5 * 16 and tiers.failed == 0


def save_windows(folder: Path) -> None:
    """A tiny seeded Gemma 3, without the time that it takes to import transformers."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16}
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    terms = {"sliding_window": 6, "layer_types": kinds, "max_position_embeddings": 160, "rms_norm_eps": 1e-5}
    named = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**named, **sizes, **heads, **terms}))
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    layer = {
        **{f"self_attn.{name}_proj": (size, 48) for name, size in (("q", 64), ("k", 16), ("v", 16))},
        **{"self_attn.o_proj": (48, 64), "self_attn.q_norm": (16,), "self_attn.k_norm": (16,)},
        **{"mlp.gate_proj": (80, 48), "mlp.up_proj": (80, 48), "mlp.down_proj": (48, 80)},
        **dict.fromkeys(norms, (48,)),
    }
    shapes = {f"layers.{number}.{name}": shape for number in range(3) for name, shape in layer.items()}
    draw = np.random.default_rng(2)
    tensors = {
        f"model.{name}.weight": draw.normal(0.0, 0.2, shape).astype(np.float32)
        for name, shape in {**shapes, "embed_tokens": (96, 48), "norm": (48,)}.items()
    }
    save_file(tensors, folder / "model.safetensors")
    words = Tokenizer(models.WordLevel({chr(0x100 + token): token for token in range(96)}, unk_token=chr(0x100)))
    words.save(str(folder / "tokenizer.json"))


def test_pages_of_windows_move_as_others_do_and_replies_are_the_same(tmp_path: Path) -> None:
    """Two layers see the last six tokens, and one sees all. Windows have passed all but the last pages of a prompt, and
    the others come up with these: a page is of all layers, and another text may go on from within it."""
    save_windows(tmp_path)
    draw = np.random.default_rng(1)
    texts = [draw.integers(0, 96, 120).tolist() for _ in range(3)]
    texts.append([*texts[0][:81], *draw.integers(0, 96, 39).tolist()])  # goes on from where no window of the first was
    options: dict[str, Any] = {"model": str(tmp_path), "device": "cpu", "threads": 1, "page_size": 4}
    options |= {"kv_tokens": 144, "max_model_len": 140, "max_running": 2, "spare_worker": False}
    with Engine(**options, kv_host="1MiB") as engine:
        scored = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=4)
        computed, *replies = [[engine.generate(text, scored) for text in texts] for _ in range(3)]
        tiers = engine.stats().tiers
    assert [reply.cached_tokens for reply in computed] == [0, 0, 0, 80]  # what they are without tiers, so far
    assert len({tuple(reply.ids) for reply in computed}) == len(texts)
    for again in replies:
        assert_same(again, computed)
        assert [reply.cached_tokens for reply in again] == [80, 116, 116, 116]  # 9 pages are too few to come up
    assert tiers is not None and tiers.from_host >= 2 * 80 and tiers.failed == 0
