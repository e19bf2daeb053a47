"""Triton's gated delta rule passes the compiler for a Hopper GPU that is not here, in the sizes of Qwen3.5."""

from typing import Any

import pytest
from hopper import MARKS, SHARED_MEMORY, bytes_spilled, compile_for_hopper, types_by_name

from engine.kernels.delta import triton as triton_delta
from engine.kernels.delta.reference import SMALL

pytestmark = MARKS
TYPES = types_by_name({
    "*bf16": ("inputs", "weight", "window", "mixed", "beta", "step", "out"),
    "*fp32": ("rate", "bias", "memory"),
    "*i64": ("slots", "offsets", "row_of"),
    "fp32": ("scale",),
})  # fmt: skip
SIZES = {"SHARED": 2, "KEY": 128, "VALUE": 128, "KEYS": 128, "VALUES": triton_delta.VALUES, "SMALL": SMALL}
SIZES |= {"TOKENS": triton_delta.TOKENS, "WIDTH": 4, "BLOCK": triton_delta.CHANNELS}


@pytest.mark.parametrize(
    ("name", "warps", "spilled"),  # bytes of a thread, at most
    [
        ("_convolve_kernel", 4, 0),
        ("_window_kernel", 4, 0),
        ("_step_kernel", 4, 0),
        pytest.param("_chunks_kernel", triton_delta.WARPS, 320, marks=pytest.mark.matrix),
    ],
)
def test_a_kernel_compiles(name: str, warps: int, spilled: int) -> None:
    kernel: Any = getattr(triton_delta, name)
    made = compile_for_hopper(kernel, SIZES, TYPES, num_warps=warps)
    assert made.metadata.shared <= SHARED_MEMORY
    assert bytes_spilled(made) <= spilled
