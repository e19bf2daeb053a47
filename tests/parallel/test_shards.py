"""Layers of several ranks, built in one process: what each holds, what it reads, and what is refused."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from oracle import TINY, tiny
from packed import Blocks
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.cpu.calls import kernels
from engine.layers import (
    Build,
    ColumnLinear,
    Embedding,
    Experts,
    LMHead,
    Model,
    QKVLinear,
    ReplicatedLinear,
    RowLinear,
)
from engine.parallel.mesh import Mesh
from engine.plugin.kernels import dequantize, quantize_blocks, quantize_rows
from engine.worker.weights import fill_at_random
from engine_plugins.attention.torch.mha import TorchAttention
from engine_plugins.attention.torch.mla import TorchLatentAttention
from engine_plugins.models.deepseek import Deepseek
from engine_plugins.models.llama import Llama
from engine_plugins.models.qwen3_moe import Qwen3Moe
from engine_plugins.quantization import fp8
from engine_plugins.quantization.fp8 import Fp8

CPU = torch.device("cpu")


def build(rank: int, tp: int, **terms: Any) -> Build:
    usual = {"dtype": torch.float32, "device": CPU, "page_size": 4, "max_model_len": 64}
    return Build(**{**usual, "attention_backend": TorchAttention, "mesh": Mesh(rank, tp=tp), **terms})


def loaded(layer: Any, tensors: dict[str, Any], path: str = "mlp.own") -> Any:
    layer.named(path)
    for parameter in dict(layer.named_parameters(recurse=False)):
        for name, part in layer.names(path, parameter):
            if name in tensors:
                layer.load(name, parameter, part, tensors[name])
    layer.loaded()
    return layer


def column_and_row(tp: int, weights: tuple[Any, Any], inner: int, size: int, **terms: Any) -> tuple[Tensor, list[Any]]:
    """What a column and a row projection make of `x` [3, size] on `tp` ranks, summed; and each rank's layers."""
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    layers, total = [], torch.zeros(3, size)
    for rank in range(tp):
        built = build(rank, tp, **terms)
        column = loaded(ColumnLinear(built, size, inner), {"mlp.own.weight": weights[0]})
        row = loaded(RowLinear(built, inner, size, summed=False), {"mlp.own.weight": weights[1]})
        total += row(column(x))
        layers.append((column, row))
    return total, layers


# ── what a rank reads ────────────────────────────────────────────────────────────────────────


