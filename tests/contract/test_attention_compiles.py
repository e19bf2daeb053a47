"""Triton kernels of paged attention, and the one that writes its pages, pass the compiler for a Hopper GPU that is not
here, in the sizes of Qwen3-0.6B and as they are cut there."""

from typing import Any

import pytest
import torch
from hopper import MARKS, SHARED_MEMORY, bytes_spilled, compile_for_hopper, types_by_name

from engine.kernels.attention import decode, extend, paged
from engine.kernels.dense import triton as ops

pytestmark = MARKS
BF16 = torch.bfloat16
DECODE_SPILLS, EXTEND_SPILLS = 128, 384  # bytes of a thread, at most: most where the cache is FP8
TYPES = types_by_name({
    "*bf16": ("query", "cache", "out", "qkv", "key_norm", "query_norm", "cosines", "sines"),
    "*i64": ("slots", "positions", "tokens", "firsts", "counts", "tiles", "members", "starts", "offsets", "places"),
    "*fp32": ("partial", "maxima", "prefix_partial", "prefix_maxima"),
    "*i32": ("page_table", "arrived", "tasks"),
    "fp32": ("epsilon",),
})  # fmt: skip
CACHES = pytest.mark.parametrize(
    ("window", "fp8"), [(None, False), (None, True), (1024, False)], ids=["whole", "fp8", "window"]
)


def compiled(kernel: Any, constants: dict[str, Any], types: dict[str, str], spills: int = 0, **options: int) -> None:
    """One that spills `spills` bytes at most."""
    made = compile_for_hopper(kernel, {"DEPENDS": True, **constants}, TYPES | types, **options)
    assert made.metadata.shared <= SHARED_MEMORY
    assert bytes_spilled(made) <= spills


def setting(window: int | None, fp8: bool) -> tuple[paged.PagedShape, dict[str, Any], dict[str, str]]:
    """A shape, what kernels are compiled for, and the types that differ."""
    shape = paged.PagedShape(query_heads=16, kv_heads=8, head_dim=128, page_size=16, scale=0.1, window=window)
    kind = torch.float8_e4m3fn if fp8 else BF16
    query, cache = torch.empty(1, 16, 128, dtype=BF16), torch.empty(1, 2, 16, 8, 128, dtype=kind)
    return shape, paged.constants(shape, query, cache), {"cache": "*fp8e4nv"} if fp8 else {}


@pytest.mark.parametrize("rows", [8, 256])
@CACHES
def test_rows_of_one_token(window: int | None, fp8: bool, rows: int) -> None:
    shape, fixed, types = setting(window, fp8)
    blocks = decode.decode_blocks(shape, BF16, rows)
    most = {"maxnreg": 168} if rows > decode.FEW_ROWS else {}  # as three programs fit a processor
    usual = {"ROWS": max(16, rows), "QUERIES": blocks.queries, "POSITIONS": blocks.positions, "PREFIX_PIECES": 4}
    usual |= {"GROUP_BLOCK": 2, "SOME": 16}
    for shared in (False, True) if window is None else (False,):
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages, **most}
        compiled(decode.decode_kernel, {**fixed, **usual, "SHARED": shared}, types, DECODE_SPILLS, **options)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_shared_prefixes(fp8: bool) -> None:
    shape, fixed, types = setting(None, fp8)
    tile = decode.prefix_blocks(shape, BF16)
    cut = {"QUERIES": tile.queries, "POSITIONS": tile.positions, "PIECES": 4}
    compiled(decode.prefix_kernel, {**fixed, **cut}, types, num_warps=tile.warps, num_stages=tile.stages)


@CACHES
def test_rows_of_several_tokens(window: int | None, fp8: bool) -> None:
    shape, fixed, types = setting(window, fp8)
    blocks = extend.extend_blocks(shape, BF16)
    cut = {"QUERIES": blocks.queries, "POSITIONS": blocks.positions}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    compiled(extend.extend_kernel, {**fixed, **cut}, types, EXTEND_SPILLS, **options)


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("flags", [(True, True, True), (False, True, True), (True, False, False)])
def test_heads_on_their_way_to_pages(flags: tuple[bool, bool, bool], many: bool) -> None:
    norms, rotates, caches = flags
    constants = {"NORMS": norms, "ROTATES": rotates, "CACHES": caches, "PAGE_SIZE": 16, "PAIRS": 64, "REST": 1}
    cut = {"TOKENS": 4, "HEADS": 8} if many else {"TOKENS": 1, "HEADS": 1}
    compiled(ops._heads_kernel, constants | cut, {"tokens": "i32"}, num_warps=4 if many else 1)
