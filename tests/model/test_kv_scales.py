"""Scales of an FP8 KV cache: attention as in float64 but for FP8's rounding, and what a checkpoint says of them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from oracle import tiny
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels import KernelSet
from engine.kernels.dense.reference import HeadNorms, Heads
from engine.layers import Attention, Build
from engine.layers import attention as layers_attention
from engine.layers.attention import AttentionShape, PagedAttention
from engine.layers.kv_scales import power_of_two
from engine.worker.steps.batch import build_batch
from engine.worker.steps.rows import Rows
from engine_plugins.models.llama import Llama
from engine_plugins.models.qwen import Qwen

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")
ROUNDING = 2.0**-4  # of numbers of three bits after the first
PAGE, LENGTH = 4, 21
IN_TORCH = KernelSet()  # the C kernels write float32 alone


class Plain(PagedAttention):
    """One row, by the definition, in float64 over what the cache holds."""

    def prepare(self, batch: Any) -> Any:
        return batch

    def attend(self, query: Tensor, cache: Tensor, plan: Any) -> Tensor:
        assert plan.starts.tolist() == [0]
        pages = plan.page_table[plan.slots[0]].long()
        key, value = cache[pages].to(torch.float64).transpose(0, 1).flatten(1, 2)[:, : len(query)]
        return attended(query.double(), key, value, self.shape.scale).to(query.dtype)


def attended(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, dim=1)) * scale
    unseen = torch.ones(len(query), len(key), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, dim=1)).flatten(1)


def run(qkv: Tensor, heads: Heads, scales: tuple[float, float], kv_dtype: Any, norms: HeadNorms | None) -> Tensor:
    shape = AttentionShape(layers=1, query_heads=heads.query, kv_heads=heads.kv, head_dim=heads.dim,
                           scale=heads.dim**-0.5, kv_dtype=kv_dtype)  # fmt: skip
    backend = Plain(shape, PAGE, CPU, torch.float32, IN_TORCH)
    layer = Attention(backend, 0)
    layer.scale(*scales, heads, norms, qkv)
    cache = torch.zeros(6, 2, PAGE, heads.kv, heads.dim, dtype=kv_dtype or torch.float32)
    tokens, table = torch.zeros(1, LENGTH + 1, dtype=torch.int32), torch.arange(6, dtype=torch.int32)[None]
    batch = build_batch(Rows.of(np.array([[0, 0, LENGTH, 1]])), tokens, table, PAGE, ((cache,),))
    batch = type(batch)(**{name: getattr(batch, name) for name in batch.__slots__} | {"plans": (batch,)})
    return layer(qkv.clone(), heads, batch, None, norms)


@pytest.mark.parametrize("normed", [False, True])
def test_attention_is_that_of_float64_but_for_the_rounding_of_fp8(normed: bool) -> None:
    heads = Heads(4, 2, 16)
    qkv = torch.randn(LENGTH, 8 * 16, generator=torch.Generator().manual_seed(0))
    qkv[:, 64:96] *= 3e-4  # keys that FP8 would round to nothing
    qkv[:, 96:] *= 5e3  # values beyond its range
    norms = None
    if normed:  # of keys as small
        norms = HeadNorms(torch.full((16,), 1.5), torch.full((16,), 3e-4), 1e-6)
    query, key, value = (part.double() for part in qkv.view(LENGTH, 8, 16).split([4, 2, 2], dim=1))
    if norms is not None:
        query, key = (
            part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            for part, weight in ((query, norms.query), (key, norms.key))
        )
    query = query * 3e3  # so that the scores matter
    if norms is None:
        qkv[:, :64] *= 3e3
    else:
        norms = HeadNorms(norms.query * 3e3, norms.key, norms.epsilon)
    wanted = attended(query, key, value, 0.25)
    scales = (float(key.abs().max()) / 448, float(value.abs().max()) / 448)
    got = run(qkv, heads, scales, FP8, norms).double()
    # A key's rounding moves a score by at most `moved`, hence a weight by exp(2 * moved); a value's is its own.
    moved = ROUNDING * 0.25 * torch.einsum("qhd,khd->hqk", query.abs(), key.abs().repeat_interleave(2, dim=1)).max()
    bound = ((1 + ROUNDING) * math.exp(2 * float(moved)) - 1) * float(value.abs().max())
    assert float((got - wanted).abs().max()) < min(bound, 0.1 * float(value.abs().max()))
    plain = run(qkv, heads, (1.0, 1.0), FP8, norms).double()
    assert float((plain - wanted).abs().max()) > 0.5 * float(value.abs().max()), "the case would do without scales"
    exact = run(qkv, heads, scales, None, norms)
    assert torch.equal(exact, run(qkv, heads, (1.0, 1.0), None, norms)), "only FP8 is scaled"


@pytest.mark.parametrize("scales", [(0.25, 8.0), (3.0, 1.0), (1.0, 0.1)])
def test_scaling_itself_rounds_nothing(scales: tuple[float, float]) -> None:
    """In a cache that holds all bits the scales cancel exactly."""
    heads = Heads(4, 2, 16)
    qkv = torch.randn(LENGTH, 8 * 16, generator=torch.Generator().manual_seed(1))
    for norms in (None, HeadNorms(torch.rand(16) + 0.5, torch.rand(16) + 0.5, 1e-6)):
        wanted = run(qkv, heads, (1.0, 1.0), torch.float64, norms)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers_attention, "FP8_TYPES", (torch.float64,))
            assert torch.equal(run(qkv, heads, scales, torch.float64, norms), wanted)


def test_scales_are_rounded_up_to_powers_of_two() -> None:
    assert [power_of_two(scale) for scale in (1.0, 0.5, 0.51, 3.0, 1e-3)] == [1.0, 0.5, 1.0, 4.0, 2.0**-9]


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────


def build(kv_dtype: torch.dtype | None) -> Build:
    return Build(dtype=torch.float32, device=CPU, page_size=PAGE, max_model_len=64, attention_backend=Plain,
                 kv_dtype=kv_dtype, kernels=IN_TORCH)  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), [(Llama, "Llama"), (Qwen, "Qwen3")])
def test_a_checkpoint_says_its_scales_or_leaves_them_out(family: Any, kind: str) -> None:
    config, tensors, _ = tiny(kind)
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.3)
    tensors["model.layers.0.self_attn.v_scale"] = torch.tensor([0.02])
    tensors["model.layers.1.self_attn.v_proj.v_scale"] = torch.tensor([0.1, 3.0])
    for kv_dtype in (FP8, None):
        model = family(config, build(kv_dtype))
        model.load(tensors.items())
        scales = [layer.self_attn.attention.scales for layer in model.model.layers]
        if kv_dtype is None:
            assert not any(scales)
            continue
        assert (scales[0].value, scales[1].value) == (2.0**-5, 4.0)
        size = model.model.layers[0].self_attn.qkv_proj.heads
        factors = scales[0].columns.split([size.query * size.dim, size.kv * size.dim, size.kv * size.dim])
        normed = kind == "Qwen3"
        assert [set(part.tolist()) for part in factors] == [{1.0 if normed else 0.5}, {1.0 if normed else 2.0}, {32.0}]
        if normed:
            attention = model.model.layers[0].self_attn
            assert torch.equal(scales[0].norms.key, attention.k_norm.weight * 2)
        assert all(scale is None for scale in scales[2:])


def test_a_scale_that_is_none_is_refused() -> None:
    config, tensors, _ = tiny("Llama")
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.0)
    with pytest.raises(ConfigError, match=r"self_attn\.k_scale is 0\.0"):
        Llama(config, build(FP8)).load(tensors.items())
