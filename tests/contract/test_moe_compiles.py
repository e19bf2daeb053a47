"""Triton kernels of mixtures and of FP8 products pass the compiler for a Hopper GPU that is not here, in the sizes of
DeepSeek's V2-Lite and V3, and as they are cut there."""

import re
from typing import Any

import pytest
from hopper import MARKS, SHARED_MEMORY, bytes_spilled, compile_for_hopper, types_by_name

from engine.kernels.experts import products as triton_experts
from engine.kernels.experts import products_fp8 as triton_experts_fp8
from engine.kernels.experts import routing as triton_routing
from engine.kernels.experts import triton as triton_moe
from engine.kernels.fp8 import triton as triton_fp8
from engine.kernels.fp8.reference import BLOCK, LARGEST
from engine.kernels.fp8.triton import Cut

pytestmark = MARKS
SPILLED = 32  # bytes of a thread, at most: of 16 warps each has 128 registers, a few less than the largest cut wants
TYPES = types_by_name({
    "*bf16": ("hidden", "inputs", "made", "base", "out", "weight"),
    "*fp32": ("logits", "bias", "weights", "scales", "input_scales", "out_scales"),
    "*i64": ("experts", "recorded", "real"),
    "*i32": ("chunks", "table", "order", "ends", "tasks", "count", "choices", "places"),
    "*fp8e4nv": ("numbers",),
    "fp32": ("scale",),
})  # fmt: skip


def compiled(
    kernel: Any,
    constants: dict[str, Any],
    cut: Cut | None = None,
    num_warps: int = 4,
    spills: int = SPILLED,
    **types: str,
) -> str:
    """Its PTX. `types` are those of arguments other than usual; one with a `cut` spills `spills` bytes at most."""
    usual = {"BLOCK": BLOCK, "LARGEST": LARGEST, "PRECISION": "tf32", "DEPENDS": True}
    options = {"num_warps": num_warps}
    if cut is not None:
        usual |= {"ROWS": cut.rows, "COLUMNS": cut.columns, "DEPTH": cut.depth, "TOGETHER": cut.together}
        options = {"num_warps": cut.warps, "num_stages": cut.stages}
    made = compile_for_hopper(kernel, usual | constants, TYPES | types, **options)
    assert made.metadata.shared <= SHARED_MEMORY, cut
    assert cut is None or bytes_spilled(made) <= spills, cut
    text: str = made.asm["ptx"]
    return text


V2_LITE, V3 = (2048, 1408, 6), (7168, 2048, 8)  # size, size of an expert, experts of a token
REGIMES = {f"{regime.bfloat16[0].rows} rows": regime for regime in triton_moe.REGIMES}


def sizes(shape: tuple[int, int, int], gated: bool) -> dict[str, int]:
    size, inner, top_k = shape
    return {"N": inner, "K": size, "TOP_K": top_k} if gated else {"N": size, "K": inner, "TOP_K": 1}


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_products_of_tasks(regime: triton_moe.Regime) -> None:
    """FP8 weights are among them where their blocks are not whole."""
    for gated, cut in zip((True, False), regime.bfloat16, strict=True):
        constants = {"SCALES": 0, "GATED": gated, **sizes(V2_LITE, gated)}
        text = compiled(triton_experts.multiply_kernel, constants, cut, places="i32")
        assert ("wgmma" in text) == (cut.rows >= 64), "many rows are for the matrix units of a Hopper GPU"
        constants |= {"SCALES": 1, **sizes((576, 208, 2), gated)}
        compiled(triton_experts.multiply_kernel, constants, cut, weight="*fp8e4nv", places="i32", spills=256)


def compiled_fp8(cut: Cut, gated: bool, shape: tuple[int, int, int] = V2_LITE, scales: int = 1, **types: str) -> str:
    kinds = {"inputs": "*fp8e4nv", "weight": "*fp8e4nv", "places": "i32", "out": "*fp8e4nv" if gated else "*bf16"}
    flags = {"SCALES": scales, "GATED": gated, "QUANTIZES": gated, "ORDERED": not types, **sizes(shape, gated)}
    text = compiled(triton_experts_fp8.multiply_fp8_kernel, flags, cut, **kinds | types)
    assert "wgmma" in text and "e4m3.e4m3" in text, "FP8 goes to the matrix units as it is"
    assert not re.search(r"cvt\S*\.e4m3x2\s", text), "none of it is converted on its way"
    return text


@pytest.mark.parametrize("shape", [V2_LITE, V3], ids=["v2-lite", "v3"])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_fp8_products_of_tasks(regime: triton_moe.Regime, shape: tuple[int, int, int]) -> None:
    up, down = regime.fp8
    assert up.columns == down.depth and up.rows == down.rows == regime.bfloat16[0].rows
    compiled_fp8(up, True, shape)
    compiled_fp8(down, False, shape)


