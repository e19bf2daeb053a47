"""The benchmark of DeepSeek over two GPUs runs whole, on CPUs with a tiny model; its figures are there and fit."""

import json
from pathlib import Path

import pytest
from oracle import tiny_model

from bench.engine import ranks

LATENT = {
    **{"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "num_key_value_heads": 4},
    **{"n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "num_attention_heads": 4},
    **{"vocab_size": 128, "eos_token_id": 127, "max_position_embeddings": 512},
}


@pytest.mark.matrix
def test_each_row_says_what_was_measured(tmp_path: Path) -> None:
    config = {**tiny_model("DeepseekV3", **LATENT).config.to_dict(), "architectures": ["DeepseekV3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = [f"--option={option}" for option in ("device=cpu", "threads=1", "page_size=4", "spare_worker=false")]
    found = ranks.main([str(tmp_path), "--small", *options, f"--json={tmp_path / 'figures'}"])
    written = json.loads((tmp_path / "figures").read_text())
    assert [(each["row"], each["name"]) for each in written] == [(each.row, each.name) for each in found]
    assert {each.row for each in found} == set(ranks.ROWS)
    values = {(each.row, each.name): each.value for each in found}
    assert values["kv", "times those of one rank"] == 2 and values["kv", "times those of tp alone"] == 2
    before, after = (values["rebalance", f"max over mean load of a rank, {when}"] for when in ("before", "after"))
    assert before > 1.15 > after >= 1
    speeds = [each for each in found if each.unit in ("tok/s", "s")]
    assert len(speeds) == 8 and all(each.value > 0 for each in speeds)
    assert all(each.floor is not None and each.value < each.floor for each in speeds if each.unit == "tok/s")
