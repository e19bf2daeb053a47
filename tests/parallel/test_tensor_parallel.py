"""Two ranks, two processes: a model divided between them gives the greedy ids of the whole one, in float32."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from oracle import tiny
from packed import Blocks
from rank_replies import COUNT, prompts, vectors
from torch import Tensor

from engine.parallel.collectives import all_gather, all_reduce, broadcast, reduce_scatter
from engine.parallel.groups import Groups
from engine.plugin.kernels import quantize_blocks
from engine.plugin.registry import resolve
from engine.plugin.testing import ModelHarness
from engine.testing.ranks import Ranks, open_ranks
from engine_plugins.quantization.fp8 import Fp8

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
LATENT = {
    **{"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "num_key_value_heads": 6},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
}
DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    **{"full_attention_interval": 3, "head_dim": 16, "shared_expert_intermediate_size": 20},
}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "head_dim": 128}
HEADS |= {"linear_value_head_dim": 128, "num_attention_heads": 2, "full_attention_interval": 3}
LARGE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
WIDE = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
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
    "a block with a norm of its own": ("own_norm:OwnNorm", "Llama", {}),
    "mixture": (f"{MODELS}.qwen3_moe:Qwen3Moe", "Qwen3Moe", EXPERTS),
    "two kinds of layers": (f"{MODELS}.gemma:Gemma3", "Gemma3", {"head_dim": 8, "sliding_window": 7}),
    "latent attention, shared experts": (f"{MODELS}.deepseek:Deepseek", "DeepseekV3", {**LATENT, "q_lora_rank": 20}),
    "latent attention of V2 Lite": (f"{MODELS}.deepseek:Deepseek", "DeepseekV2", {**LATENT, "q_lora_rank": None}),
    "gated delta nets, a shared expert with a gate": (
        f"{MODELS}.qwen3_5:Qwen35",
        "Qwen3_5Moe",
        {**EXPERTS, **DELTA},
    ),
    "FP8": (f"{MODELS}.qwen3_moe:Qwen3Moe", "Qwen3Moe", {**EXPERTS, **LARGE, **WIDE}),
    **{
        f"FP8, {family}": (f"{MODELS}.qwen3_5:Qwen35", family, {**EXPERTS, **LARGE, **WIDE, **HEADS})
        for family in ("Qwen3_5Moe", "Qwen3Next")
    },
    "packed": (f"{MODELS}.llama:Llama", "Llama", {**LARGE, "tie_word_embeddings": True}),
}
BERT = {
    **{"vocab_size": 95, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6},
    **{"max_position_embeddings": 63, "type_vocab_size": 1},
}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BLOCKS |= {"modules_to_not_convert": ["in_proj_a", "in_proj_b", "in_proj_ba", "shared_expert_gate"]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("ranks"), tp=2) as opened:
        yield opened


def stored(case: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The weights as the checkpoint of `case` has them."""
    matrices = {name for name in tensors if re.search(r"(_proj|in_proj_qkv|in_proj_z|in_proj_qkvz)\.weight\Z", name)}
    if case.startswith("FP8"):
        config["quantization_config"] = BLOCKS
        for name in matrices:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensors[name])
    if case == "packed":
        packed = {*matrices, "model.embed_tokens.weight"}
        return {name: Blocks.of("Q8_0", each) if name in packed else each for name, each in tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith("_proj.bias"):
            tensor.sub_(0.5)  # around zero, or one token would be all replies
    return tensors


def replies(groups: Groups | None, model: str, file: Path) -> tuple[list[list[int]], NDArray[np.float32]]:
    """What the model of `file` says to each prompt, and its logits at each token of the first."""
    config, tensors = torch.load(file, weights_only=False)
    scheme = Fp8(config["quantization_config"]) if "quantization_config" in config else None
    harness = ModelHarness(resolve(model), config, tensors, quantization=scheme, groups=groups)
    asked = prompts(config["vocab_size"])
    said = harness.greedy(asked, COUNT)
    (logits,) = harness.logits([(0, 0, len(asked[0]))])
    return said, logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_reply_as_one(case: str, ranks: Ranks, tmp_path: Path) -> None:
    model, family, changes = CASES[case]
    file = tmp_path / "model"
    config, tensors, _ = tiny(family, **changes)
    torch.save((config, stored(case, config, tensors)), file)
    said, logits = replies(None, model, file)
    assert len({token for reply in said for token in reply}) > 2  # decided, and not all alike
    one, two = ranks.run(replies, model, file)
    assert one[0] == two[0] == said
    assert np.array_equal(one[1], two[1])
    np.testing.assert_allclose(one[1], logits, atol=1e-4)


def without_gathering(groups: Groups, model: str, file: Path) -> list[list[int]]:
    """What the model of `file` says where logits cannot be gathered."""

    def gather(*_: object, **__: object) -> Tensor:
        raise AssertionError("logits are gathered")

    config, tensors = torch.load(file, weights_only=False)
    harness = ModelHarness(resolve(model), config, tensors, groups=groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.layers.embedding.all_gather", gather)
        return harness.greedy(prompts(config["vocab_size"]), COUNT)


def test_greedy_rows_gather_no_logits(ranks: Ranks, tmp_path: Path) -> None:
    model, family, changes = CASES["llama"]
    torch.save(tiny(family, **changes)[:2], tmp_path / "model")
    said, _ = replies(None, model, tmp_path / "model")
    assert ranks.run(without_gathering, model, tmp_path / "model") == [said, said]


def save_bert(file: Path) -> None:
    config = transformers.BertConfig(**BERT)
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(mean=0.0 if parameter.ndim > 1 else 0.5, std=0.2)
    torch.save((config.to_dict(), dict(model.state_dict())), file)


def test_two_ranks_embed_as_one(ranks: Ranks, tmp_path: Path) -> None:
    save_bert(tmp_path / "model")
    whole = vectors(None, tmp_path / "model")
    assert np.abs(whole[0] - whole[1]).max() > 1e-2
    for part in ranks.run(vectors, tmp_path / "model"):
        np.testing.assert_allclose(part, whole, atol=1e-5)


def collectives(groups: Groups, dtype: torch.dtype) -> list[Tensor]:
    """What each collective makes of the rank's numbers, which are 10 * rank + 0 .. 7."""
    group, rank = groups.along("tp"), groups.mesh.rank
    mine = (torch.arange(8).view(4, 2) + 10 * rank).to(dtype)
    return [
        all_reduce(mine.clone(), group),
        all_gather(mine, group),
        all_gather(mine.t(), group, dim=1),
        reduce_scatter(mine, group),
        broadcast(mine.clone(), group, source=1),
        all_reduce(mine.clone(), groups.along("pp")),  # a group of one
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_collectives(dtype: torch.dtype, ranks: Ranks) -> None:
    zero, one = ((torch.arange(8).view(4, 2) + 10 * rank).to(dtype) for rank in range(2))
    for rank, got in enumerate(ranks.run(collectives, dtype)):
        total = zero + one
        wanted = [total, torch.cat((zero, one)), torch.cat((zero.t(), one.t()), dim=1)]
        wanted += [total[2 * rank : 2 * rank + 2], one, (zero, one)[rank]]
        for mine, expected in zip(got, wanted, strict=True):
            assert torch.equal(mine, expected)


def ranks_of(groups: Groups) -> tuple[int, ...]:
    return groups.along("tp").ranks


def broken(groups: Groups) -> None:
    raise RuntimeError(f"rank {groups.mesh.rank} is broken")


def test_what_fails_on_a_rank_is_said(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"rank 0 failed:\n[^$]*rank 0 is broken"):
        ranks.run(broken)
    assert ranks.run(ranks_of) == [(0, 1), (0, 1)]