def test_fp8_products_of_choices_by_themselves_and_with_scales_of_rows() -> None:
    up, down = triton_moe.ALONE
    assert up.columns == down.depth
    for cut, gated in ((up, True), (down, False)):
        compiled_fp8(cut, gated, tasks="*i64", choices="*i64", count="*i64")
        compiled_fp8(cut, gated, scales=2, tasks="*i64", choices="*i64", count="*i64")
    for cut, gated in zip(triton_moe.REGIMES[0].fp8, (True, False), strict=True):
        compiled_fp8(cut, gated, scales=2)


@pytest.mark.parametrize("weight", ["*bf16", "*fp8e4nv"])
def test_products_of_few_tokens_and_sums(weight: str) -> None:
    usual = {"SCALES": int(weight != "*bf16"), "TOP_K": 6, "BASED": True, "PLACED": False}
    up = {"INNER": 1408, "SIZE": 2048, "ROWS": 4 if weight == "*bf16" else 2, "COLUMNS": 1024}
    down = {"SIZE": 2048, "INNER": 1408, "ROWS": 2, "COLUMNS": 2048}
    compiled(triton_experts.vector_up_kernel, usual | up, weight=weight)
    compiled(triton_experts.vector_down_kernel, usual | down, weight=weight)
    compiled(triton_experts.combine_kernel, usual | {"SIZE": 2048, "COLUMNS": 1024})


@pytest.mark.parametrize("v3", [False, True], ids=["v2-lite", "v3"])
def test_routing(v3: bool) -> None:
    experts = {"EXPERTS": 256, "TOP_K": 8, "GROUPS": 8, "KEPT": 4, "BEST": 2, "TOKENS": 16, "COLUMNS": 256}
    if not v3:
        experts = {"EXPERTS": 64, "TOP_K": 6, "GROUPS": 1, "KEPT": 1, "BEST": 1, "TOKENS": 64, "COLUMNS": 64}
    usual = {**experts, "SIGMOID": v3, "BIASED": v3, "NORMALISED": v3, "RECORDS": True, "PADDED": True, "ROWS": 16}
    tile = {"EXPERTS": experts["EXPERTS"], "SIZE": 7168, "TOKENS": 1, "COLUMNS": 8192}
    compiled(triton_routing.gate_kernel, tile, logits="*fp32")
    held, line = (256 // 8 + 2, 9) if v3 else (64, 0)  # one of eight ranks with copies, or one alone
    compiled(triton_routing.route_kernel, usual | {"ORDERS": not v3, "HELD": held, "LINE": line}, places="i32")
    compiled(triton_routing.order_kernel, usual | {"EXPERTS": held, "SOME": 16}, places="i32")


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (3, 1), (8, 2)])
def test_routing_of_one_token_among_few_experts(experts: int, top_k: int) -> None:
    columns = 1 << (experts - 1).bit_length()
    cut = {"TOKENS": triton_routing.tokens_together(1, columns), "COLUMNS": columns, "ROWS": 16, "ORDERS": True}
    usual = {"EXPERTS": experts, "TOP_K": top_k, "GROUPS": 1, "KEPT": 1, "BEST": 1, "NORMALISED": True}
    usual |= {"HELD": experts, "LINE": 0} if experts < 8 else {"HELD": 5, "LINE": 3}
    flags = dict.fromkeys(("SIGMOID", "BIASED", "RECORDS", "PADDED"), False)
    compiled(triton_routing.route_kernel, usual | cut | flags, places="i32", num_warps=1)


@pytest.mark.parametrize("scales", [1, 2], ids=["blocks", "rows"])
def test_fp8_products(scales: int) -> None:
    usual = {"N": 2112, "K": 7168, "SCALES": scales, "BIASED": True}
    types = {"weight": "*fp8e4nv", "bias": "*bf16"}
    compiled(triton_fp8.vector_kernel, usual | {"ROWS": 4, "COLUMNS": 2048}, **types)
    for cut in (triton_fp8.CUTS[0][1], triton_fp8.CUTS[-1][1]):
        quantized = cut.rows >= 128
        inputs = {"inputs": "*fp8e4nv"} if quantized else {}
        compiled(triton_fp8.linear_kernel, usual | {"QUANTIZED": quantized}, cut, **types, **inputs)


def test_activations_become_fp8() -> None:
    for gated in (False, True):
        compiled(triton_fp8.quantize_kernel, {"SIZE": 2048, "GATED": gated, "TOGETHER": 8})
        compiled(triton_fp8.quantize_lines_kernel, {"SIZE": 2048, "GATED": gated, "COLUMNS": 2048})