class Counted:
    """A tensor of a checkpoint, and how many of its numbers have been read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.read = 0

    def __getitem__(self, index: Any) -> Tensor:
        part = self.tensor[index]
        self.read += part.numel()
        return part


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
LATENT = {
    **{"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "num_key_value_heads": 6},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "q_lora_rank": 20, "n_group": 4, "topk_group": 2},
}
WHOLE = ("norm.weight", "mlp.gate.weight")  # ends of names of what each rank holds whole
WHOLE += ("q_a_proj.weight", "kv_a_proj_with_mqa.weight", "e_score_correction_bias")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("model", "family", "changes"),
    [(Llama, "Llama", {"attention_bias": True}), (Qwen3Moe, "Qwen3Moe", EXPERTS), (Deepseek, "DeepseekV3", LATENT)],
)
def test_a_rank_reads_its_part_of_each_tensor_alone(model: type[Model], family: str, changes: dict, tp: int) -> None:
    config, tensors, _ = tiny(family, **changes)
    attention = TorchLatentAttention if model is Deepseek else TorchAttention
    for rank in range(tp):
        counted = {name: Counted(tensor) for name, tensor in tensors.items()}
        model(config, build(rank, tp, attention_backend=attention)).load(counted.items())
        for name, each in counted.items():
            parts = 1 if name.endswith(WHOLE) else tp
            if name.endswith("o_proj.bias"):  # added once
                assert each.read == (0 if rank else each.tensor.numel()), name
            else:
                assert each.read == each.tensor.numel() // parts, name


@pytest.mark.parametrize(("tp", "redundant"), [(2, 0), (2, 2), (4, 0)])
def test_a_rank_reads_its_experts_alone(tp: int, redundant: int) -> None:
    """Two groups of experts; where there are four ranks, each has half of the width of its group's."""
    config, tensors, _ = tiny("Qwen3Moe", **EXPERTS, num_attention_heads=4)
    for rank in range(tp):
        counted = {name: Counted(tensor) for name, tensor in tensors.items()}
        built = build(rank, tp, mesh=Mesh(rank, tp=tp, ep=2), redundant_experts=redundant)
        model = Qwen3Moe(config, built)
        model.load(counted.items())
        first = next(layer for layer in model.modules() if isinstance(layer, Experts))
        assert first.own == [[0, 1], [2, 3], [0, 1, 2], [3, 0, 1]][2 * (redundant > 0) + rank // (tp // 2)]
        for name, each in counted.items():
            if ".experts." in name:
                mine = int(name.split(".")[5]) in first.own
                assert each.read == mine * each.tensor.numel() // (tp // 2), name
                if mine and name.endswith("down_proj.weight"):
                    layer = model.get_submodule(name.rpartition(".experts")[0]).experts
                    wanted = each.tensor[:, layer.share]
                    assert torch.equal(layer.down[first.own.index(int(name.split(".")[5]))], wanted)


def test_ranks_share_key_value_heads_where_there_are_too_few() -> None:
    weights = {f"attn.{name}.weight": torch.randn(rows, 6) for name, rows in zip("qkv", (32, 8, 8), strict=True)}
    for rank in range(4):
        layer = QKVLinear(build(rank, 4), 6, 8, 2, 4, parts=("q", "k", "v"))
        counted = {name: Counted(tensor) for name, tensor in weights.items()}
        loaded(layer, counted, "attn.qkv")
        assert layer.heads == (2, 1, 4)
        kv = slice(rank // 2 * 4, rank // 2 * 4 + 4)
        query = weights["attn.q.weight"][rank * 8 : rank * 8 + 8]
        wanted = torch.cat((query, weights["attn.k.weight"][kv], weights["attn.v.weight"][kv]))
        assert torch.equal(layer.weight, wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_does_not_gather_has_its_part_of_the_vocabulary(tied: bool) -> None:
    weight, hidden = torch.randn(95, 16), torch.randn(3, 16)
    parts = []
    for rank in range(3):
        built = build(rank, 3)
        embedding = Embedding(built, 95, 16)
        embedding.load("embed.weight", "weight", "", weight)
        head = LMHead(built, 16, 95, tied=embedding if tied else None, gathers=False)
        loaded(head, {} if tied else {"lm_head.weight": weight}, "lm_head")
        parts.append(head(hidden))
        assert parts[-1].shape[1] == head.share.stop - head.share.start == len(head.weight)
    torch.testing.assert_close(torch.cat(parts, dim=1), hidden @ weight.T)


def test_a_replicated_layer_is_whole_on_each_rank() -> None:
    weight = torch.randn(7, 6)
    assert torch.equal(loaded(ReplicatedLinear(build(1, 2), 6, 7), {"mlp.own.weight": weight}).weight, weight)


def test_dummy_weights_that_ranks_hold_whole_are_the_same_on_all() -> None:
    config, _, _ = tiny("Qwen3Moe", **EXPERTS, vocab_size=95)
    models = [Qwen3Moe(config, build(rank, 2)) for rank in range(2)]
    for model in models:
        fill_at_random(model)
    zero, one = (dict(model.named_parameters()) for model in models)
    assert zero["lm_head.weight"].shape != one["lm_head.weight"].shape
    whole = [name for name in zero if name.endswith(WHOLE)]
    assert len(whole) > 6 and all(torch.equal(zero[name], one[name]) for name in whole)


# ── packed ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(kernels() is None, reason="there is no C compiler here")
@pytest.mark.parametrize(("kind", "inner", "stays"), [("Q8_0", 128, True), ("Q8_0", 96, False), ("Q4_0", 192, True)])
def test_packed_matrices_stay_packed_where_a_cut_is_between_blocks(kind: str, inner: int, stays: bool) -> None:
    weights = Blocks.of(kind, torch.randn(inner, 64)), Blocks.of(kind, torch.randn(64, inner))
    whole, _ = column_and_row(1, weights, inner, 64)
    for each in weights:
        each.read = 0
    total, layers = column_and_row(2, weights, inner, 64)
    torch.testing.assert_close(total, whole, atol=1e-4, rtol=1e-4)
    assert all(column.matrices and bool(row.matrices) is stays for column, row in layers)
    if stays:
        assert [each.read for each in weights] == [each.bytes.size for each in weights]  # each byte on one rank
        assert all(row.matrices[0].inputs == inner // 2 for _, row in layers)


# ── FP8 ──────────────────────────────────────────────────────────────────────────────────────

BLOCK_TERMS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
ROW_TERMS = {"quant_method": "fp8"}


@pytest.mark.parametrize(("terms", "make"), [(BLOCK_TERMS, quantize_blocks), (ROW_TERMS, quantize_rows)])
@pytest.mark.parametrize(("inner", "tp"), [(512, 2), (128, 2), (256, 4)])
def test_fp8_parts_are_parts_of_the_whole(terms: dict, make: Any, inner: int, tp: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(fp8, "dense_instead", lambda build: False)
    size = 200
    stored = [make(torch.randn(*shape)) for shape in ((inner, size), (size, inner))]
    dense = [dequantize(*each) for each in stored]
    x = torch.randn(3, size)
    total = torch.zeros(3, size)
    for rank in range(tp):
        built = build(rank, tp, quantization=Fp8(terms))
        ours = [{"mlp.own.weight": numbers, "mlp.own.weight_scale": scale} for numbers, scale in stored]
        column = loaded(ColumnLinear(built, size, inner), ours[0])
        row = loaded(RowLinear(built, inner, size, summed=False), ours[1])
        part = slice(rank * inner // tp, (rank + 1) * inner // tp)
        assert torch.equal(column.dense_weight(), dense[0][part]) and torch.equal(row.dense_weight(), dense[1][:, part])
        total += row(column(x))
    torch.testing.assert_close(total, x @ dense[0].T @ dense[1].T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_cut_within_an_fp8_block_is_refused_on_all_ranks_with_the_numbers(rank: int) -> None:
    built = build(rank, 2, quantization=Fp8(BLOCK_TERMS))
    said = "FP8 matrix of 384 rows or columns divides into parts of 192.*blocks of 128"
    with pytest.raises(ConfigError, match=said):
        ColumnLinear(built, 128, 384).named("mlp.up_proj")
    with pytest.raises(ConfigError, match=said):
        RowLinear(built, 384, 128).named("mlp.down_proj")
    with pytest.raises(ConfigError, match=said):
        Experts(built, 2, 128, 384).named("mlp.experts")
    for scheme in (Fp8(ROW_TERMS), Fp8(None)):  # scales of rows, and blocks that begin where a rank's part does
        ColumnLinear(build(rank, 2, quantization=scheme), 128, 384).named("mlp.up_proj")


@pytest.mark.parametrize(("terms", "make"), [(BLOCK_TERMS, quantize_blocks), (ROW_TERMS, quantize_rows)])
def test_fp8_experts_are_parts_of_the_whole(terms: dict, make: Any) -> None:
    size, inner, tp = 128, 256, 2
    tensors = {}
    for part, shape in (("gate_proj", (inner, size)), ("up_proj", (inner, size)), ("down_proj", (size, inner))):
        numbers, scale = make(torch.randn(*shape))
        tensors |= {f"mlp.own.0.{part}.weight": numbers, f"mlp.own.0.{part}.weight_scale": scale}
    dense = {
        part: dequantize(tensors[f"mlp.own.0.{part}.weight"], tensors[f"mlp.own.0.{part}.weight_scale"])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    for rank in range(tp):
        experts = loaded(Experts(build(rank, tp, quantization=Fp8(terms)), 1, size, inner), tensors)
        part = slice(rank * inner // tp, (rank + 1) * inner // tp)
        assert torch.equal(experts.gate_up[0], torch.cat((dense["gate_proj"][part], dense["up_proj"][part])))
        assert torch.equal(experts.down[0], dense["down_proj"][:, part])


# ── refused ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "tp", "said"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}, 2, "9 query heads .* 2 ranks"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}, 4, "3 key-value heads .* 4 ranks"),
        ({"intermediate_size": 81}, 2, "81 outputs of gate_proj .* 2 ranks"),
        ({"vocab_size": 5, "num_attention_heads": 8, "num_key_value_heads": 8}, 4, "5 tokens .* 2 a rank.* 4 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_with_both_numbers(change: dict, tp: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Llama({**TINY, **change}, build(0, tp, deferred=True))


@pytest.mark.parametrize(
    ("count", "ep", "redundant", "said"),
    [
        (6, 4, 0, r"6 experts do not divide over 4 ranks \(ep\); .* or --redundant-experts 2"),
        (8, 4, 2, r"8 experts and 2 copies do not divide over 4 ranks \(ep\); .* or --redundant-experts 4"),
        (4, 2, 6, "6 redundant experts are more than 2 ranks can hold beside 4 experts.* at most 4"),
        (4, 1, 2, "2 redundant experts are copies for other ranks.*choose an --ep of 2"),
    ],
)
def test_experts_that_do_not_divide_are_refused_with_both_numbers(
    count: int, ep: int, redundant: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Experts(build(0, 4, mesh=Mesh(0, tp=4, ep=ep), redundant_experts=redundant, deferred=True), count, 16, 8)


def test_widths_of_experts_divide_within_a_group() -> None:
    Experts(build(0, 4, mesh=Mesh(0, tp=4, ep=4)), 4, 16, 6)
    with pytest.raises(ConfigError, match="9 numbers of an expert's width do not divide over 2 ranks"):
        Experts(build(0, 4, mesh=Mesh(0, tp=4, ep=2)), 4, 16, 9)


def test_the_blocks_of_the_tests_are_those_of_gguf() -> None:
    weight = torch.randn(4, 64)
    blocks = Blocks.of("Q8_0", weight)
    wanted = gguf.dequantize(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0), blocks.type)
    assert np.array_equal(blocks[1:3, 10:40].numpy(), wanted[1:3, 10:40])
