"""Triton kernels of latent attention pass the compiler for a Hopper GPU that is not here, in the types and sizes of
DeepSeek-V2-Lite and V3."""

from typing import Any

import pytest
import torch
from hopper import MARKS, SHARED_MEMORY, compile_for_hopper, types_by_name

from engine.kernels.attention import expanded as triton_expanded
from engine.kernels.attention import mla as triton_mla
from engine.kernels.dense import latent as triton_latent

pytestmark = MARKS
TYPES = types_by_name({
    "*bf16": ("query", "rotated", "out", "key", "value", "latents", "weight", "cosines", "sines", "cache"),
    "*i64": ("slots", "positions", "tokens", "blocks", "starts", "offsets", "queries", "keys", "places"),
    "*fp32": ("partial", "maxima", "sums"),
    "*i32": ("page_table",),
    "fp32": ("epsilon",),
})  # fmt: skip
BF16 = torch.bfloat16


def compiled(kernel: Any, constants: dict[str, Any], **others: Any) -> Any:
    """`others` are types of arguments other than usual, and options of the compiler."""
    constants = {"PRECISION": None, "SCALE": 0.1, "DEPENDS": False, **constants}
    types = {name: kind for name, kind in others.items() if name in kernel.arg_names}
    options = {name: value for name, value in others.items() if name not in kernel.arg_names}
    return compile_for_hopper(kernel, constants, TYPES | types, **options)


@pytest.mark.parametrize(("heads", "cache"), [(16, "*bf16"), (128, "*fp8e4nv")])
def test_absorbed_rows(heads: int, cache: str) -> None:
    shape = triton_mla.MlaShape(heads=heads, latent_dim=512, rope_dim=64, page_size=16, scale=0.1)
    pages = torch.empty(1, 16, 576, dtype=BF16)
    fixed = {**triton_mla.constants(shape, torch.empty(0, dtype=BF16), pages), "ROWS": 256, "LEAST": 4}
    for kernel, cut in (
        (triton_mla.decode_kernel, triton_mla.decode_cut(shape, BF16)),
        (triton_mla.extend_kernel, triton_mla.mla_extend_cut(shape, BF16)),
    ):
        own = {**fixed, "LINES": cut.lines, "POSITIONS": cut.positions}
        made = compiled(kernel, own, cache=cache, num_warps=cut.warps, num_stages=cut.stages)
        assert made.metadata.shared <= SHARED_MEMORY


def test_the_sum_of_parts_expanded_rows_and_what_comes_before() -> None:
    parts = {"HEADS": 16, "LATENT": 512, "ROWS": 256, "POSITIONS": 32, "LEAST": 4, "DIM": 64, "SOME": 64}
    assert compiled(triton_mla.sum_kernel, parts).metadata.shared <= SHARED_MEMORY
    cut = triton_expanded.expanded_cut(BF16)
    dims = {"KEY": 128, "ROPE": 64, "VALUE": 128, "QUERIES": cut.queries, "KEYS": cut.keys, "CAUSAL": True}
    made = compiled(triton_expanded.expanded_kernel, dims, num_warps=cut.warps, num_stages=cut.stages)
    assert made.metadata.shared <= SHARED_MEMORY
    assert compiled(triton_expanded.join_kernel, {"KEY": 128, "ROPE": 64, "HEADS": 8}).metadata.shared <= SHARED_MEMORY
    for turned, size, columns in ((False, 128, 64), (True, 512, 32)):
        cut_of = {"K": size, "TURNED": turned, "TOKENS": 16, "COLUMNS": columns, "DEPTH": 128}
        assert (
            compiled(triton_latent._multiply_kernel, cut_of, inputs="*bf16", tokens="i32").metadata.shared
            <= SHARED_MEMORY
        )
    for interleaved in (True, False):
        cut_of = {"INTERLEAVED": interleaved, "HEADS": 4, "PAIRS": 32, "SIZE": 512}
        assert compiled(triton_latent._latent_kernel, cut_of).metadata.shared <= SHARED_MEMORY
